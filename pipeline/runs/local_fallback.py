"""Save a checkpoint on this machine when the run's storage is lost, and resume from it in the next attempt.

`<spool>/<digest of the run's URL>/<run>/` is a small run directory: the job, a journal that commits one checkpoint, and
`spool.json`, which names the checkpoints that it may follow. `load` opens it by its path. The checkpoint is not part of
the run until a later attempt commits it to the run's journal.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StorageError, StorageLostError, TrainyardError
from pipeline.runs.checkpoints import format as checkpoint_format
from pipeline.runs.checkpoints.checkpoint import Checkpoint, DamagedError
from pipeline.runs.checkpoints.snapshot import Snapshot
from pipeline.runs.journal.entries import BestCheckpoint, CheckpointPair, Claim, Commit, JournalState
from pipeline.runs.run import JOB_FILE, Run
from pipeline.runs.serialization import from_json, to_json, utc_now
from pipeline.storage import Storage

if TYPE_CHECKING:
    from pipeline.runs.checkpoints.snapshot import CheckpointFiles

StorageFailure = StorageLostError | StorageError
"""Storage was unavailable for too long, or fails permanently."""

SPOOL_VARIABLE = "TRAINYARD_SPOOL"
SPOOL_FILE = "spool.json"


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint that was saved on this machine, if it can be resumed from.

    checkpoint: None if nothing was saved, or if the run has progressed since.
    message: a sentence for the user; empty if nothing was saved.
    """

    checkpoint: Checkpoint | None = None
    message: str = ""


def spool_folder() -> Path:
    """Return TRAINYARD_SPOOL, else ~/.cache/trainyard/spool (below XDG_CACHE_HOME if that is set)."""
    chosen = os.environ.get(SPOOL_VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen or f"{cache}/trainyard/spool").expanduser().absolute()


def save_locally(
    run: Run,
    snapshot: Snapshot,
    checkpoint_files: CheckpointFiles,
    best_files: CheckpointFiles | None,
    allowed_heads: Sequence[str | None],
    *,
    nonce: str,
    attempt: int,
) -> Path:
    """Save a snapshot on this machine, replacing an earlier one of this run.

    Parameters
    ----------
    checkpoint_files: the checkpoint of the snapshot.
    best_files: the checkpoint of the best evaluation so far, if its weights are neither in a committed checkpoint nor
        those of the snapshot.
    allowed_heads: the checkpoints that the newest commit may have if no other attempt has written since; None stands
        for no commit.
    nonce, attempt: of the attempt that saves it.

    Returns
    -------
    The run directory on this machine.

    Raises
    ------
    TrainyardError, OSError: this machine has no space or no folder for it.
    """
    local_run = _open_local_run(run)
    folder = local_run.storage.local_path
    assert folder is not None
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if local_run.exists() and not _is_same_run(local_run, run):
        shutil.rmtree(folder)
        local_run = _open_local_run(run)
    text = run.read_job_yaml()  # cached since the start of the attempt: no request to storage
    local_run.storage.create(JOB_FILE, text.encode())
    best = snapshot.best
    best_name = checkpoint_files.name if best is not None and best.step == snapshot.step else None
    if best_files is not None:
        best_name = best_files.name
        checkpoint_format.write_checkpoint(local_run.storage, *best_files)
    checkpoint_format.write_checkpoint(local_run.storage, *checkpoint_files)
    entry_fields: dict[str, Any] = {"nonce": nonce, "time": utc_now(), "attempt": attempt}
    state = local_run.journal.read_state()
    if state.claim is None or state.claim.nonce != nonce:
        local_run.journal.append(Claim(**entry_fields, number=state.number + 1, before=state))
        state = local_run.journal.read_state()
    pair: CheckpointPair = (checkpoint_files.name, best_name)
    commit = Commit(
        **entry_fields,
        number=state.number + 1,
        before=state,
        checkpoint=checkpoint_files.name,
        step=snapshot.step,
        epoch=snapshot.epoch,
        end=snapshot.is_final,
        kept=(pair,),
        best=replace(best, checkpoint=best_name) if best is not None and best_name is not None else None,
        metrics=dict(snapshot.metrics),
        patience=snapshot.evaluations_since_best,
    )
    local_run.journal.append(commit)
    tree = {"url": run.url, "checkpoint": checkpoint_files.name, "best": best_name, "after": list(allowed_heads)}
    local_run.storage.replace(SPOOL_FILE, to_json(tree, indent=1).encode(), sync=True)
    for old in local_run.storage.list(checkpoint_format.CHECKPOINTS_FOLDER):
        if old not in pair:
            checkpoint_format.delete_checkpoint(local_run.storage, old)
    return folder


def find_local_checkpoint(run: Run, resume_checkpoint: Checkpoint | None, state: JournalState) -> LocalCheckpoint:
    """Return the checkpoint that an earlier attempt saved on this machine, if this attempt may resume from it: it must
    follow the committed checkpoint that this attempt resumes from, and be ahead of everything ever committed.

    Parameters
    ----------
    resume_checkpoint: the committed checkpoint to resume from.
    state: the state of the run's journal.
    """
    local_run = _open_local_run(run)
    folder = local_run.storage.local_path
    if folder is None or not (folder / SPOOL_FILE).is_file():
        return LocalCheckpoint()
    prefix = f"{folder} contains a checkpoint that an earlier attempt saved when storage was lost; it is not used: "
    try:
        tree = from_json(local_run.storage.read(SPOOL_FILE))
        if not _is_same_run(local_run, run):
            return LocalCheckpoint(None, f"{prefix}it belongs to another run of this name")
        checkpoint = Checkpoint(local_run, tree["checkpoint"])
        # It was committed, and only its removal is missing.
        if resume_checkpoint is not None and resume_checkpoint.step == checkpoint.step:
            delete_local(run)
            return LocalCheckpoint()
        if (resume_checkpoint.name if resume_checkpoint is not None else None) not in tree["after"]:
            return LocalCheckpoint(None, f"{prefix}the run has since resumed from another checkpoint")
        if checkpoint.step <= state.highest_step or state.ended_at is not None:
            return LocalCheckpoint(None, f"{prefix}the run has since progressed further")
        checkpoint.verify()
    except (DamagedError, ValueError, KeyError, TypeError) as error:
        return LocalCheckpoint(None, f"{prefix}{error.what if isinstance(error, TrainyardError) else 'it is damaged'}")
    return LocalCheckpoint(checkpoint, f"resuming from step {checkpoint.step}, saved in {folder} when storage was lost")


def has_pickled_state(run: Run) -> bool:
    """Whether an earlier version saved a checkpoint of this run on this machine."""
    local_run = _open_local_run(run)
    folder = local_run.storage.local_path
    if folder is None or not (folder / SPOOL_FILE).is_file():
        return False
    try:
        tree = from_json(local_run.storage.read(SPOOL_FILE))
        return Checkpoint(local_run, tree["checkpoint"]).has_pickled_state
    except (StorageError, ValueError, KeyError, TypeError):
        return False


def load_snapshot(run: Run, checkpoint: Checkpoint) -> Snapshot:
    """Load a local checkpoint as a snapshot to commit."""
    best = checkpoint.best
    has_best_weights = best is not None and best.step != checkpoint.step and _has_best(run, best)
    return Snapshot(
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        weights=checkpoint.load_weights(),
        state=checkpoint.load_state(),
        position=checkpoint.position,
        metrics=checkpoint.metrics,
        best=best,
        best_weights=Checkpoint(_open_local_run(run), best.checkpoint).load_weights()
        if best is not None and has_best_weights
        else None,
        preprocess=checkpoint.load_preprocess(),
        is_final=checkpoint.is_final,
        evaluations_since_best=checkpoint.evaluations_since_best,
    )


def delete_local(run: Run) -> None:
    """Remove the local checkpoint of a run after it was committed."""
    folder = _open_local_run(run).storage.local_path
    assert folder is not None
    shutil.rmtree(folder, ignore_errors=True)


def with_local_copy(
    error: StorageFailure, folder: Path | None, step: int, failure: BaseException | None = None
) -> StorageFailure:
    """Add to an error of storage what happened to the progress since the last commit."""
    kind = type(error)
    if folder is None:
        return kind(
            f"{error.what}; the progress since the last checkpoint could not be saved on this machine ({failure})",
            where=error.where,
            fix=error.fix,
        )
    return kind(
        f"{error.what}; step {step} is saved in {folder} on {socket.gethostname()}",
        where=error.where,
        fix=f"{error.fix}. On that machine the run resumes from step {step}; load({str(folder)!r}) opens the model",
    )


def _open_local_run(run: Run) -> Run:
    digest = hashlib.sha256(run.url.encode()).hexdigest()[:12]
    return Run(Storage.open(str(spool_folder() / digest)), run.name)


def _is_same_run(local_run: Run, run: Run) -> bool:
    """Whether it was saved by this run: the stored job contains the nonce of the run's creation."""
    try:
        return local_run.read_job_yaml() == run.read_job_yaml()
    except (FileNotFoundError, StorageError):
        return False


def _has_best(run: Run, best: BestCheckpoint) -> bool:
    tree = from_json(_open_local_run(run).storage.read(SPOOL_FILE))
    return bool(tree.get("best") == best.checkpoint)
