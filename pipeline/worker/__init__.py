"""What one rank does in one attempt: build, claim, restore, train, report; and the journal entry if it stops early."""

from pipeline.worker.exit_entry import record_driver_exit
from pipeline.worker.spec import WorkerSpec
from pipeline.worker.worker import hang_limits, run_worker

__all__ = ["WorkerSpec", "hang_limits", "run_worker", "record_driver_exit"]
