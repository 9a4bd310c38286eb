"""A worker under the eyes of its watchdog."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from pipeline.context import Context
from pipeline.record.run import Run
from pipeline.storage.faults import longest_request_s, usual_limit_s
from pipeline.storage.remote import PART_BYTES
from pipeline.watchdog import Limits, Stacks, Watchdog
from pipeline.worker.order import Order


def limits(hang_s: float) -> Limits:
    """How long a process may stand still. Storage that is away is given up before, by itself: at its own limit, once
    the request that was under way then has failed too."""
    return Limits(hang_s, storage_s=usual_limit_s() + longest_request_s(2 * PART_BYTES))


def watched(order: Order, context: Context, run: Run) -> AbstractContextManager[object]:
    """Have this thread watched, where the job wants it."""
    hang_s = order.job.scale.hang_s
    if hang_s is None:
        return nullcontext()
    stacks = Stacks(run.url, context.rank, run.write_stacks, save_s=min(10.0, 3 * hang_s))
    return Watchdog(context, limits(hang_s), stacks, where=run.url, answers=lambda: run.storage.answers)
