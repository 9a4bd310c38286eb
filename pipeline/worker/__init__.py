"""What one worker does for one attempt: build, claim, restore, train, and leave the record in order."""

from pipeline.worker.exit_entry import record_driver_exit
from pipeline.worker.spec import WorkerSpec
from pipeline.worker.worker import hang_limits, run_worker

__all__ = ["WorkerSpec", "hang_limits", "run_worker", "record_driver_exit"]
