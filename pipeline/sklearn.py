"""Estimators with scikit-learn's interface: `TrainyardClassifier` and `TrainyardRegressor`.

They work in `Pipeline`, `GridSearchCV`, `cross_val_score`, `clone` and `joblib`, and pass `check_estimator`.
scikit-learn is an extra of this package: `pip install 'trainyard[sklearn]'`.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import uuid
from abc import ABCMeta, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "pipeline.sklearn needs scikit-learn 1.6 or newer: pip install 'trainyard[sklearn]'", name="sklearn"
    ) from error

from pipeline.commands.table_job import open_table_job
from pipeline.commands.train import to_override_strings, train
from pipeline.data.rng import make_generator, random_permutation
from pipeline.data.splits import allocate_proportionally
from pipeline.data.tabular.in_memory import is_table, to_input_table, unused_name
from pipeline.errors import InputError, Interrupted
from pipeline.inference.load import load
from pipeline.inference.predictor import Predictor
from pipeline.runs.status import RunStatus
from pipeline.storage import Storage

__all__ = ["TrainyardClassifier", "TrainyardRegressor"]

SPLIT_COLUMN = "split"
"""The column that says which rows are for validation, unless an input has this name."""

ALL = ("*",)
"""`data.features`: every column is used, as by other estimators."""

_fit_lock = threading.Lock()
"""Training uses torch's random generator and settings, which all threads of a process share."""

DEFAULT_SEED, MAX_SEED = 1, 2**31 - 1


class _TrainyardEstimator(BaseEstimator, metaclass=ABCMeta):  # type: ignore[misc]
    """What both estimators share.

    Parameters
    ----------
    hidden: widths of the hidden layers; `model.hidden`.
    ensemble: number of members of an ensemble with shared weights; `model.ensemble`.
    dropout: `model.dropout`.
    epochs: length of the training, or of its first phase; `train.phases.0.epochs`.
    lr: learning rate of the training, or of its first phase; `train.phases.0.lr`.
    batch_size: rows per step; `train.batch_size`.
    patience: number of evaluations without a better one after which training stops early; `best.patience`.
    validation_fraction: fraction of the rows, drawn at random, on which the best epoch is chosen; 0 trains on all rows
        and keeps the last epoch.
    random_state: the seed of the job; an int, or a `numpy.random.RandomState` from which one is drawn. With None it is
        that of the job, so that fits are equal.
    job: what the other parameters do not cover: a job file, or its content as a dict. Its source, label and task are
        ignored.
    set: overrides as in `train`, such as `{"train.precision": "fp64"}`. They come last.
    storage: URL under which the run is kept; None: it is deleted after the fit, and only the model remains.

    A parameter that is None is that of `job`, or else of the recipe for tables.

    Attributes
    ----------
    model_: the trained `pipeline.inference.predictor.Predictor`. It computes in float64.
    run_: the status of the run: step, epoch, best, metrics, ...
    n_features_in_, feature_names_in_: as in every estimator of scikit-learn.
    """

    def __init__(
        self,
        *,
        hidden: Sequence[int] | None = None,
        ensemble: int | None = None,
        dropout: float | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        batch_size: int | str | None = None,
        patience: int | None = None,
        validation_fraction: float = 0.2,
        random_state: int | np.random.RandomState | None = None,
        job: Mapping[str, Any] | str | Path | None = None,
        set: Mapping[str, Any] | None = None,  # noqa: A002 - named as in `train`
        storage: str | None = None,
    ) -> None:
        self.hidden = hidden
        self.ensemble = ensemble
        self.dropout = dropout
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.job = job
        self.set = set
        self.storage = storage

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803 - scikit-learn's name
        """Train.

        Parameters
        ----------
        X: numbers (n_samples, n_features), NaN where missing; or a data frame of pandas or polars or an Arrow table,
            which may have columns of text, categories and missing values.
        y: see the class.

        Raises
        ------
        ValueError: data or parameters that cannot be used.
        """
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction!r} must be in [0, 1)")
        inputs, target = self._validate_fit(X, y)
        labels, task = self._encode_target(target)
        table = _to_table(inputs)
        self._column_names = table.column_names
        seed = self._find_seed()
        is_validation = self._draw_validation_rows(labels, task["kind"], DEFAULT_SEED if seed is None else seed)
        splits: dict[str, Any] = {"data.splits": {"by": "random", "val": 0}, "best": {"metric": "train/loss"}}
        if is_validation.any():
            # By a column rather than at random: a random split depends on names and types of columns, too.
            column = unused_name(SPLIT_COLUMN, table.column_names)
            table = table.append_column(column, pa.array(np.where(is_validation, "val", "train")))
            splits = {"data.splits": {"by": "column", "column": column}}
        with ExitStack() as stack:
            storage, overrides = self.storage, {**splits, **self._to_overrides(seed)}
            if storage is None:
                storage = stack.enter_context(_temporary_storage())
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="trainyard-fit-"))
                overrides = {"data.cache.folder": folder, **overrides}
            try:
                with (
                    _fit_lock,
                    open_table_job(
                        table, labels, task=task, features=ALL, base=self.job, overrides=to_override_strings(overrides)
                    ) as job,
                ):
                    self.run_: RunStatus = train(job, storage=storage)
                    checkpoint = "best" if is_validation.any() else "last"
                    self.model_: Predictor = load(f"{self.run_.url}@{checkpoint}").double()
            except InputError as error:
                raise ValueError(str(error)) from error
            except Interrupted as error:  # which GridSearchCV would take for a failed fit
                raise (KeyboardInterrupt if error.signal_number == signal.SIGINT else error) from error
        return self

    @abstractmethod
    def _encode_target(self, target: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the labels to train on, and the task."""

    def _to_overrides(self, seed: int | None) -> dict[str, Any]:
        """Return the settings of the job that the parameters make."""
        parameters = {
            "model.hidden": None if self.hidden is None else [int(width) for width in self.hidden],
            "model.ensemble": self.ensemble,
            "model.dropout": self.dropout,
            "train.phases.0.epochs": self.epochs,
            "train.phases.0.lr": self.lr,
            "train.batch_size": self.batch_size,
            "best.patience": self.patience,
            "seed": seed,
        }
        given = {key: value for key, value in parameters.items() if value is not None}
        return {**given, **(self.set or {})}

    def _find_seed(self) -> int | None:
        state = self.random_state
        if state is None or isinstance(state, int | np.integer):
            return None if state is None else int(state)
        return int(check_random_state(state).randint(MAX_SEED))

    def _draw_validation_rows(self, labels: np.ndarray, kind: str, seed: int) -> np.ndarray:
        """Return which rows are for validation, bool (n_samples,): a function of seed, number of rows and classes.

        Classes have their shares, and each keeps a row for training. No row is drawn if there are too few.
        """
        num_rows = len(labels)
        _, codes = np.unique(labels, return_inverse=True) if kind != "regression" else (None, np.zeros(num_rows, int))
        order = random_permutation(make_generator(seed, "validation rows"), num_rows)
        groups = [order[codes[order] == code] for code in range(int(codes.max()) + 1)]
        takes = allocate_proportionally([len(group) for group in groups], round(self.validation_fraction * num_rows))
        is_validation = np.zeros(num_rows, bool)
        for group, take in zip(groups, takes, strict=True):
            is_validation[group[: min(take, len(group) - 1)]] = True
        return is_validation

    def _validate_fit(self, X: Any, y: Any) -> tuple[Any, np.ndarray]:  # noqa: N803
        """Check inputs and labels as scikit-learn's estimators do, and record the features."""
        is_regressor = isinstance(self, RegressorMixin)
        options = {"multi_output": is_regressor, "y_numeric": is_regressor}
        if not is_table(X):
            validated: tuple[np.ndarray, np.ndarray] = validate_data(
                self, X, y, dtype="numeric", ensure_all_finite="allow-nan", ensure_min_samples=2, **options
            )
            return validated
        target: np.ndarray = validate_data(self, y=y, **options)
        validate_data(self, X, skip_check_array=True)  # records the features, which the call for y removes
        check_consistent_length(X, target)
        if len(target) < 2:
            raise ValueError(f"Found array with n_samples={len(target)} while a minimum of 2 is required.")
        return X, target

    def _predict_scores(self, X: Any) -> np.ndarray:  # noqa: N803
        """Return probabilities (n_samples, C) or values (n_samples, T), float64."""
        check_is_fitted(self)
        if is_table(X):
            validate_data(self, X, reset=False, skip_check_array=True)
        else:
            X = validate_data(self, X, reset=False, dtype="numeric", ensure_all_finite="allow-nan")  # noqa: N806
        table = _to_table(X, self._column_names)
        try:
            return self.model_.predict_scores(table)
        except InputError as error:
            raise ValueError(str(error)) from error

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.categorical = True
        return tags


class TrainyardClassifier(ClassifierMixin, _TrainyardEstimator):  # type: ignore[misc]
    """A neural network that predicts classes.

    `y` has labels (n_samples,): numbers, text or booleans. Two classes are trained as `task: binary`, of which the
    later one is positive; more as `task: multiclass`. Validation rows are drawn from each class.

    Parameters
    ----------
    class_weight: weight of each class in the loss, by its label, or "balanced"; `task.class_weights`.
    The others: as in `_TrainyardEstimator`.

    Attributes
    ----------
    classes_: the labels, sorted.
    The others: as in `_TrainyardEstimator`.
    """

    def __init__(
        self,
        *,
        hidden: Sequence[int] | None = None,
        ensemble: int | None = None,
        dropout: float | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        batch_size: int | str | None = None,
        patience: int | None = None,
        validation_fraction: float = 0.2,
        class_weight: Mapping[Any, float] | str | None = None,
        random_state: int | np.random.RandomState | None = None,
        job: Mapping[str, Any] | str | Path | None = None,
        set: Mapping[str, Any] | None = None,  # noqa: A002 - named as in `train`
        storage: str | None = None,
    ) -> None:
        super().__init__(
            hidden=hidden,
            ensemble=ensemble,
            dropout=dropout,
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            patience=patience,
            validation_fraction=validation_fraction,
            random_state=random_state,
            job=job,
            set=set,
            storage=storage,
        )
        self.class_weight = class_weight

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """Return the label of each row, (n_samples,), of the type of `classes_`."""
        scores = self._predict_scores(X)
        labels, positions = np.unique(self.model_.decode_predictions(scores), return_inverse=True)
        indices = np.array([self._index_of_label[str(label)] for label in labels.tolist()], np.int64)
        predicted: np.ndarray = self.classes_[indices[positions]]
        return predicted

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
        """Return the probability of each class, float64 (n_samples, n_classes), in the order of `classes_`."""
        scores = self._predict_scores(X)
        probabilities = np.zeros((len(scores), len(self.classes_)))
        probabilities[:, [self._index_of_label[name] for name in self.model_.classes]] = scores
        return probabilities

    def _encode_target(self, target: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        check_classification_targets(target)
        self.classes_, positions = np.unique(target, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"{type(self).__name__} needs at least 2 classes, but y has one class: {self.classes_[0]}")
        is_integer = self.classes_.dtype.kind in "iu" and int(self.classes_[-1]) < 2**63
        is_text = all(isinstance(label, str) for label in self.classes_)
        # Integers and text are trained as they are, so that the run predicts them in other programs too.
        labels = self.classes_ if is_integer or is_text else np.arange(len(self.classes_))
        self._index_of_label = {str(label): index for index, label in enumerate(labels.tolist())}
        task: dict[str, Any] = {"kind": "multiclass"}
        if len(self.classes_) == 2:
            task = {"kind": "binary", "positive": [labels[1].item() if not is_text else str(labels[1])]}
        if isinstance(self.class_weight, Mapping):
            weights = {label: float(weight) for label, weight in self.class_weight.items()}
            task["class_weights"] = {
                label: weights[given]
                for label, given in zip(labels.tolist(), self.classes_.tolist(), strict=True)
                if given in weights
            }
        elif self.class_weight is not None:
            task["class_weights"] = self.class_weight
        return labels[positions], task


class TrainyardRegressor(RegressorMixin, _TrainyardEstimator):  # type: ignore[misc]
    """A neural network that predicts numbers.

    `y` has numbers (n_samples,) or (n_samples, n_targets). Parameters and attributes: see `_TrainyardEstimator`.
    """

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """Return the value of each row, float64, of the shape of `y`."""
        scores = self._predict_scores(X)
        return scores[:, 0] if self._is_1d else scores

    def _encode_target(self, target: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        self._is_1d = target.ndim == 1
        return target, {"kind": "regression"}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _to_table(data: Any, names: Sequence[str] | None = None) -> pa.Table:
    """Convert inputs as `to_input_table`, with ValueError for data that cannot be used."""
    try:
        return to_input_table(data, names)
    except InputError as error:
        raise ValueError(str(error)) from error


@contextmanager
def _temporary_storage() -> Iterator[str]:
    """Provide the URL of a storage in memory, which is deleted at the end: it has no disk to wait for."""
    name = f"trainyard-fit-{uuid.uuid4().hex}"
    try:
        yield f"memory://{name}"
    finally:
        Storage.open("memory://").delete_folder(name)
