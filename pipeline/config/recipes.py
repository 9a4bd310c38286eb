"""What a job file leaves out depends on its data: the recipe of each kind of data, and the rule that fills it in.

The rule goes by section. A section that the job file leaves out is that of the recipe for its data; one that it gives,
however short, has the defaults of its class for the rest. The sections are `data.normalize`, `model`, `best`,
`train.batch_size`, and `train.optimizer` together with `train.phases`, because a learning rate belongs to its
optimizer. Overrides (`--set`) change the result. The rule is applied where a job file or mapping is read; stored jobs
have every section.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pipeline.config.data import SOURCE_CONFIGS, ImageFolderDataConfig, NamedDataConfig, TableDataConfig

AUTO_BATCH_SIZES = ((2_800, 32), (4_500, 64), (6_400, 128))
"""`train.batch_size: auto`: with fewer training rows than the first number, the second; `LARGEST_AUTO_BATCH` from the
last one on (TabM's rule, arXiv 2410.24210)."""

LARGEST_AUTO_BATCH = 256

PATIENCE_EPOCHS = 20


@dataclass(frozen=True)
class Recipe:
    """The sections that a job on one kind of data gets if its file leaves them out.

    kind: the kind of data, for messages.
    normalize: `data.normalize`; None: its default.
    model: `model`.
    optimizer, phases: `train.optimizer` and `train.phases`.
    batch_size: `train.batch_size`.
    patience: `best.patience`, which counts evaluations: only if there is one of a validation split after each epoch.
        None: `best` has the defaults of its class.
    """

    kind: str
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    phases: tuple[Mapping[str, Any], ...]
    batch_size: int | str
    patience: int | None = None
    normalize: str | None = None


TABLE_RECIPE = Recipe(
    kind="tables",
    model={
        "kind": "mlp",
        "hidden": [256, 128],
        "activation": "relu",
        "dropout": 0.1,
        "ensemble": 8,
        "numeric_embedding": "periodic",
    },
    optimizer={"kind": "adamw", "weight_decay": 0.01, "decay": "weights"},
    phases=({"epochs": 80, "lr": 0.002, "schedule": "cosine"},),
    batch_size="auto",
    patience=PATIENCE_EPOCHS,
    normalize="robust",
)


IMAGE_RECIPE = Recipe(
    kind="images",
    model={
        "kind": "cnn",
        "conv": [
            {"channels": 16, "kernel": 3, "padding": 1, "pool": 2},
            {"channels": 32, "kernel": 3, "padding": 1, "pool": 2},
        ],
        "hidden": [128],
        "batch_norm": True,
        "dropout": 0.1,
    },
    optimizer={"kind": "adamw", "weight_decay": 0.01, "decay": "weights"},
    phases=({"epochs": 10, "lr": 0.003, "schedule": "one_cycle"},),
    batch_size="auto",
)
"""Measured on validation rows: MNIST, accuracy 0.990 in 121 s of one core, one seed (an MLP of 32 in two phases of SGD:
0.965 in 5 s); the 1,797 digits of scikit-learn as files, 0.983 to 0.993 in 5 s with start-up, three seeds (the MLP:
0.922 to 0.944 in 4 s). Channels of 32 and 64: digits 0.993 to 0.996, with three times the time per image."""


def find_recipe(data: Any) -> Recipe | None:
    """Return the recipe for the `data` of a job file; None if the defaults of the classes apply: for data that is
    generated or returned by a function, and for tables whose samples are one column with a `shape`."""
    if not isinstance(data, Mapping):
        return None
    source = data.get("source", "mnist")
    if isinstance(source, Mapping) and data.get("label") is not None:
        return TABLE_RECIPE if data.get("shape") is None else None
    config = SOURCE_CONFIGS.get(source) if isinstance(source, str) else None
    if config is not None and issubclass(config, TableDataConfig):
        return TABLE_RECIPE if data.get("shape") is None else None
    is_images = config is not None and issubclass(config, NamedDataConfig | ImageFolderDataConfig)
    return IMAGE_RECIPE if is_images else None


def fill_in_recipe(tree: dict[str, Any]) -> list[str]:
    """Add the sections that a job's tree leaves out, in place, and return their names, such as `train.batch_size`.

    A tree that is not one of a job is left to the validation.
    """
    recipe, train = find_recipe(tree.get("data", {})), tree.get("train", {})
    if recipe is None or not isinstance(train, dict):
        return []
    sections: dict[str, Any] = {}
    if recipe.normalize is not None and "normalize" not in tree["data"]:
        sections["data.normalize"] = recipe.normalize
        tree["data"] = {**tree["data"], "normalize": recipe.normalize}
    if "model" not in tree:
        sections["model"] = tree["model"] = deepcopy(dict(recipe.model))
    if not {"optimizer", "phases"} & set(train):
        added = {"optimizer": dict(recipe.optimizer), "phases": [dict(phase) for phase in recipe.phases]}
        sections |= {f"train.{name}": value for name, value in added.items()}
        tree["train"] = train = {**train, **added}
    if "batch_size" not in train:
        sections["train.batch_size"] = recipe.batch_size
        tree["train"] = {**train, "batch_size": recipe.batch_size}
    if "best" not in tree and recipe.patience is not None:
        patience = recipe.patience if _is_validated_each_epoch(tree) else None
        sections["best"] = tree["best"] = {"metric": "val/loss", "patience": patience}
    return list(sections)


def leave_out_replaced(tree: dict[str, Any], filled: list[str], overrides: Iterable[str]) -> list[str]:
    """Empty the filled sections, in place, that an override gives as a whole or of which it chooses another `kind`: the
    other keys of the recipe are not wanted or do not fit. Returns the names of the sections that remain."""
    emptied = []
    for override in overrides:
        path, _, value = (part.strip() for part in override.partition("="))
        section = path.removesuffix(".kind")
        *parents, name = section.split(".")
        holder = tree
        for parent in parents if section in filled else ():
            holder = holder[parent]
        below = holder.get(name)
        if section in filled and isinstance(below, dict) and (section == path or below.get("kind") != value):
            holder[name] = {}
            emptied.append(section)
    return [section for section in filled if section not in emptied]


def auto_batch_size(num_rows: int) -> int:
    """Return what `train.batch_size: auto` means for a number of training rows."""
    return next((size for rows, size in AUTO_BATCH_SIZES if num_rows < rows), LARGEST_AUTO_BATCH)


def _is_validated_each_epoch(tree: Mapping[str, Any]) -> bool:
    """Return whether the validation split, if the job's file asks for one, is evaluated after each epoch."""
    evaluate, splits = tree.get("evaluate", {}), tree.get("data", {}).get("splits", {})
    if not isinstance(evaluate, Mapping) or not isinstance(splits, Mapping):
        return False
    is_each_epoch = evaluate.get("every_steps") is None and evaluate.get("every_epochs") in (None, 1)
    has_validation = splits.get("val") is not None if splits.get("by") == "range" else splits.get("val") != 0
    return is_each_epoch and has_validation and "val" in (evaluate.get("splits") or ["val"])
