"""Downloads through torchvision: whole or not at all, once for all processes of a machine, and without its noise."""

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
"""How long a server may be silent."""


def download(name: str, root: Path, paths: Iterable[str], fetch: Callable[[str], object]) -> None:
    """Fetch files into a temporary folder, then move what is wanted to its place.

    Parameters
    ----------
    name: of the source, for messages.
    root: where the files go.
    wanted: paths under the root, of files or folders; those that are there are left alone.
    fetch: downloads into the folder that it is given.

    Raises
    ------
    DataError: the root cannot be written, or the download failed.
    """
    paths = list(paths)
    fix = f"with {name} on disk already: --set data.root=DIR; else see that this machine reaches the network"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _file_lock(root / ".download.lock") as lock:
            if all((root / path).exists() for path in paths):
                return  # another process was faster
            with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
                with _silence_torchvision(), track_folder_growth(Path(folder), lock):
                    fetch(folder)
                for path in paths:
                    if not (root / path).exists():
                        (root / path).parent.mkdir(parents=True, exist_ok=True)
                        os.rename(Path(folder) / path, root / path)
    except (OSError, RuntimeError) as error:  # torchvision raises RuntimeError for what no mirror has
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name} is not there and could not be downloaded: {first_line}", where=f"data.root: {root}", fix=fix
        ) from error


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[IO[str]]:
    """Hold a file lock; it ends with the process, however that ends."""
    with path.open("a") as file:
        acquire_lock(file)
        yield file


@contextlib.contextmanager
def _silence_torchvision() -> Iterator[None]:
    """No progress bars, and no waiting for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)
