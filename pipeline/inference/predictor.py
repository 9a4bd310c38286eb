"""A trained model with the transforms of its inputs and outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import JobConfig
from pipeline.data.fitted_transforms import FittedTransforms
from pipeline.data.transforms import DataReport, TransformFn
from pipeline.device import Precision, default_settings
from pipeline.errors import DataError
from pipeline.inference.inputs import to_raw_inputs
from pipeline.models.ensemble import average_outputs, compute_disagreement
from pipeline.models.mlp import EnsembleMlpNet
from pipeline.user_code import UserCode

T = TypeVar("T")

BLOCK_ROWS = 1024
"""Number of rows per forward pass."""


class Predictor(nn.Module):
    """The result of `load`: an `nn.Module` (`to`, `eval`, `state_dict`) whose `predict` takes user data.

    model: the network alone: preprocessed inputs (B, ...) to outputs (B, K).
    classes: names of the classes in the order of the outputs, of a multilabel task those of the labels; empty for
        regression.
    fitted: its input and target transforms.
    job: the job that trained it.
    run, step: name of the run, and step of the checkpoint.
    code: the user's code from which the model was built; it is pickled with the predictor.
    threshold: of a binary task, the probability above which `predict` gives the second class; may be changed.
    """

    def __init__(
        self,
        model: nn.Module,
        fitted: FittedTransforms,
        job: JobConfig,
        run: str,
        step: int,
        code: UserCode | None = None,
        *,
        threshold: float = 0.5,
    ) -> None:
        super().__init__()
        self.code = code
        self.threshold = threshold
        self.model = model
        self.fitted = fitted
        self.classes = fitted.target_transform.classes
        self.job, self.run, self.step = job, run, step
        self._transform_fns: dict[tuple[torch.device, torch.dtype], TransformFn] = {}
        self.eval()

    def __reduce__(self) -> tuple[Any, ...]:
        # The code comes first: the unpickling process needs it to import the classes of the model.
        return _unpickle_predictor, (self.code, {**self.__dict__, "_transform_fns": {}})

    def forward(self, raw: Tensor) -> Tensor:
        """Return outputs (B, K) for samples (B, ...) not preprocessed: logits, or values on the transformed scale. In
        evaluation mode, those of an ensemble are averaged: logarithms of the mean probabilities of classes (binary:
        their logit), or mean values."""
        return self._forward(raw, averages=True)

    def _forward(self, raw: Tensor, averages: bool = False) -> Tensor:
        """Return the outputs, in evaluation mode those of each member of an ensemble, (B, members, K), or averaged."""
        weights = next(self.model.parameters())
        device_and_dtype = (weights.device, weights.dtype)
        if device_and_dtype not in self._transform_fns:
            self._transform_fns = {device_and_dtype: self.fitted.input_transform.make_transform_fn(*device_and_dtype)}
        with Precision.from_name(self.job.train.precision, weights.device).autocast_context(weights.device):
            inputs = self._transform_fns[device_and_dtype](raw.to(weights.device))
            if isinstance(self.model, EnsembleMlpNet) and not averages:
                return self.model.forward_members(inputs)
            outputs: Tensor = self.model(inputs)
        return outputs

    def predict(self, data: Any) -> np.ndarray:
        """Return the prediction for each row.

        Parameters
        ----------
        data: for a model trained on tables, a pandas or polars data frame, an Arrow table, a dict of columns, or a list
            of dicts, one per row; other columns are ignored. The same for a model whose `call` source returned a data
            frame. For a model trained on arrays or images, a NumPy array or tensor (N, ...) of the shape and dtype of
            the training data. For a model trained on images also a path, URL, file content (bytes) or Pillow image, or
            a list of these.

        Returns
        -------
        (N,) names of classes, or the labels themselves if they were integers or booleans; of a multilabel task, the
        value of each label, (N, L); or values in the unit of the label, float64 (N,) or (N, T); with `task.quantiles`,
        one column per quantile, ascending. N is 1 for a single image.

        Raises
        ------
        DataError: the data does not have the format of the training data, or has NaN where training did not allow it.

        Warns
        -----
        UserWarning: a column has many values that did not occur in training, see `column_report`.
        """
        return self.decode_predictions(self._warn_about(data, self.predict_scores))

    def predict_with_uncertainty(self, data: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the prediction for each row, and how much the members of an ensemble disagree on it.

        Data and predictions as for `predict`. The uncertainty is at least 0, and 0 where all members agree: for classes
        the mutual information of class and member, (N,) in nats: the entropy of the mean probabilities minus the mean
        entropy of the members', of a multilabel task for each label, (N, L); for values the standard deviation over the
        members, in the unit of the label, (N,) or (N, T), or for each quantile, (N, Q). See
        `pipeline.models.ensemble.compute_disagreement`.

        Raises
        ------
        DataError: as for `predict`; the model is not an ensemble.
        """
        if self.job.members == 1:
            raise DataError(
                "a single network has no uncertainty",
                where="predict_with_uncertainty",
                fix="use predict, or train with model.ensemble: 8",
            )
        scores, uncertainty = self._warn_about(data, self.predict_scores_and_uncertainty)
        assert uncertainty is not None, "it is an ensemble"
        return self.decode_predictions(scores), uncertainty[:, 0] if uncertainty.shape[1] == 1 else uncertainty

    def predict_proba(self, data: Any) -> np.ndarray:
        """Return the probability of each class: float64 (N, C), in the order of `classes`; of a multilabel task, the
        probability that each label has its positive value, the later of the two. Data as for `predict`."""
        if not self.classes:
            raise DataError("a regression has no classes", where="predict_proba", fix="use predict")
        return self._warn_about(data, self.predict_scores)

    def column_report(self, data: Any) -> dict[str, dict[str, float | int | None]]:
        """Return how the columns of some data differ from the training data, without predicting.

        By column: `rows`, and the fractions of them that are `unseen` (a category that no training row had), `filled`
        (missing) and `outside` (farther outside the training range than this range is wide). Data as for `predict`;
        empty for images and arrays without names. `pandas.DataFrame(...).T` shows it as a table.
        """
        report = DataReport(self.fitted.input_transform)
        to_raw_inputs(data, self.fitted.input_transform, self.job, report)
        return report.to_json()

    def _warn_about(self, data: Any, predict: Callable[[Any, DataReport], T]) -> T:
        """Return what `predict` returns, after warnings about the data for the caller's caller."""
        report = DataReport(self.fitted.input_transform)
        result = predict(data, report)
        if messages := report.format_warnings():
            warnings.warn("\n".join(messages), stacklevel=3)  # the caller of predict
        return result

    def predict_scores(self, data: Any, report: DataReport | None = None) -> np.ndarray:
        """Return probabilities (N, C) or (N, L), or values in the unit of the label (N, T); float64.

        Parameters
        ----------
        report: the data is added to it.
        """
        return self.predict_scores_and_uncertainty(data, report)[0]

    def predict_scores_and_uncertainty(
        self, data: Any, report: DataReport | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return what `predict_scores` does, and the uncertainty: float64 (N, 1), for values (N, T); None for a single
        network. See `predict_with_uncertainty`."""
        raw = to_raw_inputs(
            data, self.fitted.input_transform, self.job, report or DataReport(self.fitted.input_transform)
        )
        batches = [self._forward_batch(raw[first : first + BLOCK_ROWS]) for first in range(0, len(raw), BLOCK_ROWS)]
        uncertainty = None
        if batches:
            scores = np.concatenate([batch_scores for batch_scores, _ in batches])
            if self.job.members > 1:
                uncertainty = np.concatenate([values for _, values in batches if values is not None])
        else:
            scores, uncertainty = self.empty_scores()
        is_nan = np.isnan(scores).any(1)
        if self.classes and is_nan.any():  # argmax would silently return the first class
            raise DataError(
                f"the model's outputs are not finite for {int(is_nan.sum()):,} of {len(scores):,} rows, the first is "
                f"row {int(np.argmax(is_nan))}",
                where="predict",
                fix="check whether its values are far outside the training range, or leave it out",
            )
        return scores, uncertainty

    def empty_scores(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the scores and the uncertainty of no rows."""
        scores = np.empty((0, len(self.classes) or self.fitted.num_outputs))
        is_single = self.classes and self.fitted.target_transform.kind != "multilabel"
        uncertainty = np.empty((0, 1 if is_single else self.fitted.num_outputs))
        return scores, uncertainty if self.job.members > 1 else None

    def decode_predictions(self, scores: np.ndarray) -> np.ndarray:
        """Return the predictions for the `scores` of `predict_scores`."""
        if not self.classes:
            return scores[:, 0] if scores.shape[1] == 1 else scores
        is_default = self.threshold == 0.5 or self.fitted.target_transform.kind != "binary"
        if self.fitted.target_transform.kind == "multilabel":
            columns = self.fitted.target_transform.decode_label_columns((scores > 0.5).astype(np.int64))
            if len({column.dtype.kind for column in columns}) > 1:
                columns = [column.astype(object) for column in columns]
            return np.column_stack(columns)
        classes = scores.argmax(1) if is_default else (scores[:, 1] > self.threshold).astype(np.int64)
        return self.fitted.target_transform.decode_labels(classes)

    @default_settings()
    @torch.inference_mode()
    def _forward_batch(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return scores and, for an ensemble, the uncertainty of a batch of rows."""
        was_training = self.training
        self.eval()
        member_outputs = self._forward(torch.from_numpy(raw)).cpu().double()
        self.train(was_training)
        if not isinstance(self.model, EnsembleMlpNet):
            return self._to_scores(member_outputs), None
        outputs = average_outputs(member_outputs, self.model.averaging)
        disagreement: np.ndarray = compute_disagreement(member_outputs, self.model.averaging).numpy()
        if self.fitted.target_transform.std:
            disagreement = disagreement * np.array(self.fitted.target_transform.std)
        return self._to_scores(outputs), disagreement

    def _to_scores(self, outputs: Tensor) -> np.ndarray:
        """Return probabilities, or values in the unit of the label, of outputs (N, K) float64."""
        target_transform = self.fitted.target_transform
        if target_transform.kind == "regression":
            return target_transform.inverse_scale(outputs.numpy())
        if target_transform.kind == "multilabel":
            of_labels: np.ndarray = outputs.sigmoid().numpy()
            return of_labels
        is_binary = target_transform.kind == "binary"
        probabilities = torch.cat([(-outputs).sigmoid(), outputs.sigmoid()], 1) if is_binary else outputs.softmax(1)
        result: np.ndarray = probabilities.numpy()
        return result


def _unpickle_predictor(code: UserCode | None, state: dict[str, Any]) -> Predictor:
    predictor = Predictor.__new__(Predictor)
    predictor.__dict__.update(state)
    return predictor
