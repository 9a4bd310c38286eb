"""`check`: validate a job. Resolves it, and optionally runs one batch through the model or overfits one batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.column_table import ColumnUse, describe_columns, format_column_table
from pipeline.config import FileDataConfig, JobConfig, TableDataConfig
from pipeline.config.files import dump_job, list_recipe_sections, resolve_job
from pipeline.errors import WorkError
from pipeline.events import ProgressFn
from pipeline.runs.locate import resolve_storage_url
from pipeline.user_code import collect_user_code

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.setup import PreparedData, TrainingSetup

OVERFIT_STEPS = 2000
OVERFIT_LOSS = 0.01
"""`--overfit` succeeds below this loss: a probability of 0.99 for the right class on average."""

LOSS_TOLERANCE = 1e-3
"""`--batch` warns if an update raises the loss by more than this fraction: less may be rounding."""


@dataclass(frozen=True)
class CheckResult:
    """The result of `check`, with `batch` and `overfit` if they were requested.

    recipe_sections: the sections that the job file leaves out, which are those of the recipe for its data.
    columns: how each column of a table is read.
    """

    job: JobConfig
    recipe_sections: tuple[str, ...] = ()
    columns: tuple[ColumnUse, ...] = ()
    batch: dict[str, Any] | None = None
    overfit: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "job": self.job.to_dict(),
            "recipe": list(self.recipe_sections),
            "columns": [column.to_json() for column in self.columns],
            "batch": self.batch,
            "overfit": self.overfit,
            "warnings": list(self.warnings),
            "error": None,
        }

    def format_lines(self) -> list[str]:
        lines = [f"warning: {text}" for text in self.warnings]
        table = format_column_table(self.columns) if self.columns else []
        if self.batch is None and self.overfit is None:
            if self.recipe_sections:
                lines += [f"the recipe for this kind of data: {', '.join(self.recipe_sections)}"]
            comments = [*lines, *([""] if lines and table else []), *table]
            return [*dump_job(self.job).rstrip().splitlines(), *(f"# {text}".rstrip() for text in comments)]
        lines += table
        if self.batch is not None:
            section = self.batch
            lines += ["parameters"]
            width = max((len(name) for name, _ in section["parameters"]), default=0)
            lines += [f"  {name.ljust(width)}  {_format_shape(shape)}" for name, shape in section["parameters"]]
            lines += [
                f"  {section['parameter_count']:,} in total",
                f"samples    {', '.join(f'{split} {count:,}' for split, count in section['rows'].items())}",
                f"steps      {section['steps_per_epoch']:,} per epoch, {section['total_steps']:,} in total",
                f"batch      inputs {_format_shape(section['inputs'])} {section['input_type']}, targets "
                f"{_format_shape(section['targets'])}, on {section['device']}",
                f"outputs    {_format_shape(section['outputs'])}, untrained: from {section['lowest']:.4f} to "
                f"{section['highest']:.4f}, mean {section['mean']:.4f}",
                f"loss       {section['loss_before']:.4f} before one step, {section['loss_after']:.4f} after it, "
                f"with learning rate {section['lr']:g}",
            ]
        if self.overfit is not None:
            section = self.overfit
            lines += [
                f"overfit    one batch of {section['rows']} samples: loss {section['loss']:.4f} after "
                f"{section['steps']} steps"
            ]
        return lines


def check(
    job: JobConfig | Mapping[str, Any] | str | Path,
    set: Iterable[str] = (),  # noqa: A002 - the public name of the option
    *,
    storage: str | None = None,
    batch: bool = False,
    overfit: bool = False,
    on_progress: ProgressFn = lambda text: None,
) -> CheckResult:
    """Validate a job, and check that the data at its `data.url` exists and is of the right kind; of a table, read all
    rows and describe each column. With `batch` or `overfit`, also load the data and build the model.

    Parameters
    ----------
    job: a job file, its content as a dict, or a `JobConfig`.
    set: overrides as `KEY=VALUE`.
    storage: URL of the runs; default: TRAINYARD_STORAGE, else the job's.
    batch: run the first batch through the model, and report shapes, parameters and the loss before and after one step.
    overfit: train on the first batch alone.
    on_progress: called with a progress message, at most once a second.

    Raises
    ------
    InputError: a job or data that cannot be used.
    WorkError: with `overfit`, the loss did not get near zero.
    """
    where = str(job) if isinstance(job, (str, Path)) else "job"
    overrides = list(set)
    sections = tuple(list_recipe_sections(job, overrides))
    job = resolve_job(job, overrides)
    job = job.model_copy(update={"storage": resolve_storage_url(storage, job.storage)})
    if not (batch or overfit):
        if isinstance(job.data, FileDataConfig):
            from pipeline.data.sources import check_data_exists

            check_data_exists(job)
        columns, warnings = describe_columns(job, on_progress) if isinstance(job.data, TableDataConfig) else ([], [])
        return CheckResult(job, sections, tuple(columns), warnings=tuple(warnings))
    from pipeline.device import restore_torch_settings
    from pipeline.setup import build_training, prepare_data
    from pipeline.setup.initial_weights import find_initial_weights

    code = collect_user_code(job)
    with code.activated(), restore_torch_settings():
        prepared = prepare_data(job, initial_weights=find_initial_weights(job, job.storage), code=code)
        inspected = _inspect_batch(prepared, build_training(prepared)) if batch else None
        return CheckResult(
            job,
            sections,
            (),
            inspected,
            _overfit_batch(prepared, build_training(prepared), where) if overfit else None,
            (*prepared.warnings, *(_divergence_warnings(job, inspected) if inspected is not None else ())),
        )


def _load_first_batch(prepared: PreparedData, built: TrainingSetup) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of the first training batch, on the device."""
    from pipeline.setup import build_train_loader

    batch = next(iter(build_train_loader(prepared, built, first_step=1, last_step=1)))
    return batch.inputs, batch.targets


def _inspect_batch(prepared: PreparedData, built: TrainingSetup) -> dict[str, Any]:
    engine, schedule = built.engine, prepared.schedule
    inputs, targets = _load_first_batch(prepared, built)
    first_inputs, first_targets = inputs[:: engine.members], targets[:: engine.members]  # of the first member
    outputs = engine.predict_logits(first_inputs).float()
    before = _run_step(built, 1, inputs, targets, schedule.lr_at(1))
    engine.forward_backward(1, inputs, targets)
    after = float(engine.flat.loss_sums[0] / engine.flat.loss_sums[1])
    model = engine.flat.model
    return {
        "parameters": [(name, list(tensor.shape)) for name, tensor in model.named_parameters()],
        "parameter_count": sum(tensor.numel() for tensor in model.parameters()),
        "rows": {split: len(rows) for split, rows in prepared.splits.items()},
        "steps_per_epoch": schedule.steps_per_epoch,
        "total_steps": schedule.last_step,
        "inputs": list(first_inputs.shape),
        "input_type": str(inputs.dtype).removeprefix("torch."),
        "targets": list(first_targets.shape),
        "device": str(built.device),
        "outputs": list(outputs.shape),
        "lowest": float(outputs.min()),
        "highest": float(outputs.max()),
        "mean": float(outputs.mean()),
        "loss_before": before,
        "loss_after": after,
        "lr": schedule.lr_at(1),
    }


def _divergence_warnings(job: JobConfig, batch: Mapping[str, Any]) -> list[str]:
    """Return a warning if one update raises the loss of the batch that it was computed on."""
    from pipeline.training.divergence import suggest_stable_settings

    before, after = batch["loss_before"], batch["loss_after"]
    if math.isfinite(after) and after <= before * (1 + LOSS_TOLERANCE):
        return []
    return [
        f"one update raises the loss of its own batch from {before:.4g} to {after:.4g}, so that training may diverge: "
        f"{suggest_stable_settings(job, 1)}"
    ]


def _overfit_batch(prepared: PreparedData, built: TrainingSetup, where: str) -> dict[str, Any]:
    """Train on the first batch alone, with the job's optimizer and first learning rate.

    Raises
    ------
    WorkError: the loss is not below `OVERFIT_LOSS` after `OVERFIT_STEPS` steps.
    """
    inputs, targets = _load_first_batch(prepared, built)
    num_rows = len(targets) // built.engine.members
    lr = prepared.job.train.phases[0].lr
    loss, step = float("inf"), 0
    while loss >= OVERFIT_LOSS and step < OVERFIT_STEPS:
        step += 1
        loss = _run_step(built, step, inputs, targets, lr)
        if loss != loss:
            break
    if not loss < OVERFIT_LOSS:
        raise WorkError(
            f"one batch of {num_rows} samples cannot be overfitted: its loss is {loss:.4f} after {step} steps "
            f"with learning rate {lr:g}",
            where=where,
            fix="try another learning rate (train.phases.0.lr) or a larger model, or look for contradictory labels",
        )
    return {"rows": num_rows, "steps": step, "loss": loss, "lr": lr}


def _run_step(built: TrainingSetup, step: int, inputs: Tensor, targets: Tensor, lr: float) -> float:
    """Run one optimizer step and return the loss before it."""
    engine = built.engine
    engine.forward_backward(step, inputs, targets)
    loss = float(engine.flat.loss_sums[0] / engine.flat.loss_sums[1])
    engine.optimizer_step(lr)
    return loss


def _format_shape(shape: Iterable[int]) -> str:
    return " x ".join(str(size) for size in shape)
