"""`kind: module:name`: a model of the user's own."""

from __future__ import annotations

from torch import nn

from pipeline.config import CustomModelConfig
from pipeline.errors import JobError
from pipeline.user_code import call_user_function


def build_custom_model(
    config: CustomModelConfig, input_shape: tuple[int, ...], outputs: int, code_sizes: tuple[int, ...]
) -> nn.Module:
    """What the class or function `module:name` gives for the job's `args`: any nn.Module, (B, *input_shape) floating
    to (B, outputs).

    It is given these keyword arguments besides, where its signature names them and `args` does not hold them:

    input_shape: tuple[int, ...], shape of one prepared sample, such as (1, 28, 28) or (13,).
    outputs: int, numbers wanted for a sample: classes, 1 (binary), or columns of the target (regression).
    code_sizes: tuple[int, ...]; the last len(code_sizes) numbers of a table's sample are codes of categories, whole
        numbers from 0 up to these sizes.

    Raises
    ------
    JobError: it cannot be imported or built, or is no nn.Module.
    """
    where = f"model.kind: {config.kind}"
    optional_args = {"input_shape": input_shape, "outputs": outputs, "code_sizes": code_sizes}
    model = call_user_function(config.kind, config.args, where=where, error=JobError, optional_args=optional_args)
    if not isinstance(model, nn.Module):
        raise JobError(f"gives a {type(model).__name__}, not an nn.Module", where=where)
    return model
