"""Trainyard's own entries: out of the box, by a job file written by hand, and variants of both.

A method is BASE+OVERRIDE+OVERRIDE...: BASE is `trainyard` (the file and the label, nothing else) or `trainyard-hand`,
an override is a name in `VARIANTS` or KEY=VALUE as for `--set`: `trainyard-hand+ensemble+model.dropout=0.2`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

BASES = ("trainyard", "trainyard-hand")

VARIANTS: dict[str, list[str]] = {
    "ensemble": ["model.ensemble=8"],
    "no_ensemble": ["model.ensemble=1"],
    "periodic": ["model.numeric_embedding=periodic"],
    "piecewise": ["model.numeric_embedding=piecewise"],
    "no_embedding": ["model.numeric_embedding=none"],
    "standard": ["data.normalize=standard"],
    "robust": ["data.normalize=robust"],
    "quantile": ["data.normalize=quantile"],
    "label_smoothing": ["task.label_smoothing=0.1"],
    "no_label_smoothing": ["task.label_smoothing=0"],
    "silu": ["model.activation=silu"],
    "batch_rule": ["train.batch_size=auto"],
}
"""Overrides by name. Label smoothing is left out for regressions."""


def parse_method(method: str, task: str) -> tuple[str, list[str]]:
    """Return the base of a method and its overrides.

    Raises
    ------
    ValueError: there is no such base or variant.
    """
    base, *parts = method.split("+")
    if base not in BASES:
        raise ValueError(f"no method {method}: Trainyard's begin with {' or '.join(BASES)}")
    overrides: list[str] = []
    for part in parts:
        if "=" not in part and part not in VARIANTS:
            raise ValueError(f"no variant {part} in {method}: choose of {', '.join(VARIANTS)}, or KEY=VALUE")
        if "=" in part:
            overrides.append(part)
        elif "label_smoothing" not in part or task != "regression":
            overrides += VARIANTS[part]
    return base, overrides


def make_job(table: Path, label: str, task: str, seed: int) -> dict[str, Any]:
    """Return the job written by hand, as its tree: two layers of 256 and 128, AdamW, cosine, patience. It names every
    value that matters, so that it stays what it is when a default changes."""
    splits: dict[str, Any] = {"by": "random", "val": 0.2, "test": 0}
    task_tree: dict[str, Any] = {"kind": task}
    if task == "binary":
        task_tree["positive"] = [max(pq.read_table(table, columns=[label])[label].unique().to_pylist())]
    return {
        "schema": 1,
        "name": "hand",
        "seed": seed,
        "data": {
            "source": "parquet",
            "url": str(table),
            "label": label,
            "normalize": "standard",
            "splits": splits if task == "regression" else {**splits, "stratify": True},
        },
        "model": {"kind": "mlp", "hidden": [256, 128], "activation": "relu", "dropout": 0.1},
        "task": task_tree,
        "train": {
            "batch_size": 128,
            "optimizer": {"kind": "adamw", "weight_decay": 0.01},
            "phases": [{"epochs": 80, "lr": 0.002, "schedule": "cosine"}],
        },
        "best": {"metric": "val/loss", "patience": 20},
    }


def train_arguments(method: str, task: str, label: str, seed: int, train: Path, folder: Path) -> list[str]:
    """Return the arguments of `trainyard` that train this method; the job file, if it needs one, goes to `folder`."""
    base, overrides = parse_method(method, task)
    settings = [argument for override in overrides for argument in ("--set", override)]
    if base == "trainyard":
        source = [str(train), "--label", label]
    else:
        job = folder / "job.yaml"
        job.write_text(yaml.safe_dump(make_job(train, label, task, seed), sort_keys=False))
        source = [str(job)]
    return ["train", *source, "--storage", str(folder / "runs"), "--json", "--quiet", *settings]
