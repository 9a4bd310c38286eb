"""Errors survive pickling and map to exit codes."""

from __future__ import annotations

import copy
import pickle
import signal
from collections.abc import Iterator

import pytest

from pipeline import errors
from pipeline.errors import Interrupted, TrainyardError


def iter_error_types(kind: type[TrainyardError]) -> Iterator[type[TrainyardError]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from iter_error_types(subclass)


ERROR_TYPES = [kind for kind in iter_error_types(TrainyardError) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", ERROR_TYPES)
def test_errors_survive_pickling(kind: type[TrainyardError]) -> None:
    error = kind("what", fix="fix")
    error.where = "where"
    error.step = 7  # type: ignore[attr-defined]
    error.add_note("a note")
    for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(copied) is kind
        assert str(copied) == str(error) == "where: what\n  fix"
        assert vars(copied) == vars(error)
        assert copied.args == error.args
        assert copied.exit_code == error.exit_code


def test_interrupts_use_shell_exit_codes() -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        assert pickle.loads(pickle.dumps(Interrupted("stopped", signal_number=number))).exit_code == code


def test_exit_codes_follow_the_class_hierarchy() -> None:
    codes = {kind.__name__: kind("x").exit_code for kind in ERROR_TYPES}
    assert codes == {
        "TrainyardError": 1,
        "InputError": 2,
        "JobError": 2,
        "DataError": 2,
        "StorageError": 2,
        "ClusterError": 2,
        "WorkError": 1,
        "HungError": 1,
        "NotFiniteError": 1,
        "OutOfMemoryError": 1,
        "RepeatedFailureError": 1,
        "StorageFullError": 1,
        "StorageLostError": 1,
        "WorkerLostError": 1,
        "BusyError": 3,
        "SupersededError": 3,
        "Interrupted": 130,
    }
