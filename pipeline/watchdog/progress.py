"""What a training thread has done, which it counts itself, and what it waits for, which its stack tells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any, Generic, Literal, TypeVar

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

Awaited = Literal["", "workers", "storage"]
"""What a thread waits for that is no fault of its own; empty: nothing such."""

_WAITS: dict[CodeType, Awaited] = {}


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
