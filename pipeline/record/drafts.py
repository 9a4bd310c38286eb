"""What a checkpoint holds, before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from pipeline.record import saving
from pipeline.record.cells import Rows
from pipeline.record.entries import BestSoFar
from pipeline.record.snapshot import Snapshot
from pipeline.record.values import to_json


class Draft(NamedTuple):
    """What `saving.write_checkpoint` takes."""

    name: str
    files: Mapping[str, bytes]
    facts: Mapping[str, Any]


class Drafter:
    """Makes the drafts of one attempt.

    Parameters
    ----------
    run, attempt: whose checkpoints they are.
    rows: those that no complete cell in storage holds yet, as they are at the moment of each draft.
    """

    def __init__(self, run: str, attempt: int, rows: Rows) -> None:
        self._run = run
        self._attempt = attempt
        self._rows = rows

    def draft(self, snapshot: Snapshot, best: BestSoFar | None, name: str) -> Draft:
        """The checkpoint that a resume goes on from."""
        files = {
            saving.WEIGHTS: saving.encode_tensors(snapshot.weights),
            saving.STATE: saving.encode_tensors(snapshot.state),
            saving.ROWS: self._rows.pack(),
            saving.PREPROCESS: json_file(snapshot.preprocess),
        }
        return Draft(name, files, self._facts(snapshot, best, step=snapshot.step, end=snapshot.end))

    def best_draft(self, snapshot: Snapshot, best: BestSoFar) -> Draft:
        """That of the best so far, which was handed over with a later snapshot."""
        assert snapshot.best_weights is not None
        files = {
            saving.WEIGHTS: saving.encode_tensors(snapshot.best_weights),
            saving.PREPROCESS: json_file(snapshot.preprocess),
        }
        metrics = {**best.metrics, best.metric: best.value}
        metadata = self._facts(snapshot, best, step=best.step, end=False) | {"metrics": metrics}
        return Draft(best.checkpoint, files, metadata)

    def _facts(self, snapshot: Snapshot, best: BestSoFar | None, *, step: int, end: bool) -> dict[str, Any]:
        return {
            "run": self._run,
            "attempt": self._attempt,
            "step": step,
            "epoch": snapshot.epoch,
            "end": end,
            "position": snapshot.position,
            "patience": snapshot.patience,
            "metrics": snapshot.metrics,
            "best": asdict(best) if best is not None else None,
            "first_cell": self._rows.first_cell,
        }


def with_best_of(failed: Snapshot, snapshot: Snapshot) -> Snapshot:
    """A snapshot with the weights of its best, where those were handed over with a commit that failed."""
    best, failed_best = snapshot.best, failed.best
    if best is None or failed_best is None or best.step != failed_best.step or snapshot.best_weights is not None:
        return snapshot
    return replace(snapshot, best_weights=failed.weights if failed.step == best.step else failed.best_weights)


def json_file(value: Any) -> bytes:
    """Plain values as a file."""
    return (to_json(value if value is not None else {}, indent=1) + "\n").encode()
