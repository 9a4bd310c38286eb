"""Sources: what the job's `data.source` names, as arrays in memory. One module for each kind."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.data.sources.arrays import Arrays, Source, make_source
from pipeline.data.sources.call import open_call
from pipeline.data.sources.cifar import open_cifar
from pipeline.data.sources.disc import open_disc
from pipeline.data.sources.idx import open_idx
from pipeline.job import (
    DiscDataConfig,
    FileDataConfig,
    ImageFolderDataConfig,
    Job,
    ParquetDataConfig,
    UserFunctionDataConfig,
)
from pipeline.redaction import is_looked_up, looked_up

__all__ = ["Arrays", "Source", "identify", "make_source", "open_source"]


def open_source(job: Job, say: Callable[[str], None] = lambda text: None, *, float64: bool | None = None) -> Source:
    """Read, download or make the data that a job trains on. A `data.url` that stands in the environment is looked up.

    Parameters
    ----------
    float64: whether numbers of more digits than float32 has become float64, else float32; by default only in fp64. Of
        tables, whether all become so. (`Source.rounding` tells what float32 lost, `Source.in_float64` opens it anew.)

    Raises
    ------
    DataError: data that is absent and cannot be downloaded, damaged, or of a shape or type that cannot be used.
    """
    job = _with_url(job)
    data, wide = job.data, job.train.precision == "fp64" if float64 is None else float64
    if isinstance(data, UserFunctionDataConfig):
        return open_call(data.source, float64=wide, say=say)
    if isinstance(data, ParquetDataConfig):
        from pipeline.data.sources.parquet import open_parquet  # it needs Arrow

        return open_parquet(job, say, float64=wide)
    if isinstance(data, ImageFolderDataConfig):
        from pipeline.data.sources.image_folder import open_image_folder  # it needs Arrow and Pillow

        return open_image_folder(job, say)
    if isinstance(data, DiscDataConfig):
        return open_disc(job.seed.of("data"))
    if data.source == "cifar10" or data.source == "cifar100":
        return open_cifar(data.source, data.root)
    return open_idx(data.source, data.root)


def identify(job: Job, say: Callable[[str], None] = lambda text: None) -> tuple[str, Source | None]:
    """The fingerprint that `open_source` gives, for as little as it takes: tables and images are listed and hashed (or
    their digests remembered, see `digests`), and not decoded; torch is not imported (but for CIFAR, which torchvision
    reads).

    Returns
    -------
    The fingerprint; and the source itself where it had to be opened, since what a named source or a function gives is
    known by its arrays: to be trained on, so that the function is called once.

    Raises
    ------
    DataError: as `open_source`.
    """
    job = _with_url(job)
    if isinstance(job.data, ParquetDataConfig):
        from pipeline.data.sources.parquet import parquet_fingerprint

        return parquet_fingerprint(job, say), None
    if isinstance(job.data, ImageFolderDataConfig):
        from pipeline.data.sources.image_folder import image_folder_fingerprint

        return image_folder_fingerprint(job, say), None
    source = open_source(job, say)
    return source.fingerprint, source


def _with_url(job: Job) -> Job:
    """The job with a `data.url` that stands in the environment looked up: to be opened, and never written."""
    if not isinstance(job.data, FileDataConfig) or not is_looked_up(job.data.url):
        return job
    url = looked_up(job.data.url, "data.url")
    return job.model_copy(update={"data": job.data.model_copy(update={"url": url})})
