"""What a training thread has done, which it counts itself, and what it waits for, which its stack tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import Any, TypeVar

from pipeline.context import Awaited

F = TypeVar("F", bound=Callable[..., Any])

Suspend = Callable[[], AbstractContextManager[None]]

_WAITS: dict[CodeType, Awaited] = {}
_LISTENERS: ContextVar[tuple[Callable[[], None], ...]] = ContextVar("listeners", default=())
_SUSPEND: ContextVar[Suspend] = ContextVar("suspend", default=nullcontext)


def note_progress() -> None:
    """Note that this thread has done a piece of work whose whole takes long: a block of a file, a batch of rows.

    Whoever takes an interest in it has asked by `on_progress`; costs next to nothing where nobody has.
    """
    for listener in _LISTENERS.get():
        listener()


@contextmanager
def on_progress(listener: Callable[[], None]) -> Iterator[None]:
    """While entered, `listener` is called whenever this thread notes progress."""
    token = _LISTENERS.set((*_LISTENERS.get(), listener))
    try:
        yield
    finally:
        _LISTENERS.reset(token)


def progress_listeners() -> tuple[Callable[[], None], ...]:
    """Those of this thread: for another one that sees its progress from outside."""
    return _LISTENERS.get()


def unlimited() -> AbstractContextManager[None]:
    """While entered, this thread may take as long as it likes: its watchdog, where it has one, does not judge it.

    For code whose progress nobody can see from outside, such as a function of the user's that returns the data.
    """
    return _SUSPEND.get()()


@contextmanager
def suspended_by(suspend: Suspend) -> Iterator[None]:
    """While entered, `unlimited` in this thread enters `suspend()`."""
    token = _SUSPEND.set(suspend)
    try:
        yield
    finally:
        _SUSPEND.reset(token)


def waits_for(what: Awaited) -> Callable[[F], F]:
    """Mark a function in which a thread waits for others. Calls of it cost nothing more."""

    def mark(function: F) -> F:
        _WAITS[function.__code__] = what
        return function

    return mark


def awaited(frame: FrameType | None) -> tuple[Awaited, int]:
    """What a thread waits for whose innermost frame is this one, and in which call: another one is progress."""
    while frame is not None:
        if target := _WAITS.get(frame.f_code):
            return target, id(frame)
        frame = frame.f_back
    return "", 0
