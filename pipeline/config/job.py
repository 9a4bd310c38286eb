"""The whole job, its random streams, and its identity: the part that determines a run's weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import ConfigNode, format_suggestion, validate_import_path, validate_name
from pipeline.config.data import DataConfig, FileDataConfig, NamedDataConfig
from pipeline.config.evaluation import BestMetricConfig, CheckpointConfig, EvaluationConfig
from pipeline.config.metrics import (
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    METRICS,
    RESERVED_COLUMNS,
    is_part_column,
    make_part_columns,
    make_part_names,
    metric_column,
)
from pipeline.config.model import MlpConfig, ModelConfig
from pipeline.config.quantiles import quantile_metrics
from pipeline.config.scaling import ScalingConfig
from pipeline.config.training import TaskConfig, TrainConfig

TrackerName = Literal["tensorboard", "mlflow"]
"""An experiment tracker that gets the metrics of a run; `JobConfig.follow` documents each."""

SEED_STREAMS = ("split", "init", "shuffle", "augment", "dropout", "data")
"""Names of the independent random streams of a run; `seed: {all: 1, split: 7}` sets one of them."""


class SeedConfig(ConfigNode):
    """Seeds of the random streams: `seed: 1` for all of them, or `seed: {all: 1, split: 7}` to set some of them
    separately. A stream without a seed has that of `all`."""

    all: Annotated[int, Field(ge=0)] = 1
    """The seed of every stream that is not set below."""
    split: Annotated[int, Field(ge=0)] | None = None
    """Splits that are drawn at random, and the rows that `evaluate.limit` selects."""
    init: Annotated[int, Field(ge=0)] | None = None
    """Initial weights."""
    shuffle: Annotated[int, Field(ge=0)] | None = None
    """The order of rows in each epoch."""
    augment: Annotated[int, Field(ge=0)] | None = None
    """Parameters of `data.augment`."""
    dropout: Annotated[int, Field(ge=0)] | None = None
    """Random numbers that the model draws, such as dropout."""
    data: Annotated[int, Field(ge=0)] | None = None
    """Data that is generated: `source: disc`."""

    def for_stream(self, stream: str) -> int:
        """Return the seed of one of `SEED_STREAMS`."""
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
    """The data to train on."""
    model: ModelConfig = MlpConfig()
    """The model to train."""
    task: TaskConfig = TaskConfig()
    """What to predict: one of the kinds, or a mapping."""
    train: TrainConfig = TrainConfig()
    """How to train: batches, optimizer and learning rates."""
    metrics: list[str] = []
    """Metrics of your own besides those of the task: `module:function`. The function takes the outputs and targets of a
    whole split and returns a number."""
    code: str | None = None
    """Folder of your own modules; those in the working directory are found too. What the job imports of them is stored
    with the run, and other code makes another run."""
    evaluate: EvaluationConfig = EvaluationConfig()
    """When to evaluate, and on which splits."""
    best: BestMetricConfig = BestMetricConfig()
    """Which checkpoint is the best one."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save checkpoints, and how many to keep."""
    follow: list[TrackerName] = []
    """Experiment trackers that get the metrics while the run goes on; they never block or fail it. tensorboard: event
    files in the run's folder. mlflow: the server that MLFLOW_TRACKING_URI names, and the experiment of
    MLFLOW_EXPERIMENT_NAME, else one named after the job."""
    scale: ScalingConfig = ScalingConfig()
    """Where to run: workers, devices, retries."""
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
                raise ValueError(f"{value}: another column is called {column!r}; rename the function")
        return values

    @model_validator(mode="after")
    def _check_number_of_labels(self) -> Self:
        if self.task.kind == "multilabel" and isinstance(self.data, FileDataConfig) and len(self.data.labels) < 2:
            raise ValueError("task: multilabel needs several columns in data.label, such as [a, b]")
        if self.task.quantiles is not None and len(self.data.labels) > 1:
            raise ValueError(f"task.quantiles: takes one label, not {len(self.data.labels)}")
        return self

    @model_validator(mode="after")
    def _check_best_metric(self) -> Self:
        split, _, column = self.best.metric.partition("/")
        known = self.metric_columns()
        parts = make_part_columns(self.task.kind, self.part_names())
        if clash := next((name for name in map(metric_column, self.metrics) if name in parts), None):
            raise ValueError(
                f"metrics: {clash} is also the column of a metric of one of the labels; rename the function"
            )
        is_known_from_data = self.task.kind == "multiclass" or not self.data.labels
        if column not in known and is_known_from_data and is_part_column(self.task.kind, column):
            return self  # the classes, or the number of targets, are known only from the data
        if column not in known:
            is_of_another_task = column in HIGHER_IS_BETTER + LOWER_IS_BETTER
            candidates = [] if is_of_another_task else [f"{split}/{name}" for name in known]
            hint = format_suggestion(self.best.metric, candidates)
            raise ValueError(
                f"best.metric: {self.best.metric} is not measured{hint}; {self.task.kind} has {', '.join(known)}"
            )
        return self

    @property
    def members(self) -> int:
        """Number of networks of the model's ensemble; 1 for a single network. Each takes batches of its own."""
        return self.model.ensemble if isinstance(self.model, MlpConfig) else 1

    def part_names(self, num_targets: int | None = None, class_names: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the suffixes of the metric columns of single targets or classes, see `metrics.make_part_names`.

        Parameters
        ----------
        num_targets: of a regression or multilabel task; by default the number of labels in `data.label`.
        class_names: of a multiclass task, once the data is known.
        """
        if self.task.kind == "multiclass":
            return make_part_names(class_names, len(class_names))
        if self.task.kind == "multilabel" or (self.task.kind == "regression" and self.task.quantiles is None):
            return make_part_names(self.data.labels, len(self.data.labels) if num_targets is None else num_targets)
        return ()

    def metric_columns(self, num_targets: int | None = None, class_names: Sequence[str] = ()) -> list[str]:
        """Return the columns of the metrics of every evaluation. Parameters as for `part_names`."""
        parts = make_part_columns(self.task.kind, self.part_names(num_targets, class_names))
        columns, quantiles = [*METRICS[self.task.kind]], self.task.quantiles
        if quantiles is not None:
            columns = quantile_metrics(quantiles, [name for name in columns if name != "loss"])
        if self.task.threshold_rule is not None:
            columns.append("threshold")
        return list(dict.fromkeys([*columns, *parts, *map(metric_column, self.metrics)]))

    def to_dict(self) -> dict[str, Any]:
        """Return the whole tree as plain YAML types, defaults included."""
        return self.model_dump(mode="json", by_alias=True)


NON_IDENTITY_KEYS = ("scale", "storage", "checkpoint", "follow", "code")
"""Keys of the job that change where and how fast it runs, not its result. (`code` is a folder; the files in it that the
job imports count by their content.)"""

INITIAL_WEIGHTS_KEYS = ("init_from", "weights")
"""Keys of `model` that name the weights to start from."""

NON_IDENTITY_DATA_KEYS = ("root", "url", "loader", "cache")
"""Keys of `data` that change where and how fast a job runs, not its result."""

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
"""The values in the identity of keys of `data` that another source has. Jobs of every source once had all these keys,
and a run is found again by the digest. Never change or extend this: keys of later sources count for those sources only.
"""


IDENTITY_OPTIONAL_KEYS: dict[str, dict[str, Any]] = {
    "data": {"exclude": [], "dates": [], "hashed": {}},
    "data.splits": {},
    "model": {"ensemble": 1, "numeric_embedding": "none"},
    "task": {"label_smoothing": 0.0, "quantiles": None, "threshold": 0.5},
    "train": {},
    "train.optimizer": {"decay": "all"},
}
"""Keys that later versions added, by the node that has them, with the value that means what earlier versions did. At
that value a key is left out of the identity, so that runs of earlier versions are found again."""


def compute_identity(
    job: JobConfig,
    *,
    fingerprint: str,
    initial_weights_digest: str | None = None,
    max_steps: int | None = None,
    code_digests: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what determines a run's weights, as plain values: the resolved job without the keys that change only where
    and how fast it runs, plus the data and the user's code.

    Parameters
    ----------
    fingerprint: digest of the data's content.
    initial_weights_digest: digest of the weights that the run starts from, if they are not drawn at random.
    max_steps: the option `--max-steps`, if given.
    code_digests: digest of each file of the user's code that the job imports; left out of the identity if there are
        none, as in earlier versions.
    """
    tree = {key: value for key, value in job.to_dict().items() if key not in NON_IDENTITY_KEYS}
    _leave_out_optional_keys(tree)
    tree["data"] = {key: value for key, value in tree["data"].items() if key not in NON_IDENTITY_DATA_KEYS}
    tree["data"] = {**IDENTITY_OF_OTHER_SOURCES, **tree["data"]}
    if initial_weights_digest is not None:  # the digest identifies the weights; the path of their file does not count
        tree["model"] |= {key: "a file" for key in INITIAL_WEIGHTS_KEYS if os.path.isabs(tree["model"].get(key) or "")}
    if job.evaluate.limit is not None:  # earlier versions took the first rows: their runs are others
        tree["evaluate"] = {**tree["evaluate"], "sample": "stratified"}
    tree |= {"max_steps": max_steps, "fingerprint": fingerprint, "start": initial_weights_digest}
    return {**tree, "code": dict(code_digests)} if code_digests else tree


def _leave_out_optional_keys(tree: dict[str, Any]) -> None:
    """Remove the keys of `IDENTITY_OPTIONAL_KEYS` that have the value given there."""
    for path, values in IDENTITY_OPTIONAL_KEYS.items():
        node: Any = tree
        for name in path.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        for key, value in values.items() if isinstance(node, dict) else ():
            if key in node and node[key] == value:
                del node[key]


def digest_tree(tree: dict[str, Any]) -> str:
    """Return the SHA-256 of a tree of plain values, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
