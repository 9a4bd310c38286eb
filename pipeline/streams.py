"""Standard output and error that never raise: the disk may be full, the reader gone, the terminal closed.

A failed print must not end training. The failure can be read afterwards from `SafeStream.error`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO


class SafeStream:
    """A text stream whose writes never raise OSError. After the first failure everything goes to the null device.

    Parameters
    ----------
    stream: standard output or error.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None
        """The first failure, or None."""

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BlockingIOError:  # the descriptor was made non-blocking, and its buffer is full
            return len(text)
        except OSError as error:
            self._redirect_to_null(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BlockingIOError:
            return
        except OSError as error:
            self._redirect_to_null(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _redirect_to_null(self, error: OSError) -> None:
        """Point the descriptor to the null device: buffered text would fail again, at the latest when Python exits."""
        self.error = self.error or error
        with suppress(OSError):  # the stream has no descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextmanager
def guarded_standard_streams() -> Iterator[tuple[SafeStream, SafeStream]]:
    """While entered, standard output and error are `SafeStream`s; they are flushed at the end."""
    originals = sys.stdout, sys.stderr
    with ExitStack() as exit_stack:
        # A process may start without one of them. Its descriptor must not be reused for a file of a run, because native
        # libraries print to it.
        output, errors = (
            SafeStream(original if original is not None else exit_stack.enter_context(open(os.devnull, "w")))
            for original in originals
        )
        sys.stdout, sys.stderr = output, errors
        try:
            yield output, errors
        finally:
            output.flush()
            errors.flush()
            sys.stdout, sys.stderr = originals
