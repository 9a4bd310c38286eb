"""`follow:` who else is told of a run.

The whole tree, its random streams, and what of it determines a run's weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import ConfigNode, format_suggestion, validate_import_path, validate_name
from pipeline.config.data import DataConfig, NamedDataConfig
from pipeline.config.evaluation import BestMetricConfig, CheckpointConfig, EvaluationConfig
from pipeline.config.metrics import (
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    METRICS,
    RESERVED_COLUMNS,
    TARGET_METRICS,
    make_target_columns,
    make_target_names,
    metric_column,
)
from pipeline.config.model import MlpConfig, ModelConfig
from pipeline.config.scaling import ScalingConfig
from pipeline.config.training import TaskConfig, TrainConfig

TrackerName = Literal["tensorboard", "mlflow"]
"""An experiment tracker that gets the metrics of a run; the field `follow` of the job documents each."""


SEED_STREAMS = ("split", "init", "shuffle", "augment", "dropout", "data")
"""Names of the independent random streams of a run; `seed: {all: 1, split: 7}` sets one apart."""


TARGET_COLUMN_PATTERN = rf"({'|'.join(TARGET_METRICS)})_\d+"
"""Columns of single targets that have no label."""


class SeedConfig(ConfigNode):
    """Seeds of the random streams: `seed: 1` for all of them, or `seed: {all: 1, split: 7}` to set single ones apart. A
    stream without a seed of its own has that of `all`."""

    all: Annotated[int, Field(ge=0)] = 1
    """The seed of every stream that has none of its own."""
    split: Annotated[int, Field(ge=0)] | None = None
    """Which rows are in which split, and which of them `evaluate.limit` takes."""
    init: Annotated[int, Field(ge=0)] | None = None
    """The weights that are drawn at random."""
    shuffle: Annotated[int, Field(ge=0)] | None = None
    """The order of rows in each epoch."""
    augment: Annotated[int, Field(ge=0)] | None = None
    """What `data.augment` draws."""
    dropout: Annotated[int, Field(ge=0)] | None = None
    """What the model itself draws, such as dropout."""
    data: Annotated[int, Field(ge=0)] | None = None
    """What a generated source draws: `source: disc`."""

    def for_stream(self, stream: str) -> int:
        """The seed of one of `STREAMS`."""
        stream_seed: int | None = getattr(self, stream)
        return self.all if stream_seed is None else stream_seed


class JobConfig(ConfigNode):
    """One training job."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    """Version of this format."""
    name: str
    """The first part of the run's name: letters, digits, '.', '_' and '-'."""
    seed: SeedConfig = SeedConfig()
    """Seeds of the random streams: one number for all, or a mapping."""
    data: DataConfig = NamedDataConfig()
    """What to train on."""
    model: ModelConfig = MlpConfig()
    """What is trained."""
    task: TaskConfig = TaskConfig()
    """What is learned: one of the kinds, or a mapping."""
    train: TrainConfig = TrainConfig()
    """How it is learned: batches, the update rule and the learning rates."""
    metrics: list[str] = []
    """Metrics of your own besides those of the task: `module:function`. The function takes the outputs and targets of a
    whole split and returns a number."""
    code: str | None = None
    """Folder of your own modules; those in the working directory are found too. What the job imports of them is stored
    with the run, and other code makes another run."""
    evaluate: EvaluationConfig = EvaluationConfig()
    """When to evaluate, and on what."""
    best: BestMetricConfig = BestMetricConfig()
    """Which checkpoint counts as the best."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save, and how much to keep."""
    follow: list[TrackerName] = []
    """Experiment trackers that get the metrics while the run goes on; they never block or fail it. tensorboard: event
    files in the run's folder. mlflow: the server that MLFLOW_TRACKING_URI names, and the experiment of
    MLFLOW_EXPERIMENT_NAME, or else one called like the job."""
    scale: ScalingConfig = ScalingConfig()
    """Where the work runs."""
    storage: str = "./runs"
    """Where run directories are written: a folder, relative to the working directory, or any fsspec URL, or
    env:NAME."""

    @field_validator("name")
    @classmethod
    def _validate_name(cls, value: str) -> str:
        return validate_name(value)

    @field_validator("seed", mode="before")
    @classmethod
    def _expand_seed(cls, value: Any) -> Any:
        return {"all": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("task", mode="before")
    @classmethod
    def _expand_task(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("metrics")
    @classmethod
    def _validate_metrics(cls, values: list[str]) -> list[str]:
        for value in values:
            column = metric_column(validate_import_path(value))
            if column in RESERVED_COLUMNS or [metric_column(other) for other in values].count(column) > 1:
                raise ValueError(f"{value}: another column is called {column!r}; name the function differently")
        return values

    @model_validator(mode="after")
    def _check_best_metric(self) -> Self:
        split, _, column = self.best.metric.partition("/")
        known = self.metric_columns()
        if clash := next((name for name in known if known.count(name) > 1), None):
            raise ValueError(
                f"metrics: {clash} is what one of the labels is measured by; name the function differently"
            )
        if self.task.kind == "regression" and not self.data.labels and re.fullmatch(TARGET_COLUMN_PATTERN, column):
            return self  # whether there are so many targets is for the data to say
        if column not in known:
            is_of_another_task = column in HIGHER_IS_BETTER + LOWER_IS_BETTER
            near = [] if is_of_another_task else [f"{split}/{name}" for name in known]
            hint = format_suggestion(self.best.metric, near)
            raise ValueError(
                f"best.metric: {self.best.metric} is not measured{hint}; {self.task.kind} has {', '.join(known)}"
            )
        return self

    def target_names(self, num_targets: int | None = None) -> tuple[str, ...]:
        """What the columns of single targets of a regression end in, see `metrics.target_names`.

        Parameters
        ----------
        count: of the targets; those of `data.label` by default.
        """
        if self.task.kind != "regression":
            return ()
        return make_target_names(self.data.labels, len(self.data.labels) if num_targets is None else num_targets)

    def metric_columns(self, num_targets: int | None = None) -> list[str]:
        """What every evaluation measures, by column. targets: as `target_names` takes them."""
        of_targets = make_target_columns(self.target_names(num_targets))
        return [*METRICS[self.task.kind], *of_targets, *map(metric_column, self.metrics)]

    def to_dict(self) -> dict[str, Any]:
        """The whole tree as plain YAML types, defaults included."""
        return self.model_dump(mode="json", by_alias=True)


NON_IDENTITY_KEYS = ("scale", "storage", "checkpoint", "follow", "code")
"""Branches of the job that change where and how fast it runs, not what comes out. (`code` is a folder; what of it the
job imports counts by its content.)"""

INITIAL_WEIGHTS_KEYS = ("init_from", "weights")
"""Of the job's `model`: what names the weights to start from."""

NON_IDENTITY_DATA_KEYS = ("root", "url", "loader", "cache")
"""Likewise, of its `data`."""

IDENTITY_OF_OTHER_SOURCES: dict[str, Any] = {
    "label": None,
    "features": ["*"],
    "keys": [],
    "categorical": [],
    "missing": {"numeric": "median", "categorical": "own_level"},
    "one_hot_up_to": 16,
    "shape": None,
    "path": "path",
    "resize": None,
    "crop": None,
    "mode": "rgb",
    "on_error": "fail",
    "skip_up_to": 0.01,
}
"""What the identity holds for the keys of `data` that go with another source. Jobs of every source once had all these
keys, and a run is found again by the digest. Never change or extend this: keys of later sources count for those alone.
"""


def compute_identity(
    job: JobConfig,
    *,
    fingerprint: str,
    initial_weights_digest: str | None = None,
    max_steps: int | None = None,
    code_digests: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What determines a run's weights, as plain values: the resolved job without where and how fast, plus the data and
    the user's own code.

    Parameters
    ----------
    fingerprint: digest of the data's content.
    start: digest of the weights that the run starts from, where they come from elsewhere.
    max_steps: the flag `--max-steps`, where given.
    code: digest of each file of the user's own code that the job imports; a job without any has the identity that it
        always had.
    """
    tree = {key: value for key, value in job.to_dict().items() if key not in NON_IDENTITY_KEYS}
    tree["data"] = {key: value for key, value in tree["data"].items() if key not in NON_IDENTITY_DATA_KEYS}
    tree["data"] = {**IDENTITY_OF_OTHER_SOURCES, **tree["data"]}
    if (
        initial_weights_digest is not None
    ):  # it says what the weights are; where they lie is no more part of it than the data's folder
        tree["model"] |= {key: "a file" for key in INITIAL_WEIGHTS_KEYS if os.path.isabs(tree["model"].get(key) or "")}
    if job.evaluate.limit is not None:  # runs of an earlier version took the first rows, and must not go on with others
        tree["evaluate"] = {**tree["evaluate"], "sample": "stratified"}
    tree |= {"max_steps": max_steps, "fingerprint": fingerprint, "start": initial_weights_digest}
    return {**tree, "code": dict(code_digests)} if code_digests else tree


def digest_tree(tree: dict[str, Any]) -> str:
    """SHA-256 of a tree of plain values, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
