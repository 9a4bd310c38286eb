"""Standard output and error that cannot be written: a full disk, a reader that has left, a terminal that is closed.

What a process prints is not its work, so nothing of the work may end because of it. Whoever prints learns of the
failure afterwards, from `Stream.error`.
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
        """The first failure."""

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BlockingIOError:  # somebody made it non-blocking, and it is full at this moment
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
        """What is still in buffers would fail again, when the interpreter ends at the latest."""
        self.error = self.error or error
        with suppress(OSError):  # a stream without a descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextmanager
def guarded_standard_streams() -> Iterator[tuple[SafeStream, SafeStream]]:
    """While entered, standard output and error are streams that cannot fail; flushed at the end."""
    before = sys.stdout, sys.stderr
    with ExitStack() as opened:
        # A process that was started without one has its descriptor free: then no file of a run may get it, for native
        # libraries print there.
        output, errors = (
            SafeStream(original if original is not None else opened.enter_context(open(os.devnull, "w")))
            for original in before
        )
        sys.stdout, sys.stderr = output, errors
        try:
            yield output, errors
        finally:
            output.flush()
            errors.flush()
            sys.stdout, sys.stderr = before
