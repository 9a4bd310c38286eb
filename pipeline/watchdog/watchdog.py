"""The thread that watches the training thread, and a timer of faulthandler's that watches this one."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Any

from pipeline.context import WaitTarget, WorkerContext, WorkerHeartbeat
from pipeline.errors import HungError
from pipeline.events import WarningMessage
from pipeline.watchdog.policy import HangTimeouts, detect_hang
from pipeline.watchdog.progress import current_wait, listening_to_progress, suspending_with
from pipeline.watchdog.stack_dump import StackDump

HEARTBEAT_TIMEOUT_S = 5.0
"""What a pulse takes at the most."""
STDERR_FD = 2
HANG_REPORT_TIMEOUT_S = 30.0
"""The same for saving stacks and saying why."""


class Watchdog:
    """While entered, this thread is watched: if it stands still for longer than allowed, the stacks of the process are
    saved, the cause is told, and the process ends with exit code 1, if need be by force.

    A process that is not ours (`owns_process`) goes on: the error is raised in the thread, as soon as it runs any
    Python at all, and until then others may take the run over.

    A thread that does not even let the watchdog run, for it holds Python's lock, is ended by a timer outside of Python.
    Then the stacks are on standard error, if that is the user's own; if not, who comes next on this machine saves them
    and tells of it.

    Parameters
    ----------
    where: the run's URL.
    answers: counts what storage has answered.
    """

    def __init__(
        self,
        context: WorkerContext,
        timeouts: HangTimeouts,
        stacks: StackDump,
        *,
        where: str,
        response_count: Callable[[], int],
    ) -> None:
        self._context = context
        self._timeouts = timeouts
        self._stacks = stacks
        self._where = where
        self._response_count = response_count
        self._watched_thread = threading.get_ident()
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._is_suspended = False
        self._exit_stack = ExitStack()
        self._thread = threading.Thread(target=self._run, name="trainyard-watchdog", daemon=True)
        self._previous_handler: Any = None
        self._error: HungError | None = None
        self._raised_type: type[HungError] | None = None

    def __enter__(self) -> Watchdog:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
            self._previous_handler = signal.signal(signal.SIGTSTP, self._on_sigtstp)
        self._exit_stack.enter_context(listening_to_progress(self._count_progress))
        self._exit_stack.enter_context(suspending_with(self._suspend_checks))
        self._restart_timer()
        self._thread.start()
        if self._context.local_rank == 0:
            threading.Thread(target=self._report_stale_dumps, name="trainyard-leftovers", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            self._close()
        except HungError:  # the thread moved at the last moment, and it is raised in here
            self._close()
        if kind is not None and kind is self._raised_type and self._error is not None:
            raise self._error from None

    def _close(self) -> None:
        self._exit_stack.close()
        with self._lock:
            self._closed.set()
            if self._raised_type is not None:
                _raise_in_thread(self._watched_thread, None)
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
        if self._previous_handler is not None:
            signal.signal(signal.SIGTSTP, self._previous_handler)

    def _run(self) -> None:
        try:
            self._watch()
        finally:  # without this thread the timer would take the process for deaf
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        timeouts, context = self._timeouts, self._context
        most_s = 2 * timeouts.poll_s + (HEARTBEAT_TIMEOUT_S if context.world_size > 1 else 0.0)
        last_activity: tuple[object, ...] = ()
        idle_s, last_time = 0.0, time.monotonic()
        while not self._closed.wait(timeouts.poll_s):
            self._restart_timer()
            now = time.monotonic()
            idle_s += min(now - last_time, most_s)  # more passed while this process was stopped as a whole
            last_time = now
            blocked_on, call = current_wait(sys._current_frames().get(self._watched_thread))
            activity = (context.progress.count, call, self._response_count() if blocked_on == "storage" else 0)
            if activity != last_activity or self._is_suspended:
                last_activity, idle_s = activity, 0.0
            heartbeat = WorkerHeartbeat(idle_s, blocked_on)
            heartbeats = context.heartbeat(heartbeat) if context.world_size > 1 else {}
            hang = detect_hang(context.rank, heartbeat, heartbeats, context.world_size, timeouts)
            if hang is not None:
                self._handle_hang(hang, blocked_on)
                return

    def _restart_timer(self, extra_s: float = 0.0) -> None:
        """Begin the timer anew: as long as this is called in time, the watchdog itself is alive."""
        with self._lock:
            if self._closed.is_set() or self._is_suspended:
                return
            attempt = self._context.progress.attempt
            if attempt and self._stacks.attempt != attempt:
                self._stacks.set_attempt(attempt)
            # A worker's standard error is nobody's; who comes next tells of what is in the file.
            file = STDERR_FD if self._context.is_local else self._stacks.target
            exits = self._context.owns_process
            faulthandler.dump_traceback_later(self._timeouts.gil_timeout_s + extra_s, exit=exits, file=file)

    def _handle_hang(self, hang: str, blocked_on: WaitTarget) -> None:
        setting = "TRAINYARD_STORAGE_LIMIT_S" if blocked_on == "storage" else "scale.hang_s"
        subject = "training" if self._context.is_local else f"worker {self._context.rank}"
        with self._lock:
            if self._closed.is_set():  # it moved at the last moment
                return
            self._restart_timer(self._timeouts.exit_grace_s + HANG_REPORT_TIMEOUT_S)
            self._stacks.write(f"{subject} {hang}")
            frame = self._stacks.innermost_user_frame() if not blocked_on else ""
        stacks = self._stacks.save()
        error = HungError(
            f"{subject} {hang}{f' in {frame}' if frame else ''}{f'; stacks in {stacks}' if stacks else ''}",
            where=self._where,
            fix=f"the same command goes on from the last checkpoint; {setting} sets the limit",
        )
        if self._context.raise_in_main_thread(error) or self._raise_in_watched_thread(error):
            self._closed.wait(self._timeouts.exit_grace_s)
        if self._closed.is_set():
            return
        self._context.report_hang(error)
        if self._context.owns_process:
            os._exit(error.exit_code)
        print(f"trainyard: {error}", file=sys.stderr)  # the thread may never come to raise it
        self._context.progress.release_run()

    def _raise_in_watched_thread(self, error: HungError) -> bool:
        """Raise an error in the watched thread, once it runs Python code; only in a process that is not ours, since
        another is ended, which no thread can withstand."""

        class Hung(HungError):
            """It is made where it is raised, without arguments."""

            def __init__(self) -> None:
                super().__init__(error.what, where=error.where, fix=error.fix)

        Hung.__name__ = HungError.__name__
        with self._lock:
            if self._context.owns_process or self._closed.is_set():
                return False
            self._error, self._raised_type = error, Hung
            return _raise_in_thread(self._watched_thread, Hung)

    def _count_progress(self) -> None:
        self._context.progress.count += 1

    @contextmanager
    def _suspend_checks(self) -> Iterator[None]:
        """Judge nothing meanwhile: not even that this watchdog cannot run, for code may hold Python's lock for long."""
        with self._lock:
            self._is_suspended = True
            faulthandler.cancel_dump_traceback_later()
        try:
            yield
        finally:
            self._count_progress()
            self._is_suspended = False
            self._restart_timer()

    def _on_sigtstp(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: time passes for the timer, and it must not take that for a hang."""
        with self._lock:
            faulthandler.cancel_dump_traceback_later()
            os.kill(os.getpid(), signal.SIGSTOP)
        self._restart_timer()

    def _report_stale_dumps(self) -> None:
        for url, frame in self._stacks.upload_stale_dumps():
            text = f"an earlier process stood still in {frame or 'an unknown place'} and was ended; stacks in {url}"
            self._context.emit(WarningMessage(text))


def _raise_in_thread(thread: int, error: type[BaseException] | None) -> bool:
    """Have an error raised in a thread when it next runs Python code; None takes back one that was not raised yet."""
    raised = ctypes.py_object(error) if error is not None else None
    return bool(ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised))
