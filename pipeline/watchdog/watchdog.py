"""A thread that watches the training thread, and a faulthandler timer that watches the watchdog itself."""

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
"""Upper bound of the time that an exchange of heartbeats takes."""
HANG_REPORT_TIMEOUT_S = 30.0
"""Upper bound of the time to save the stacks and report a hang."""
STDERR_FD = 2


class Watchdog:
    """While entered, this thread is watched. If it makes no progress for longer than allowed, the stacks of the process
    are saved, the cause is reported, and the process ends with exit code 1, by force if necessary.

    A process that must not be ended (`owns_process` is false) continues: the error is raised in the thread as soon as
    it runs Python code, and until then another process may take over the run.

    If the thread holds the GIL, so that the watchdog cannot run, a timer outside of Python ends the process. Its stacks
    are then on standard error if the user reads that; otherwise the next process of the run on this machine uploads and
    reports them.

    Parameters
    ----------
    where: the run's URL.
    response_count: returns the number of responses from storage so far.
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
            threading.Thread(target=self._report_stale_dumps, name="trainyard-stale-dumps", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            self._close()
        except HungError:  # the thread resumed at the last moment, and the error is raised here
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
        finally:  # without this thread the timer would end the process
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        timeouts, context = self._timeouts, self._context
        max_interval_s = 2 * timeouts.poll_s + (HEARTBEAT_TIMEOUT_S if context.world_size > 1 else 0.0)
        last_activity: tuple[object, ...] = ()
        idle_s, last_time = 0.0, time.monotonic()
        while not self._closed.wait(timeouts.poll_s):
            self._restart_timer()
            now = time.monotonic()
            idle_s += min(now - last_time, max_interval_s)  # longer if the whole process was stopped
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
        """Restart the timer. As long as this is called in time, the watchdog itself is running."""
        with self._lock:
            if self._closed.is_set() or self._is_suspended:
                return
            attempt = self._context.progress.attempt
            if attempt and self._stacks.attempt != attempt:
                self._stacks.set_attempt(attempt)
            # Nobody reads a worker's standard error; the next process of the run reports the file.
            file = STDERR_FD if self._context.is_local else self._stacks.target
            exits = self._context.owns_process
            faulthandler.dump_traceback_later(self._timeouts.gil_timeout_s + extra_s, exit=exits, file=file)

    def _handle_hang(self, hang: str, blocked_on: WaitTarget) -> None:
        setting = "TRAINYARD_STORAGE_LIMIT_S" if blocked_on == "storage" else "scale.hang_s"
        subject = "training" if self._context.is_local else f"worker {self._context.rank}"
        with self._lock:
            if self._closed.is_set():  # the thread resumed at the last moment
                return
            self._restart_timer(self._timeouts.exit_grace_s + HANG_REPORT_TIMEOUT_S)
            self._stacks.write(f"{subject} {hang}")
            frame = self._stacks.innermost_user_frame() if not blocked_on else ""
        stacks = self._stacks.save()
        error = HungError(
            f"{subject} {hang}{f' in {frame}' if frame else ''}{f'; stacks in {stacks}' if stacks else ''}",
            where=self._where,
            fix=f"the same command resumes from the last checkpoint; {setting} sets the limit",
        )
        if self._context.raise_in_main_thread(error) or self._raise_in_watched_thread(error):
            self._closed.wait(self._timeouts.exit_grace_s)
        if self._closed.is_set():
            return
        self._context.report_hang(error)
        if self._context.owns_process:
            os._exit(error.exit_code)
        print(f"trainyard: {error}", file=sys.stderr)  # the thread may never raise it
        self._context.progress.release_run()

    def _raise_in_watched_thread(self, error: HungError) -> bool:
        """Raise an error in the watched thread, once it runs Python code. Only in a process that must not be ended: any
        other is ended, which works in every case."""

        class Hung(HungError):
            """CPython creates the exception in the thread, without arguments."""

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
        """While entered, detect nothing, not even a held GIL: the code may hold it for long."""
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
        """Stop the process, as Ctrl-Z asks, with the timer canceled: the stopped time is no hang."""
        with self._lock:
            faulthandler.cancel_dump_traceback_later()
            os.kill(os.getpid(), signal.SIGSTOP)
        self._restart_timer()

    def _report_stale_dumps(self) -> None:
        for url, frame in self._stacks.upload_stale_dumps():
            text = f"an earlier process hung in {frame or 'an unknown place'} and was ended; stacks in {url}"
            self._context.emit(WarningMessage(text))


def _raise_in_thread(thread: int, error: type[BaseException] | None) -> bool:
    """Raise an error in a thread when it next runs Python code; None cancels an error that is still pending."""
    raised = ctypes.py_object(error) if error is not None else None
    return bool(ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised))
