"""What a training thread has done, which it counts itself, and what it waits for, which its stack tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import Any, TypeVar

from pipeline.context import WaitTarget

F = TypeVar("F", bound=Callable[..., Any])

SuspendFn = Callable[[], AbstractContextManager[None]]

_WAIT_TARGETS: dict[CodeType, WaitTarget] = {}
_LISTENERS: ContextVar[tuple[Callable[[], None], ...]] = ContextVar("listeners", default=())
_SUSPEND: ContextVar[SuspendFn] = ContextVar("suspend", default=nullcontext)


def note_progress() -> None:
    """Note that this thread has done a piece of work whose whole takes long: a block of a file, a batch of rows.

    Whoever takes an interest in it has asked by `on_progress`; costs next to nothing where nobody has.
    """
    for listener in _LISTENERS.get():
        listener()


@contextmanager
def listening_to_progress(listener: Callable[[], None]) -> Iterator[None]:
    """While entered, `listener` is called whenever this thread notes progress."""
    token = _LISTENERS.set((*_LISTENERS.get(), listener))
    try:
        yield
    finally:
        _LISTENERS.reset(token)


def get_progress_listeners() -> tuple[Callable[[], None], ...]:
    """Those of this thread: for another one that sees its progress from outside."""
    return _LISTENERS.get()


def watchdog_suspended() -> AbstractContextManager[None]:
    """While entered, this thread may take as long as it likes: its watchdog, where it has one, does not judge it.

    For code whose progress nobody can see from outside, such as a function of the user's that returns the data.
    """
    return _SUSPEND.get()()


@contextmanager
def suspending_with(suspend: SuspendFn) -> Iterator[None]:
    """While entered, `unlimited` in this thread enters `suspend()`."""
    token = _SUSPEND.set(suspend)
    try:
        yield
    finally:
        _SUSPEND.reset(token)


def blocking_on(target: WaitTarget) -> Callable[[F], F]:
    """Mark a function in which a thread waits for others. Calls of it cost nothing more."""

    def mark(function: F) -> F:
        _WAIT_TARGETS[function.__code__] = target
        return function

    return mark


def current_wait(frame: FrameType | None) -> tuple[WaitTarget, int]:
    """What a thread waits for whose innermost frame is this one, and in which call: another one is progress."""
    while frame is not None:
        if target := _WAIT_TARGETS.get(frame.f_code):
            return target, id(frame)
        frame = frame.f_back
    return "", 0
