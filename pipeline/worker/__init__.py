"""What one worker does for one attempt: build, claim, restore, train, and leave the record in order."""

from pipeline.worker.leaving import say_for_the_dead
from pipeline.worker.order import Order
from pipeline.worker.working import hang_limits, run_worker

__all__ = ["Order", "hang_limits", "run_worker", "say_for_the_dead"]
