"""The snapshot that training provides for a checkpoint, and the files made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.runs.checkpoints import format as checkpoint_format
from pipeline.runs.journal.entries import BestCheckpoint
from pipeline.runs.serialization import to_json

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.runs.metric_log.segments import PendingRows


@dataclass
class Snapshot:
    """The content of a checkpoint without the metric rows. Tensors are copies on the CPU that the writer may keep."""

    step: int
    epoch: int
    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    """The remaining training state, such as the optimizer's momentum."""
    position: dict[str, Any]
    """Plain values for the worker that resumes from here."""
    metrics: dict[str, float]
    """Of the latest evaluation of each split, such as "val/loss"."""
    best: BestCheckpoint | None = None
    """The best evaluation so far; its `checkpoint` is set by the writer."""
    best_weights: dict[str, Tensor] | None = None
    """Set if the best is neither at this step nor in an earlier commit."""
    preprocess: dict[str, Any] | None = None
    is_final: bool = False
    """Whether training ends at this step, also for every later attempt."""
    evaluations_since_best: int | None = None
    """Evaluations since the best one."""

    @property
    def skipped_updates(self) -> int | None:
        """For fp16: updates skipped since the start of the run because their gradient was not finite."""
        count = self.state.get("scale.skipped")
        return None if count is None else int(count)

    def find_nonfinite_tensor(self) -> str | None:
        """Return the name of the first weight tensor that contains NaN or infinity."""
        import torch

        for name, tensor in (*self.weights.items(), *(self.best_weights or {}).items()):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return name
        return None


class CheckpointFiles(NamedTuple):
    """The arguments of `format.write_checkpoint`."""

    name: str
    files: Mapping[str, bytes]
    metadata: Mapping[str, Any]


class CheckpointFilesBuilder:
    """Build the checkpoint files of one attempt.

    Parameters
    ----------
    run, attempt: names of the run and number of the attempt, for the manifest.
    rows: the rows that are not yet in a complete segment in storage, read at each `build`.
    """

    def __init__(self, run: str, attempt: int, rows: PendingRows) -> None:
        self._run = run
        self._attempt = attempt
        self._rows = rows

    def build(self, snapshot: Snapshot, best: BestCheckpoint | None, name: str) -> CheckpointFiles:
        """Build a checkpoint that a resume can start from."""
        files = {
            checkpoint_format.WEIGHTS_FILE: checkpoint_format.encode_tensors(snapshot.weights),
            checkpoint_format.STATE_FILE: checkpoint_format.encode_tensors(snapshot.state),
            checkpoint_format.ROWS_FILE: self._rows.to_parquet(),
            checkpoint_format.PREPROCESS_FILE: encode_json_file(snapshot.preprocess),
        }
        return CheckpointFiles(
            name, files, self._build_metadata(snapshot, best, step=snapshot.step, is_final=snapshot.is_final)
        )

    def build_best(self, snapshot: Snapshot, best: BestCheckpoint) -> CheckpointFiles:
        """Build the checkpoint of the best so far, whose weights were provided with a later snapshot."""
        assert snapshot.best_weights is not None
        files = {
            checkpoint_format.WEIGHTS_FILE: checkpoint_format.encode_tensors(snapshot.best_weights),
            checkpoint_format.PREPROCESS_FILE: encode_json_file(snapshot.preprocess),
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
    """Add the weights of the best to a snapshot if they were provided with a commit that failed."""
    best, failed_best = snapshot.best, failed.best
    if best is None or failed_best is None or best.step != failed_best.step or snapshot.best_weights is not None:
        return snapshot
    return replace(snapshot, best_weights=failed.weights if failed.step == best.step else failed.best_weights)


def encode_json_file(value: Any) -> bytes:
    """Return plain values as the content of a JSON file."""
    return (to_json(value if value is not None else {}, indent=1) + "\n").encode()
