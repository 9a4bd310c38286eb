"""From a job to its data, splits, schedule, model and loaders. Used by every command that needs them."""

from pipeline.setup.data import PreparedData, load_stored_transforms, prepare_all_rows, prepare_data
from pipeline.setup.model import TrainingSetup, build_eval_loader, build_train_loader, build_training, check_state_dict

__all__ = [
    "TrainingSetup",
    "PreparedData",
    "build_training",
    "check_state_dict",
    "build_eval_loader",
    "prepare_data",
    "prepare_all_rows",
    "load_stored_transforms",
    "build_train_loader",
]
