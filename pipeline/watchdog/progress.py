"""The progress of a thread, which its code notes, and what it waits for, which is read from its stack."""

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
    """Note that this thread has finished a part of long work, such as a block of a file or a batch of rows.

    Calls the functions that `listening_to_progress` registered; almost free where there are none.
    """
    for listener in _LISTENERS.get():
        listener()


@contextmanager
def listening_to_progress(listener: Callable[[], None]) -> Iterator[None]:
    """While entered, `listener` is called each time this thread notes progress."""
    token = _LISTENERS.set((*_LISTENERS.get(), listener))
    try:
        yield
    finally:
        _LISTENERS.reset(token)


def get_progress_listeners() -> tuple[Callable[[], None], ...]:
    """Return the listeners of this thread, for another thread that observes its progress."""
    return _LISTENERS.get()


def watchdog_suspended() -> AbstractContextManager[None]:
    """While entered, this thread may take any time: its watchdog, if it has one, is suspended.

    For code whose progress cannot be observed, such as a user's function that returns the data.
    """
    return _SUSPEND.get()()


@contextmanager
def suspending_with(suspend: SuspendFn) -> Iterator[None]:
    """While entered, `watchdog_suspended` in this thread enters `suspend()`."""
    token = _SUSPEND.set(suspend)
    try:
        yield
    finally:
        _SUSPEND.reset(token)


def blocking_on(target: WaitTarget) -> Callable[[F], F]:
    """Mark a function in which a thread waits for `target`. Its calls cost nothing extra."""

    def mark(function: F) -> F:
        _WAIT_TARGETS[function.__code__] = target
        return function

    return mark


def current_wait(frame: FrameType | None) -> tuple[WaitTarget, int]:
    """Return what a thread waits for, from its innermost frame, and an id of the waiting call: a new id is progress."""
    while frame is not None:
        if target := _WAIT_TARGETS.get(frame.f_code):
            return target, id(frame)
        frame = frame.f_back
    return "", 0
