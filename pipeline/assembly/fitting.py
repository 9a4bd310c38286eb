"""Whether stored tensors are those of a stored job's model, found out before any memory is taken for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.data.fitted import FittedTransforms
from pipeline.errors import StorageError
from pipeline.job import CustomModelConfig, JobConfig, TorchvisionModelConfig
from pipeline.learn.models import build_model

MAX_LISTED = 3


def check_state_dict(job: JobConfig, fitted: FittedTransforms, state_dict: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are not those of the job's model. A job of three lines can ask for a model of any size;
    weights of that size would have to lie there too.

    A model of the user's own is not looked at: its code is trusted.

    Raises
    ------
    StorageError: names the tensors.
    """
    if isinstance(job.model, CustomModelConfig):
        return
    preprocess = fitted.input_transform
    try:
        with torch.device("meta"):  # shapes without memory
            meta_model = build_model(job, preprocess.output_shape, fitted.num_outputs, 0, preprocess.code_sizes)
    except (RuntimeError, OverflowError, ValueError, ZeroDivisionError) as error:
        if isinstance(
            job.model, TorchvisionModelConfig
        ):  # some of them compute with their own values when they are made
            return
        raise _mismatch_error(f"{type(error).__name__}: {error}", where) from None
    expected_shapes = {name: tuple(tensor.shape) for name, tensor in meta_model.state_dict().items()}
    actual_shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    differ = [
        name for name in {**expected_shapes, **actual_shapes} if expected_shapes.get(name) != actual_shapes.get(name)
    ]
    if differ:
        raise _mismatch_error(", ".join(differ[:MAX_LISTED]) + (" and more" if len(differ) > MAX_LISTED else ""), where)


def _mismatch_error(what: str, where: str) -> StorageError:
    return StorageError(
        f"its tensors are not those of its job's model: {what.partition(chr(10))[0][:200]}",
        where=where,
        fix="use another checkpoint",
    )
