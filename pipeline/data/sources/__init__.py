"""Sources: what the job's `data.source` names, as arrays in memory. One module for each kind."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.config import (
    DiscDataConfig,
    FileDataConfig,
    ImageFolderDataConfig,
    JobConfig,
    ParquetDataConfig,
    UserFunctionDataConfig,
)
from pipeline.data.dataset import Dataset, DatasetPart, make_dataset
from pipeline.data.sources.cifar import open_cifar
from pipeline.data.sources.disc import open_disc
from pipeline.data.sources.mnist import open_mnist
from pipeline.data.sources.user_function import open_user_function
from pipeline.redaction import is_env_reference, resolve_env

__all__ = ["DatasetPart", "Dataset", "fingerprint_dataset", "make_dataset", "open_dataset"]


def open_dataset(
    job: JobConfig, on_progress: Callable[[str], None] = lambda text: None, *, float64: bool | None = None
) -> Dataset:
    """Read, download or make the data that a job trains on. A `data.url` that stands in the environment is looked up.

    Parameters
    ----------
    float64: whether numbers of more digits than float32 has become float64, else float32; by default only in fp64. Of
        tables, whether all become so. (`Source.rounding` tells what float32 lost, `Source.in_float64` opens it anew.)

    Raises
    ------
    DataError: data that is absent and cannot be downloaded, damaged, or of a shape or type that cannot be used.
    """
    job = _resolve_url(job)
    data, wide = job.data, job.train.precision == "fp64" if float64 is None else float64
    if isinstance(data, UserFunctionDataConfig):
        return open_user_function(data.source, float64=wide, on_progress=on_progress)
    if isinstance(data, ParquetDataConfig):
        from pipeline.data.sources.parquet import open_parquet  # it needs Arrow

        return open_parquet(job, on_progress, float64=wide)
    if isinstance(data, ImageFolderDataConfig):
        from pipeline.data.sources.images import open_image_folder  # it needs Arrow and Pillow

        return open_image_folder(job, on_progress)
    if isinstance(data, DiscDataConfig):
        return open_disc(job.seed.for_stream("data"))
    if data.source == "cifar10" or data.source == "cifar100":
        return open_cifar(data.source, data.root)
    return open_mnist(data.source, data.root)


def fingerprint_dataset(
    job: JobConfig, on_progress: Callable[[str], None] = lambda text: None
) -> tuple[str, Dataset | None]:
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
    job = _resolve_url(job)
    if isinstance(job.data, ParquetDataConfig):
        from pipeline.data.sources.parquet import fingerprint_parquet

        return fingerprint_parquet(job, on_progress), None
    if isinstance(job.data, ImageFolderDataConfig):
        from pipeline.data.sources.images import fingerprint_image_folder

        return fingerprint_image_folder(job, on_progress), None
    source = open_dataset(job, on_progress)
    return source.fingerprint, source


def _resolve_url(job: JobConfig) -> JobConfig:
    """The job with a `data.url` that stands in the environment looked up: to be opened, and never written."""
    if not isinstance(job.data, FileDataConfig) or not is_env_reference(job.data.url):
        return job
    url = resolve_env(job.data.url, "data.url")
    return job.model_copy(update={"data": job.data.model_copy(update={"url": url})})
