"""Where in its batches a rank failed, and what to lower where memory ran out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pipeline import device as devices
from pipeline.context import Context, PeerLost
from pipeline.errors import OutOfMemoryError, TrainyardError
from pipeline.job import Job
from pipeline.loop import Batch


class Followed:
    """The batches of a rank, and the step of the one that was handed out last."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self._step: int | None = None
        self._rows = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            self._step, self._rows = batch.step, len(batch.inputs)
            yield batch

    @contextmanager
    def saying_where(self, job: Job, context: Context, device: str) -> Iterator[None]:
        """Note on an error which step it was in; make one of memory say what to lower."""
        try:
            yield
        except (TrainyardError, PeerLost):
            raise
        except Exception as error:
            error.__dict__["step"] = self._step  # for who looks whether it repeats itself
            if not devices.is_out_of_memory(error):
                raise
            of_rank = f" of rank {context.rank}" if context.world_size > 1 else ""
            piece = min(self._rows, job.train.micro_batch or self._rows)
            raise OutOfMemoryError(
                f"out of memory on {device}{of_rank}, with pieces of {piece} samples"
                f" ({str(error).strip().partition(chr(10))[0][:200] or type(error).__name__})",
                where=f"train.batch_size: {job.train.batch_size}",
                fix=f"set train.micro_batch: {max(1, piece // 2)} for the same result from smaller pieces,"
                " or lower train.batch_size; in an evaluation data.loader.eval_batch_size",
            ) from error
