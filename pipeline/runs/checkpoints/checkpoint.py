"""Reading checkpoints: every file is verified against the manifest."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pipeline.errors import StorageError
from pipeline.runs.checkpoints.format import (
    CHECKPOINTS_FOLDER,
    MANIFEST_FILE,
    PICKLED_STATE,
    PREPROCESS_FILE,
    ROWS_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    Manifest,
    decode_tensors,
    parse_manifest,
)
from pipeline.runs.journal import decisions
from pipeline.runs.journal.entries import BestCheckpoint, CheckpointPair
from pipeline.runs.run import Run
from pipeline.runs.serialization import from_json

if TYPE_CHECKING:
    from torch import Tensor


class DamagedError(StorageError):
    """A checkpoint that is missing, incomplete or altered."""


class Checkpoint:
    """A checkpoint in storage. Every file is verified against the manifest whenever it is read.

    Parameters
    ----------
    run: the run that contains it.
    name: of its directory, such as "step-000004800-a0001".

    Raises
    ------
    DamagedError: there is no valid manifest.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.name = name
        self.run_url = run.url
        """URL of the run that contains it, printable."""
        self._storage = run.storage.subfolder(f"{CHECKPOINTS_FOLDER}/{name}")
        self._manifest = self._read_manifest()

    def __repr__(self) -> str:
        return f"Checkpoint({self._storage.url!r})"

    @property
    def url(self) -> str:
        """URL of the checkpoint, printable."""
        return self._storage.url

    @property
    def step(self) -> int:
        """The step whose weights it contains."""
        return self._manifest.step

    @property
    def epoch(self) -> int:
        """The epoch at the commit."""
        return self._manifest.epoch

    @property
    def is_final(self) -> bool:
        """Whether training was over."""
        return self._manifest.end

    @property
    def position(self) -> dict[str, Any]:
        """Plain values that the worker provided at the commit."""
        return dict(self._manifest.position)

    @property
    def metrics(self) -> dict[str, float]:
        """The latest evaluation at the commit."""
        return dict(self._manifest.metrics)

    @property
    def best(self) -> BestCheckpoint | None:
        """The best evaluation so far and the checkpoint with its weights; None before the first evaluation."""
        return self._manifest.best

    @property
    def evaluations_since_best(self) -> int | None:
        """Evaluations since the best one."""
        return self._manifest.patience

    @property
    def first_segment(self) -> int:
        """The first segment of the metric log that its rows cover."""
        return self._manifest.first_cell

    @property
    def has_pickled_state(self) -> bool:
        """Whether it was written by an earlier version, with a `state.pt` that this version cannot resume from."""
        return PICKLED_STATE in self._manifest.files and STATE_FILE not in self._manifest.files

    @property
    def files(self) -> list[str]:
        """Names of its files, without the manifest."""
        return list(self._manifest.files)

    def load_weights(self) -> dict[str, Tensor]:
        """Return the model's tensors by name, on the CPU.

        Raises
        ------
        DamagedError: the file is missing, altered or not valid.
        """
        return self._tensors(WEIGHTS_FILE)

    def load_state(self) -> dict[str, Tensor]:
        """Return the remaining training state, such as that of the optimizer: tensors by name, on the CPU.

        Raises
        ------
        DamagedError: the file is missing, altered or not valid.
        """
        return self._tensors(STATE_FILE)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return decode_tensors(self.read(name))
        except ValueError as error:
            raise self._damaged_error(f"{name} is not a valid tensor file ({error})") from None

    def load_preprocess(self) -> dict[str, Any]:
        """Return the preprocessing from raw data to the model's inputs, as plain values."""
        try:
            tree = from_json(self.read(PREPROCESS_FILE))
        except ValueError as error:
            raise self._damaged_error(f"{PREPROCESS_FILE} is not JSON ({error})") from None
        if not isinstance(tree, dict):
            raise self._damaged_error(f"{PREPROCESS_FILE} is not a mapping of names to values")
        return tree

    def read_rows(self) -> bytes:
        """Return `rows.parquet`, for the metric log."""
        return self.read(ROWS_FILE)

    def verify(self) -> None:
        """Read every file and check its size and SHA-256.

        Raises
        ------
        DamagedError: a file is missing or altered.
        """
        for name in self._manifest.files:
            self.read(name)

    def read(self, name: str) -> bytes:
        """Return the content of a file, verified against the manifest.

        Raises
        ------
        DamagedError: it is missing or altered.
        """
        expected = self._manifest.files.get(name)
        if expected is None:
            raise self._damaged_error(f"it contains no {name}")
        try:
            data = self._storage.read(name)
        except FileNotFoundError:
            raise self._damaged_error(f"{name} is missing") from None
        if len(data) != expected.size:
            raise self._damaged_error(f"{name} has {len(data)} bytes instead of {expected.size}")
        if hashlib.sha256(data).hexdigest() != expected.sha256:
            raise self._damaged_error(f"{name} was altered")
        return data

    def _read_manifest(self) -> Manifest:
        try:
            return parse_manifest(self._storage.read(MANIFEST_FILE))
        except FileNotFoundError:
            raise self._damaged_error("it has no manifest") from None
        except ValueError as error:
            raise self._damaged_error(f"its manifest is damaged ({error})") from None

    def _damaged_error(self, what: str) -> DamagedError:
        return DamagedError(f"the checkpoint cannot be used: {what}", where=self._storage.url, fix="use another one")


ResumeCheckpoint = Checkpoint
"""A checkpoint that an attempt resumes from."""


def find_first_valid(run: Run, retained: tuple[CheckpointPair, ...]) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint of the first pair in which both the checkpoint and its best are valid, and the names of the
    invalid ones.

    The best is required because without it the result would differ from that of an undisturbed run.
    """
    verified: dict[str, Checkpoint | None] = {}
    for pair in retained:
        names = [name for name in pair if name is not None]
        for name in names:
            if name not in verified:
                verified[name] = _load_if_valid(run, name)
        if all(verified[name] is not None for name in names):
            return verified[names[0]], _damaged_names(verified)
    return None, _damaged_names(verified)


def has_pickled_state(run: Run, kept: tuple[CheckpointPair, ...]) -> bool:
    """Whether the newest checkpoint that has a valid manifest was written by an earlier version. A run never has
    checkpoints of both formats, because those of earlier versions are not resumed."""
    for name, _ in kept:
        with suppress(DamagedError):
            return Checkpoint(run, name).has_pickled_state
    return False


def _damaged_names(verified: dict[str, Checkpoint | None]) -> list[str]:
    return [name for name, checkpoint in verified.items() if checkpoint is None]


def _load_if_valid(run: Run, name: str) -> Checkpoint | None:
    try:
        checkpoint = Checkpoint(run, name)
        checkpoint.verify()
    except DamagedError:
        return None
    return checkpoint


def find_checkpoint(run: Run, which: str) -> Checkpoint:
    """Find a committed checkpoint by "best", "last" or the number of a step.

    Raises
    ------
    StorageError: there is no such checkpoint (any more), or it is damaged.
    """
    for _ in range(3):  # a checkpoint that vanishes was deleted after a newer commit: retry
        name = _resolve_name(run, which)
        try:
            return Checkpoint(run, name)
        except DamagedError as error:
            failure = error
        if _resolve_name(run, which) == name:
            break
    raise failure


def _resolve_name(run: Run, which: str) -> str:
    commit = run.journal.read_state().commit
    if commit is None:
        raise StorageError("the run has no checkpoint yet", where=run.url, fix="wait for the first commit")
    if which == "last":
        return commit.checkpoint
    if which == "best":
        return commit.best.checkpoint if commit.best is not None else commit.checkpoint
    parsed_names = {
        name: decisions.parse_checkpoint_name(name) for pair in commit.kept for name in pair if name is not None
    }
    steps = {parsed[0]: name for name, parsed in parsed_names.items() if parsed is not None}
    if not which.isdigit() or int(which) not in steps:
        raise StorageError(
            f"the run has no checkpoint {which!r}",
            where=run.url,
            fix=f"use best, last or one of the steps {', '.join(map(str, sorted(steps)))}",
        )
    return steps[int(which)]
