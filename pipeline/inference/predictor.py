"""A trained model with what turns raw data into its inputs, and its outputs into answers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import JobConfig
from pipeline.data.fitted_transforms import FittedTransforms
from pipeline.data.transforms import DataReport, TransformFn
from pipeline.device import Precision, default_settings
from pipeline.errors import DataError
from pipeline.inference.inputs import to_raw_inputs
from pipeline.user_code import UserCode

BLOCK_ROWS = 1024
"""Rows that the model takes at once."""


class Predictor(nn.Module):
    """What `load` gives: a module like any other (`to`, `eval`, `state_dict`), whose `predict` takes raw data.

    model: the network alone: prepared inputs (B, ...) to outputs (B, K).
    classes: names of the classes in the order of the outputs; empty for a regression.
    fitted: its preprocessing and what its labels were.
    job: the job that it was trained by. run, step: where it comes from.
    code: the user's own code that the model was built by; it is pickled with it.
    """

    def __init__(
        self,
        model: nn.Module,
        fitted: FittedTransforms,
        job: JobConfig,
        run: str,
        step: int,
        code: UserCode | None = None,
    ) -> None:
        super().__init__()
        self.code = code
        self.model = model
        self.fitted = fitted
        self.classes = fitted.target_transform.classes
        self.job, self.run, self.step = job, run, step
        self._prepare: dict[tuple[torch.device, torch.dtype], TransformFn] = {}
        self.eval()

    def __reduce__(self) -> tuple[Any, ...]:
        # The code comes first: with it the process that unpickles can import what the model is made of.
        return _unpickle_predictor, (self.code, {**self.__dict__, "_prepare": {}})

    def forward(self, raw: Tensor) -> Tensor:
        """Outputs (B, K) for raw samples (B, ...), on the model's device: logits, or values as they were learned."""
        weights = next(self.model.parameters())
        device_and_dtype = (weights.device, weights.dtype)
        if device_and_dtype not in self._prepare:
            self._prepare = {device_and_dtype: self.fitted.input_transform.make_transform_fn(*device_and_dtype)}
        with Precision.from_name(self.job.train.precision, weights.device).autocast_context(weights.device):
            outputs: Tensor = self.model(self._prepare[device_and_dtype](raw.to(weights.device)))
        return outputs

    def predict(self, data: Any) -> np.ndarray:
        """The answer for each row.

        Parameters
        ----------
        data: of a model of tables, a pandas or polars frame, an Arrow table, a dict of columns, or a list of dicts, one
            a row; further columns are of no account. The same of a model whose `call` source returned a data frame.
            Of a model of arrays or pictures, a NumPy array or tensor (N, ...) of the shape and type that it was trained
            on. Of a model of pictures also a path, URL, file's content (bytes) or Pillow image, or a list of such.

        Returns
        -------
        (N,) names of classes, or the labels themselves where those were whole numbers, int64; or values in the label's
        unit, float64 (N,) or (N, T). N is 1 for a single picture.

        Raises
        ------
        DataError: data that does not look like what it was trained on, NaN where training took none included.

        Warns
        -----
        UserWarning: a column with many values that training did not have, see `column_report`.
        """
        return self.decode_predictions(self._predict_scores_and_warn(data))

    def predict_proba(self, data: Any) -> np.ndarray:
        """The probability of each class: float64 (N, C), in the order of `classes`. Data as for `predict`."""
        if not self.classes:
            raise DataError("a regression has no classes", where="predict_proba", fix="use predict")
        return self._predict_scores_and_warn(data)

    def column_report(self, data: Any) -> dict[str, dict[str, float | int | None]]:
        """How the columns of some data differ from those of the training rows, without a prediction.

        By column: `rows`, and the shares of them that are `unseen` (a category that no training row had), `filled` (no
        value) and `outside` (a number farther outside the training range than this range is wide). Data as for
        `predict`; empty for images and arrays without names. `pandas.DataFrame(...).T` shows it as a table.
        """
        report = DataReport(self.fitted.input_transform)
        to_raw_inputs(data, self.fitted.input_transform, self.job, report)
        return report.to_json()

    def _predict_scores_and_warn(self, data: Any) -> np.ndarray:
        report = DataReport(self.fitted.input_transform)
        scores = self.predict_scores(data, report)
        if messages := report.format_warnings():
            warnings.warn("\n".join(messages), stacklevel=3)  # the caller of predict
        return scores

    def predict_scores(self, data: Any, report: DataReport | None = None) -> np.ndarray:
        """Probabilities (N, C), or values in the label's unit (N, T); float64. report: the data is counted in it."""
        raw = to_raw_inputs(
            data, self.fitted.input_transform, self.job, report or DataReport(self.fitted.input_transform)
        )
        blocks = [self._forward_batch(raw[first : first + BLOCK_ROWS]) for first in range(0, len(raw), BLOCK_ROWS)]
        scores = np.concatenate(blocks) if blocks else np.empty((0, len(self.classes) or self.fitted.num_outputs))
        unknown = np.isnan(scores).any(1)
        if self.classes and unknown.any():  # the largest of such is the first, which would be an answer like any other
            raise DataError(
                f"the model's outputs are not finite for {int(unknown.sum()):,} of {len(scores):,} rows, the first is "
                f"row {int(np.argmax(unknown))}",
                where="predict",
                fix="see whether its values lie far outside those of training, or leave it out",
            )
        return scores

    def decode_predictions(self, scores: np.ndarray) -> np.ndarray:
        """What `predict` gives for these `scores`."""
        if not self.classes:
            return scores[:, 0] if scores.shape[1] == 1 else scores
        return self.fitted.target_transform.decode_labels(scores.argmax(1))

    @default_settings()
    @torch.inference_mode()
    def _forward_batch(self, raw: np.ndarray) -> np.ndarray:
        was_training = self.training
        self.eval()
        outputs = self(torch.from_numpy(raw)).cpu().double()
        self.train(was_training)
        labels = self.fitted.target_transform
        if labels.kind == "regression":
            return labels.inverse_scale(outputs.numpy())
        is_binary = labels.kind == "binary"
        probabilities = torch.cat([(-outputs).sigmoid(), outputs.sigmoid()], 1) if is_binary else outputs.softmax(1)
        result: np.ndarray = probabilities.numpy()
        return result


def _unpickle_predictor(code: UserCode | None, state: dict[str, Any]) -> Predictor:
    predictor = Predictor.__new__(Predictor)
    predictor.__dict__.update(state)
    return predictor
