"""Downloads with torchvision: atomic, once for all processes of a machine, and without its output."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from pipeline.data.cache import acquire_lock, track_folder_growth
from pipeline.errors import DataError

TIMEOUT_S = 60.0
"""How long a server may take to answer."""


def download(name: str, root: Path, paths: Iterable[str], fetch: Callable[[str], object]) -> None:
    """Download files into a temporary folder, then move those at `paths` to their final location.

    Parameters
    ----------
    name: name of the source, for messages.
    root: folder to download to.
    paths: paths of files or folders below the root; existing ones are kept.
    fetch: called with the temporary folder, downloads into it.

    Raises
    ------
    DataError: the root cannot be written, or the download failed.
    """
    paths = list(paths)
    fix = f"if {name} is on disk already: --set data.root=DIR; else check the network of this machine"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _file_lock(root / ".download.lock") as lock:
            if all((root / path).exists() for path in paths):
                return  # another process has downloaded them meanwhile
            with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
                with _silence_torchvision(), track_folder_growth(Path(folder), lock):
                    fetch(folder)
                for path in paths:
                    if not (root / path).exists():
                        (root / path).parent.mkdir(parents=True, exist_ok=True)
                        os.rename(Path(folder) / path, root / path)
    except (OSError, RuntimeError) as error:  # torchvision raises RuntimeError if all mirrors fail
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name} is absent and could not be downloaded: {first_line}", where=f"data.root: {root}", fix=fix
        ) from error


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[IO[str]]:
    """Hold a file lock. The system releases it when the process ends, for whatever reason."""
    with path.open("a") as file:
        acquire_lock(file)
        yield file


@contextlib.contextmanager
def _silence_torchvision() -> Iterator[None]:
    """Suppress progress bars, and set a timeout for sockets."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)
