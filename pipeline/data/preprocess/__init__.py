"""From raw samples to what a model takes: fitted on the training rows alone, stored with every checkpoint.

`samples` prepares arrays and images, `columns` the rows of tables; both have the same methods. `fitting` fits the
latter to what `passes` saw of the training rows; `leaks` looks for what is probably not meant; `report` counts what new
data holds that the training rows did not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.data.preprocess.columns import TablePreprocess
from pipeline.data.preprocess.fitting import fit_table
from pipeline.data.preprocess.leaks import fit_warnings
from pipeline.data.preprocess.passes import number_places
from pipeline.data.preprocess.report import DataReport
from pipeline.data.preprocess.samples import Prepare, SamplePreprocess, fit_samples
from pipeline.data.sources.arrays import Source
from pipeline.job import Job

__all__ = [
    "DataReport",
    "Prepare",
    "Preprocess",
    "SamplePreprocess",
    "TablePreprocess",
    "fit_preprocess",
    "fit_warnings",
    "number_places",
    "preprocess_from_json",
]

Preprocess = SamplePreprocess | TablePreprocess


def fit_preprocess(job: Job, source: Source, rows: np.ndarray) -> Preprocess:
    """Fit what `data.normalize` and `data.missing` ask for.

    Parameters
    ----------
    rows: positions of the training split in `source.train`, int64 (n,): what is fitted depends on no other row.

    Raises
    ------
    DataError: a normalisation that does not fit the samples; with `missing: fail`, a missing value anywhere.
    """
    if source.schema is None:
        return fit_samples(job, source.train, rows, source.names)
    return fit_table(job, source.train, source.schema, rows)


def preprocess_from_json(values: Mapping[str, Any]) -> Preprocess:
    """What `to_json` of either kind gave.

    Raises
    ------
    DataError: written by another version, or damaged.
    """
    is_table = isinstance(values, Mapping) and values.get("kind") == "table"
    return TablePreprocess.from_json(values) if is_table else SamplePreprocess.from_json(values)
