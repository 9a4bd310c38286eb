"""What a checkpoint holds, before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from pipeline.record import saving
from pipeline.record.cells import PendingRows
from pipeline.record.entries import BestCheckpoint
from pipeline.record.snapshot import Snapshot
from pipeline.record.values import to_json


class CheckpointFiles(NamedTuple):
    """What `saving.write_checkpoint` takes."""

    name: str
    files: Mapping[str, bytes]
    metadata: Mapping[str, Any]


class CheckpointFilesBuilder:
    """Makes the drafts of one attempt.

    Parameters
    ----------
    run, attempt: whose checkpoints they are.
    rows: those that no complete cell in storage holds yet, as they are at the moment of each draft.
    """

    def __init__(self, run: str, attempt: int, rows: PendingRows) -> None:
        self._run = run
        self._attempt = attempt
        self._rows = rows

    def build(self, snapshot: Snapshot, best: BestCheckpoint | None, name: str) -> CheckpointFiles:
        """The checkpoint that a resume goes on from."""
        files = {
            saving.WEIGHTS_FILE: saving.encode_tensors(snapshot.weights),
            saving.STATE_FILE: saving.encode_tensors(snapshot.state),
            saving.ROWS_FILE: self._rows.to_parquet(),
            saving.PREPROCESS_FILE: encode_json_file(snapshot.preprocess),
        }
        return CheckpointFiles(
            name, files, self._build_metadata(snapshot, best, step=snapshot.step, is_final=snapshot.is_final)
        )

    def build_best(self, snapshot: Snapshot, best: BestCheckpoint) -> CheckpointFiles:
        """That of the best so far, which was handed over with a later snapshot."""
        assert snapshot.best_weights is not None
        files = {
            saving.WEIGHTS_FILE: saving.encode_tensors(snapshot.best_weights),
            saving.PREPROCESS_FILE: encode_json_file(snapshot.preprocess),
        }
        metrics = {**best.metrics, best.metric: best.value}
        metadata = self._build_metadata(snapshot, best, step=best.step, is_final=False) | {"metrics": metrics}
        return CheckpointFiles(best.checkpoint, files, metadata)

    def _build_metadata(
        self, snapshot: Snapshot, best: BestCheckpoint | None, *, step: int, is_final: bool
    ) -> dict[str, Any]:
        return {
            "run": self._run,
            "attempt": self._attempt,
            "step": step,
            "epoch": snapshot.epoch,
            "end": is_final,
            "position": snapshot.position,
            "patience": snapshot.evaluations_since_best,
            "metrics": snapshot.metrics,
            "best": asdict(best) if best is not None else None,
            "first_cell": self._rows.first_segment,
        }


def adopt_best_weights(failed: Snapshot, snapshot: Snapshot) -> Snapshot:
    """A snapshot with the weights of its best, where those were handed over with a commit that failed."""
    best, failed_best = snapshot.best, failed.best
    if best is None or failed_best is None or best.step != failed_best.step or snapshot.best_weights is not None:
        return snapshot
    return replace(snapshot, best_weights=failed.weights if failed.step == best.step else failed.best_weights)


def encode_json_file(value: Any) -> bytes:
    """Plain values as a file."""
    return (to_json(value if value is not None else {}, indent=1) + "\n").encode()
