"""What a training thread has done, which it counts itself, and what it waits for, which its stack tells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import Any, Generic, Literal, TypeVar

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

Awaited = Literal["", "workers", "storage", "cache"]
"""What a thread waits for that is no fault of its own; empty: nothing such. cache: another process that prepares the
same data."""

Suspend = Callable[[], AbstractContextManager[None]]

_WAITS: dict[CodeType, Awaited] = {}
_LISTENERS: ContextVar[tuple[Callable[[], None], ...]] = ContextVar("listeners", default=())
_SUSPEND: ContextVar[Suspend] = ContextVar("suspend", default=nullcontext)


class Progress:
    """Counts steps, blocks of an evaluation and phases of preparing: where the count stays, nothing moves."""

    def __init__(self) -> None:
        self.count = 0
        self.attempt = 0
        """The number of the attempt; 0 until it is known."""
        self.give_up: Callable[[], None] = lambda: None
        """Lets others take the run over, where this thread hangs in a process that goes on."""

    def each(self, items: Iterable[T]) -> Iterable[T]:
        """`items`, counted when one is asked for and when it is there. Can be iterated as often as `items`."""
        return _Counted(items, self)


class _Counted(Generic[T]):
    def __init__(self, items: Iterable[T], progress: Progress) -> None:
        self._items = items
        self._progress = progress

    def __iter__(self) -> Iterator[T]:
        progress = self._progress
        for item in self._items:
            progress.count += 1
            yield item
            progress.count += 1


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
        if what := _WAITS.get(frame.f_code):
            return what, id(frame)
        frame = frame.f_back
    return "", 0
