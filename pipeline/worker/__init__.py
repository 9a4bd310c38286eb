"""What one worker does for one attempt: build, claim, restore, fit, and leave the record in order."""

from pipeline.worker.leaving import say_for_the_dead
from pipeline.worker.order import Order
from pipeline.worker.watched import limits
from pipeline.worker.working import work

__all__ = ["Order", "limits", "say_for_the_dead", "work"]
