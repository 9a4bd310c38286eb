"""Data sources: the dataset that the job's `data.source` names. There is one module for each source.

A new source needs its module, a line in `SOURCES`, and its configuration class in `pipeline.config.data`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, cast

from pipeline.config import FileDataConfig, JobConfig
from pipeline.data.dataset import Dataset, DatasetPart, make_dataset
from pipeline.redaction import is_env_reference, resolve_env

__all__ = [
    "SOURCES",
    "Dataset",
    "DatasetPart",
    "check_data_exists",
    "fingerprint_dataset",
    "make_dataset",
    "open_dataset",
]

USER_FUNCTION = "call"
"""Name of the source `{call: module:function}` in `SOURCES`."""


class SourceFunctions(NamedTuple):
    """The functions of a source, each as `module:function` below this package.

    They are imported when they are needed: torch, Arrow and Pillow are slow to import, and most sources need none.

    open: `(job, on_progress, *, float64) -> Dataset`, see `open_dataset`.
    fingerprint: `(job, on_progress) -> str`, the fingerprint of the opened dataset without decoding the data; empty if
        it takes the arrays.
    check_url: `(url) -> None`, raises DataError if `data.url` has no such data; empty for a source without a URL.
    """

    open: str
    fingerprint: str = ""
    check_url: str = ""


SOURCES: dict[str, SourceFunctions] = {
    **dict.fromkeys(("mnist", "fashion_mnist"), SourceFunctions("mnist:open_mnist")),
    **dict.fromkeys(("cifar10", "cifar100"), SourceFunctions("cifar:open_cifar")),
    "disc": SourceFunctions("disc:open_disc"),
    **{
        name: SourceFunctions("tables:open_table", "tables:fingerprint_table", check_url)
        for name, check_url in {
            "parquet": "tables.parquet:check_parquet_files",
            "csv": "tables.formats:check_csv_files",
            "arrow": "tables.formats:check_arrow_files",
            "numpy": "tables.formats:check_numpy_files",
            "jsonl": "tables.formats:check_jsonl_files",
        }.items()
    },
    "image_folder": SourceFunctions(
        open="images:open_image_folder",
        fingerprint="images:fingerprint_image_folder",
        check_url="images.presence:check_image_folder",
    ),
    USER_FUNCTION: SourceFunctions("user_function:open_user_function"),
}
"""The functions of each source, by the name in `data.source`."""


def open_dataset(
    job: JobConfig, on_progress: Callable[[str], None] = lambda text: None, *, float64: bool | None = None
) -> Dataset:
    """Read, download or generate the data of a job. A `data.url` of the form `env:NAME` is resolved.

    Parameters
    ----------
    on_progress: called with a progress message, at most once a second.
    float64: whether numbers that float32 cannot represent become float64 rather than float32; by default only in fp64.
        In tables, whether all inputs become float64. (`Dataset.rounding_errors` has the errors of float32, and
        `Dataset.reopen_in_float64` opens the data again.)

    Raises
    ------
    DataError: data that is absent and cannot be downloaded, damaged, or of an unusable shape or type.
    """
    job = _resolve_url(job)
    wide = job.train.precision == "fp64" if float64 is None else float64
    return cast(Dataset, _load(_functions(job).open)(job, on_progress, float64=wide))


def fingerprint_dataset(
    job: JobConfig, on_progress: Callable[[str], None] = lambda text: None
) -> tuple[str, Dataset | None]:
    """Return the fingerprint of the dataset that `open_dataset` opens, at the least cost.

    Tables and images are listed and hashed, or their digests are read from a cache (see `file_digests`), but they are
    not decoded. torch is not imported, except for CIFAR, which torchvision reads.

    Returns
    -------
    The fingerprint; and the dataset if it had to be opened. The fingerprint of a named dataset or of a user function is
    computed from the arrays, and training uses the same dataset, so that the function is called once.

    Raises
    ------
    DataError: as `open_dataset`.
    """
    job = _resolve_url(job)
    if fingerprint := _functions(job).fingerprint:
        return cast(str, _load(fingerprint)(job, on_progress)), None
    dataset = open_dataset(job, on_progress)
    return dataset.fingerprint, dataset


def check_data_exists(job: JobConfig) -> None:
    """Check that `data.url` has data of the right kind, by listing it and reading a few bytes; without torch.

    Named datasets, which may still be downloaded, and user functions are not checked.

    Raises
    ------
    DataError: there is no such data, or it is of another kind.
    StorageError: a URL that cannot be used.
    """
    if isinstance(job.data, FileDataConfig) and (check_url := _functions(job).check_url):
        _load(check_url)(resolve_env(job.data.url, "data.url"))


def _functions(job: JobConfig) -> SourceFunctions:
    return SOURCES[job.data.source if isinstance(job.data.source, str) else USER_FUNCTION]


def _load(path: str) -> Callable[..., Any]:
    """Import a function of `SOURCES`."""
    module, _, name = path.partition(":")
    return cast(Callable[..., Any], getattr(import_module(f"{__name__}.{module}"), name))


def _resolve_url(job: JobConfig) -> JobConfig:
    """Return the job with its `data.url` resolved if it is `env:NAME`. The result must never be written to a file."""
    if not isinstance(job.data, FileDataConfig) or not is_env_reference(job.data.url):
        return job
    url = resolve_env(job.data.url, "data.url")
    return job.model_copy(update={"data": job.data.model_copy(update={"url": url})})
