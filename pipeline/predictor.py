"""A trained model with what turns raw data into its inputs, and its outputs into answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.fitted import Fitted
from pipeline.data.preprocess import Prepare
from pipeline.data.raw import raw_samples
from pipeline.device import Arithmetic
from pipeline.errors import DataError
from pipeline.job import Job

BLOCK_ROWS = 1024
"""Rows that the model takes at once."""


class Predictor(nn.Module):
    """What `load` gives: a module like any other (`to`, `eval`, `state_dict`), whose `predict` takes raw data.

    model: the network alone: prepared inputs (B, ...) to outputs (B, K).
    classes: names of the classes in the order of the outputs; empty for a regression.
    fitted: its preprocessing and what its labels were.
    job: the job that it was trained by. run, step: where it comes from.
    """

    def __init__(self, model: nn.Module, fitted: Fitted, job: Job, run: str, step: int) -> None:
        super().__init__()
        self.model = model
        self.fitted = fitted
        self.classes = fitted.labels.classes
        self.job, self.run, self.step = job, run, step
        self._prepare: dict[tuple[torch.device, torch.dtype], Prepare] = {}
        self.eval()

    def forward(self, raw: Tensor) -> Tensor:
        """Outputs (B, K) for raw samples (B, ...), on the model's device: logits, or values as they were learned."""
        weights = next(self.model.parameters())
        place = (weights.device, weights.dtype)
        if place not in self._prepare:
            self._prepare = {place: self.fitted.preprocess.to(*place)}
        with Arithmetic.of(self.job.train.precision, weights.device).context(weights.device):
            outputs: Tensor = self.model(self._prepare[place](raw.to(weights.device)))
        return outputs

    def predict(self, data: Any) -> np.ndarray:
        """The answer for each row.

        Parameters
        ----------
        data: of a model of tables, a pandas or polars frame, an Arrow table, a dict of columns, or a list of dicts, one
            a row; further columns are of no account. Of a model of arrays or pictures, a NumPy array or tensor (N, ...)
            of the shape and type that it was trained on. Of a model of pictures also a list of files, URLs or Pillow
            images.

        Returns
        -------
        (N,) names of classes, or the labels themselves where those were whole numbers, int64; or values in the label's
        unit, float64 (N,) or (N, T).

        Raises
        ------
        DataError: data that does not look like what it was trained on, NaN where training took none included.
        """
        return self.answers(self.scores(data))

    def predict_proba(self, data: Any) -> np.ndarray:
        """The probability of each class: float64 (N, C), in the order of `classes`. Data as for `predict`."""
        if not self.classes:
            raise DataError("a regression has no classes", where="predict_proba", fix="use predict")
        return self.scores(data)

    def scores(self, data: Any) -> np.ndarray:
        """Probabilities (N, C), or values in the label's unit (N, T); float64."""
        raw = raw_samples(data, self.fitted.preprocess, self.job)
        blocks = [self._scored(raw[first : first + BLOCK_ROWS]) for first in range(0, len(raw), BLOCK_ROWS)]
        scores = np.concatenate(blocks) if blocks else np.empty((0, len(self.classes) or self.fitted.outputs))
        unknown = np.isnan(scores).any(1)
        if self.classes and unknown.any():  # the largest of such is the first, which would be an answer like any other
            raise DataError(
                f"the model's outputs are not finite for {int(unknown.sum()):,} of {len(scores):,} rows, the first is "
                f"row {int(np.argmax(unknown))}",
                where="predict",
                fix="see whether its values lie far outside those of training, or leave it out",
            )
        return scores

    def answers(self, scores: np.ndarray) -> np.ndarray:
        """What `predict` gives for these `scores`."""
        if not self.classes:
            return scores[:, 0] if scores.shape[1] == 1 else scores
        return self.fitted.labels.named(scores.argmax(1))

    @torch.inference_mode()
    def _scored(self, raw: np.ndarray) -> np.ndarray:
        was_training = self.training
        self.eval()
        outputs = self(torch.from_numpy(raw)).cpu().double()
        self.train(was_training)
        labels = self.fitted.labels
        if labels.kind == "regression":
            return labels.unscaled(outputs.numpy())
        is_binary = labels.kind == "binary"
        probabilities = torch.cat([(-outputs).sigmoid(), outputs.sigmoid()], 1) if is_binary else outputs.softmax(1)
        found: np.ndarray = probabilities.numpy()
        return found
