"""The stacks of all threads: written to a local file first, then uploaded to storage."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import re
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

SaveFn = Callable[[str, bytes], str]
"""Writes a file, given its name and content, into the run's storage; returns its URL."""

PACKAGE_FOLDER = Path(__file__).parents[1]
_LIBRARIES = ("/site-packages/", "/dist-packages/", f"{sysconfig.get_path('stdlib')}/", "<frozen", "<string>")
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_TRAINING_THREAD = re.compile(r"^# thread 0x([0-9a-f]+) trains$", re.MULTILINE)
_LOCAL_FILE_NAME = re.compile(r"[0-9a-f]+-(\d+)-((?:attempt-\d+|preparing)-rank-\d+\.txt)")


class StackDump:
    """One rank's stack dump file. It is opened at the start: nothing can be opened while a hang holds the GIL.

    Parameters
    ----------
    run_url: its digest begins the names of the run's files on this machine.
    save: uploads a file, see `SaveFn`; raises if storage is unavailable, and may block.
    save_timeout_s: seconds that an upload may take.
    """

    def __init__(self, run_url: str, rank: int, save: SaveFn, *, save_timeout_s: float = 10.0) -> None:
        self._rank = rank
        self._save = save
        self._save_timeout_s = save_timeout_s
        self._thread = threading.get_ident()
        self._run_digest = hashlib.sha256(run_url.encode()).hexdigest()[:16]
        self._folder = _get_user_folder()
        self._file: BinaryIO | None = None
        self._is_written = False
        self.attempt = 0
        self.name = f"preparing-rank-{rank}.txt"
        self._open()

    @property
    def target(self) -> BinaryIO | int:
        """What faulthandler writes to: the file, or standard error if there is no file."""
        return self._file if self._file is not None else 2

    def set_attempt(self, number: int) -> None:
        """Rename the file to that of an attempt."""
        old_path = self._path if self._file is not None else None
        self.attempt, self.name = number, f"attempt-{number:04d}-rank-{self._rank}.txt"
        if old_path is not None:
            with suppress(OSError):
                os.replace(old_path, self._path)

    def write(self, line: str) -> None:
        """Write the current stacks of all threads, below a line with the reason."""
        if self._file is None:
            return
        self._is_written = True
        with suppress(OSError):  # the disk is full: the message is sent without stacks
            self._file.write(f"# {line}\n\n".encode())
            self._file.flush()
            faulthandler.dump_traceback(self._file, all_threads=True)

    def innermost_user_frame(self) -> str:
        """Return the innermost line of the user's code or this package in the training thread when it was dumped."""
        return find_user_frame(self._read_text())

    def save(self) -> str:
        """Upload what was written, if storage responds in time. Return its URL or local path; empty without a file."""
        if self._file is None:
            return ""
        return self._upload(self.name, self._read_text().encode(), self._path) or str(self._path)

    def upload_stale_dumps(self) -> Iterator[tuple[str, str]]:
        """Upload the dumps of processes that ended before they could. Yield each URL with the innermost user frame."""
        for path in sorted(self._folder.glob(f"{self._run_digest}-*.txt")) if self._folder is not None else ():
            match = _LOCAL_FILE_NAME.fullmatch(path.name)
            if match is None or _is_process_running(int(match[1])):
                continue
            text = path.read_text(errors="replace")
            if not _THREAD.search(text):  # its process was killed, without a hang
                path.unlink(missing_ok=True)
            elif url := self._upload(match[2], text.encode(), path):
                yield url, find_user_frame(text)

    def close(self) -> None:
        """Close the file, and remove it unless it has stacks."""
        if self._file is not None:
            self._file.close()
            if not self._is_written:
                self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._run_digest}-{os.getpid()}-{self.name}"

    def _open(self) -> None:
        if self._folder is None:
            return
        with suppress(OSError):
            self._file = open(self._path, "w+b", buffering=0)  # noqa: SIM115 - closed by close()
            self._file.write(f"# thread 0x{self._thread:016x} trains\n".encode())

    def _read_text(self) -> str:
        if self._file is None:
            return ""
        self._file.seek(0)  # not by its name: cleaners remove files from temporary folders
        return self._file.read().decode(errors="replace")

    def _upload(self, name: str, text: bytes, path: Path) -> str:
        """Upload a dump, remove its local file and return the URL; empty if storage does not respond in time."""
        urls: list[str] = []

        def save() -> None:
            url = self._save(name, text)
            path.unlink(missing_ok=True)
            urls.append(url)

        thread = threading.Thread(target=_call_suppressing_errors, args=(save,), name="trainyard-stacks", daemon=True)
        thread.start()
        thread.join(self._save_timeout_s)
        return urls[0] if urls else ""


def find_user_frame(text: str) -> str:
    """Return the innermost line of the user's code or this package in the training thread, such as
    `model.py:12 (forward)`; empty if there is none.

    Parameters
    ----------
    text: a faulthandler dump, below the line that identifies the training thread.
    """
    training_thread = _TRAINING_THREAD.search(text)
    threads = _THREAD.split(text)
    stacks = dict(zip(threads[1::2], threads[2::2], strict=True))
    frames = _FRAME.findall(stacks.get(training_thread[1], "") if training_thread is not None else "")
    for file, line, function in frames:
        is_package_file = Path(file).is_relative_to(PACKAGE_FOLDER)
        if is_package_file or not any(library in file for library in _LIBRARIES):
            display_path = Path(file).relative_to(PACKAGE_FOLDER.parent) if is_package_file else Path(file).name
            return f"{display_path}:{line} ({function})"
    return ""


def _get_user_folder() -> Path | None:
    """Return a folder that belongs to this user alone, or None if it cannot be created."""
    folder = Path(tempfile.gettempdir()) / f"trainyard-stacks-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        # Another user may have created it first.
        is_ours = not folder.is_symlink() and folder.stat().st_uid == os.getuid()
    except OSError:
        return None
    return folder if is_ours else None


def _is_process_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process has this pid now
        return False
    return True


def _call_suppressing_errors(save: Callable[[], None]) -> None:
    with suppress(Exception):  # storage is unavailable: the file stays, and the message has its local path
        save()
