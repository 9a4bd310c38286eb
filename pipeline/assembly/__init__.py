"""From a job to what trains it: data, splits, plan, model and loaders. The same for every verb that needs them."""

from pipeline.assembly.built import TrainingSetup, build_training
from pipeline.assembly.fitting import check_state_dict
from pipeline.assembly.loaders import build_eval_loader, build_train_loader
from pipeline.assembly.prepared import PreparedData, ProgressFn, load_stored_transforms, prepare_all_rows, prepare_data

__all__ = [
    "TrainingSetup",
    "PreparedData",
    "ProgressFn",
    "build_training",
    "check_state_dict",
    "build_eval_loader",
    "prepare_data",
    "prepare_all_rows",
    "load_stored_transforms",
    "build_train_loader",
]
