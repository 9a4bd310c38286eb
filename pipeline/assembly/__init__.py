"""From a job to what trains it: data, splits, plan, model and loaders. The same for every verb that needs them."""

from pipeline.assembly.built import Built, build
from pipeline.assembly.fitting import check_weights
from pipeline.assembly.loaders import eval_loader, train_loader
from pipeline.assembly.prepared import Prepared, Say, prepare, prepare_rows, stored_transforms

__all__ = [
    "Built",
    "Prepared",
    "Say",
    "build",
    "check_weights",
    "eval_loader",
    "prepare",
    "prepare_rows",
    "stored_transforms",
    "train_loader",
]
