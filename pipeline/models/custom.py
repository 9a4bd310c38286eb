"""`kind: module:name`: custom models."""

from __future__ import annotations

from torch import nn

from pipeline.config import CustomModelConfig
from pipeline.errors import JobError
from pipeline.user_code import call_user_function


def build_custom_model(
    config: CustomModelConfig, input_shape: tuple[int, ...], outputs: int, code_sizes: tuple[int, ...]
) -> nn.Module:
    """Call the class or function `module:name` with the job's `args`: it returns an nn.Module from (B, *input_shape)
    floating to (B, outputs).

    It also receives these keyword arguments if its signature has them and `args` does not:

    input_shape: tuple[int, ...], shape of one preprocessed sample, such as (1, 28, 28) or (13,).
    outputs: int, number of outputs per sample: classes, 1 (binary), or columns of the target (regression).
    code_sizes: tuple[int, ...]; the last len(code_sizes) values of a table's sample are category codes, integers from 0
        to these sizes, exclusive.

    Raises
    ------
    JobError: it cannot be imported or built, or does not return an nn.Module.
    """
    where = f"model.kind: {config.kind}"
    optional_args = {"input_shape": input_shape, "outputs": outputs, "code_sizes": code_sizes}
    model = call_user_function(config.kind, config.args, where=where, error=JobError, optional_args=optional_args)
    if not isinstance(model, nn.Module):
        raise JobError(f"returns a {type(model).__name__}, not an nn.Module", where=where)
    return model
