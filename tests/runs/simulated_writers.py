"""Writers for the protocol tests: the real code, stopped before each request to storage."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import torch

from pipeline.errors import BusyError
from pipeline.runs.checkpoints.checkpoint import DamagedError
from pipeline.runs.journal.entries import BestCheckpoint, Claim
from pipeline.runs.lease.attempt import Attempt, append_claim, select_resume_checkpoint
from pipeline.runs.metric_log.live import LiveWriter
from pipeline.runs.metric_log.live import remove_live_tables as remove_live_rows
from pipeline.runs.metric_log.segments import MetricSchema, SegmentLayout
from pipeline.runs.run import Run
from pipeline.runs.writer import RunWriter, Snapshot
from pipeline.storage import Storage

TOTAL_STEPS = 10
SEGMENT_LAYOUT = SegmentLayout(1, 3)
"""The segments of the log end at steps 1, 2, 4, 7 and 10."""
KEEP_CHECKPOINTS = 2
EVALUATE_EVERY = 2
"""Steps between two evaluations."""
LIVE_EVERY = 3
"""Steps between two writes of the live rows."""

Files = dict[str, bytes]
RequestOutcome = Literal["done", "refused", "unanswered", "late"]


class KilledError(BaseException):
    """SIGKILL, for a thread."""


# ------------------------------------------------------------------------------------- deterministic training


def weight_at(step: int) -> float:
    """Return the weight after a step. It depends on all steps before, so a resume from a wrong state is detected."""
    value = 0.5
    for number in range(1, step + 1):
        value = math.fmod(value * 3.7 + number * 0.123, 1.0)
    return value


def loss_at(step: int) -> float:
    return 1.0 + weight_at(step)


def evaluation_at(step: int) -> float:
    return round(2.0 + math.sin(7.0 * weight_at(step)), 1)


def best_at(step: int) -> int | None:
    """Return the step of the earliest best evaluation up to a step; step 0 is not a candidate."""
    steps = range(EVALUATE_EVERY, step + 1, EVALUATE_EVERY)
    return min(steps, key=lambda at: (evaluation_at(at), at), default=None)


# ------------------------------------------------------------------------------------------ controlled storage


class InMemoryStore:
    """The files in storage, and the delayed requests."""

    def __init__(self) -> None:
        self.files: Files = {}
        self.damaged: set[str] = set()
        self.changes = 0
        self.late: list[Callable[[], None]] = []

    def put(self, path: str, data: bytes) -> None:
        self.files[path] = data
        self.changes += 1

    def put_new(self, path: str, data: bytes) -> None:
        if path in self.files:
            raise FileExistsError(path)
        self.put(path, data)

    def remove(self, path: str) -> None:
        self.files.pop(path, None)
        self.changes += 1

    def children(self, path: str) -> list[str]:
        prefix = f"{path}/"
        names = {name[len(prefix) :].partition("/")[0] for name in self.files if name.startswith(prefix)}
        if not names:
            raise FileNotFoundError(path)
        return sorted(names)


class ControlledBackend:
    """A backend whose requests wait until a `SimulatedWriter` decides their outcome; without one they are executed."""

    is_remote = False

    def __init__(self, store: InMemoryStore, simulated_writer: SimulatedWriter | None = None) -> None:
        self.store = store
        self.simulated_writer = simulated_writer

    def _request(self, effect: Callable[[], Any], *, writes: bool, what: str) -> Any:
        return effect() if self.simulated_writer is None else self.simulated_writer.execute(effect, writes, what)

    def read(self, path: str) -> bytes:
        def effect() -> bytes:
            if path not in self.store.files:
                raise FileNotFoundError(path)
            return self.store.files[path]

        data: bytes = self._request(effect, writes=False, what=f"read {path}")
        return data

    def replace(self, path: str, data: bytes, temporary: str, sync: bool) -> None:
        self._request(lambda: self.store.put(path, data), writes=True, what=f"replace {path}")

    def upload(self, path: str, size: int) -> None:
        return None

    def create(self, path: str, data: bytes, temporary: str) -> None:
        self._request(lambda: self.store.put_new(path, data), writes=True, what=f"create {path}")

    def list(self, path: str) -> list[str]:
        names: list[str] = self._request(lambda: self.store.children(path), writes=False, what=f"list {path}")
        return names

    def exists(self, path: str) -> bool:
        exists: bool = self._request(lambda: path in self.store.files, writes=False, what=f"exists {path}")
        return exists

    def delete(self, path: str) -> None:
        self._request(lambda: self.store.remove(path), writes=True, what=f"delete {path}")

    def delete_folder(self, path: str) -> None:
        for file in [name for name in self.store.files if name.startswith(f"{path}/")]:
            self.delete(file)

    def remove_temporary(self, temporary: str) -> None:
        return

    def has_conditional_writes(self, folder: str) -> bool:
        return True

    def renew_credentials(self) -> None:
        return


def open_simulated_run(store: InMemoryStore, simulated_writer: SimulatedWriter | None = None) -> Run:
    return Run(Storage(ControlledBackend(store, simulated_writer), "/runs", "test://runs"), "run")


# ---------------------------------------------------------------------------------------------------- writers


class SimulatedWriter:
    """One attempt: the real writer in a thread, which advances one request at a time.

    Parameters
    ----------
    commit_steps: steps after which it commits.
    early_stop_step: step from which it tries to stop early, if any.
    known_dead_attempt: number of an attempt that it presumes dead, rightly or wrongly.
    """

    def __init__(
        self,
        store: InMemoryStore,
        protocol: ReferenceProtocol,
        number: int,
        *,
        commit_steps: frozenset[int],
        early_stop_step: int | None,
        known_dead_attempt: int | None,
    ) -> None:
        self.store = store
        self.protocol = protocol
        self.commit_steps = commit_steps
        self.early_stop_step = early_stop_step
        self.known_dead_attempt = known_dead_attempt
        self.name = f"writer {number}"
        self.nonce = f"{number:032x}"
        self.error: BaseException | None = None
        self.is_finished = False
        self.is_killed = False
        self.request = ""
        self.is_write = False
        self._effect: Callable[[], Any] = lambda: None
        self._outcome: RequestOutcome = "done"
        self._request_waits = threading.Semaphore(0)
        self._decided = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()
        self._request_waits.acquire()

    # Called by the writer's thread.

    def execute(self, effect: Callable[[], Any], writes: bool, what: str) -> Any:
        if self.is_killed:
            raise KilledError
        self._effect, self.is_write, self.request = effect, writes, what
        self._request_waits.release()
        self._decided.acquire()
        if self.is_killed:
            raise KilledError
        if self._outcome == "done":
            return effect()
        if self._outcome == "unanswered":
            effect()
        if self._outcome == "late":
            self.store.late.append(effect)
        raise TimeoutError(self._outcome)

    def _run(self) -> None:
        try:
            run_attempt(self, open_simulated_run(self.store, self), self.protocol)
        except (KilledError, BusyError):
            pass  # BusyError: another attempt has the run
        except DamagedError as error:
            # A checkpoint may be damaged after it was verified: then the attempt ends, and the next one verifies again.
            if not any(name in str(error) for name in self.store.damaged):
                self.error = error
        except BaseException as error:
            self.error = error
        finally:
            self.is_finished = True
            self._request_waits.release()

    # Called by the test.

    def resume(self, outcome: RequestOutcome = "done") -> None:
        """Decide the outcome of the waiting request, and run to the next one."""
        if self.is_finished:
            return
        self._outcome = outcome if self.is_write else ("refused" if outcome != "done" else "done")
        self._decided.release()
        self._request_waits.acquire()
        if self.error is not None:
            raise self.error

    def kill(self, *, done: bool, late: bool) -> None:
        """Kill the process: its last request was done, is delayed, or was not sent."""
        if self.is_finished:
            return
        if done and self.is_write:
            with suppress(FileExistsError):
                self._effect()
        elif late and self.is_write:
            self.store.late.append(self._effect)
        self.is_killed = True
        self._decided.release()
        self._thread.join()


def run_attempt(simulated_writer: SimulatedWriter, run: Run, protocol: ReferenceProtocol) -> None:
    """Run an attempt like the worker: claim, restore, train, commit, end."""
    template = Claim(number=0, nonce=simulated_writer.nonce, time="", attempt=0, driver="driver", interval_s=1e-6)
    attempt = protocol.claim(run, template, simulated_writer.known_dead_attempt)
    writer, live = protocol.make_writer(attempt), protocol.make_live_writer(attempt)
    checkpoint = attempt.resume_checkpoint
    if checkpoint is not None and checkpoint.is_final:
        writer.finalize()
        protocol.remove_live_rows(run)
        return
    writer.resume()
    live.resume(writer.rows)
    step, weight = 0, weight_at(0)
    best: tuple[int, float] | None = None
    best_weight: float | None = None
    blocks, evaluations = [], []
    if checkpoint is None:
        evaluations.append(_evaluation(0))
        live.log_evaluation(evaluations[-1])
    else:
        with attempt.reading_resume_checkpoint():
            step, weight, state = (
                checkpoint.step,
                float(checkpoint.load_weights()["weight"]),
                checkpoint.load_state()["weight"],
            )
        assert weight == weight_at(step), "the checkpoint is not the state of its step"
        assert float(state) == weight
        assert checkpoint.position == {"step": step}
        if checkpoint.best is not None:
            best = (checkpoint.best.step, checkpoint.best.value)
    while True:
        step += 1
        weight = math.fmod(weight * 3.7 + step * 0.123, 1.0)
        blocks.append(_block(step, 1.0 + weight))
        live.log_steps(blocks[-1])
        if step % EVALUATE_EVERY == 0:
            evaluations.append(_evaluation(step))
            live.log_evaluation(evaluations[-1])
            if best is None or evaluation_at(step) < best[1]:
                best, best_weight = (step, evaluation_at(step)), weight
        end_step = protocol.required_end_step(attempt)
        stops_early = simulated_writer.early_stop_step is not None and step >= max(
            simulated_writer.early_stop_step, protocol.min_end_step(attempt)
        )
        end = step >= TOTAL_STEPS or (step >= end_step if end_step is not None else stops_early)
        if end or step in simulated_writer.commit_steps:
            best_so_far = None if best is None else BestCheckpoint(metric="val/loss", step=best[0], value=best[1])
            needs_best_weights = best is not None and best[0] != step and best_weight is not None
            snapshot = Snapshot(
                step=step,
                epoch=1,
                weights={"weight": torch.tensor(weight, dtype=torch.float64)},
                state={"weight": torch.tensor(weight, dtype=torch.float64)},
                position={"step": step},
                metrics={"val/loss": evaluation_at(step - step % EVALUATE_EVERY)},
                best=best_so_far,
                best_weights={"weight": torch.tensor(best_weight, dtype=torch.float64)} if needs_best_weights else None,
                is_final=end,
            )
            writer.commit(snapshot, blocks, evaluations)
            blocks, evaluations, best_weight = [], [], None
            live.drop_published(writer.rows)
        if end:
            protocol.remove_live_rows(run)
            return
        if step % LIVE_EVERY == 0:
            live.write()


def _block(step: int, loss: float) -> dict[str, np.ndarray[Any, Any]]:
    whole, real = np.array([step]), np.array([loss])
    return {"step": whole, "epoch": whole * 0 + 1, "loss": real, "samples": whole, "seconds": real, "time": real}


def _evaluation(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": 1, "split": "val", "loss": evaluation_at(step)}


class ReferenceProtocol:
    """The correct protocol. A mutant overrides one of these methods to violate a clause."""

    def claim(self, run: Run, template: Claim, known_dead_attempt: int | None) -> Attempt:
        attempt = append_claim(run, template, known_dead_attempt)
        select_resume_checkpoint(attempt)
        return attempt

    def make_writer(self, attempt: Attempt) -> RunWriter:
        return RunWriter(attempt, layout=SEGMENT_LAYOUT, keep=KEEP_CHECKPOINTS, metric_schema=MetricSchema())

    def make_live_writer(self, attempt: Attempt) -> LiveWriter:
        return LiveWriter(attempt.run, attempt.number, SEGMENT_LAYOUT, MetricSchema())

    def remove_live_rows(self, run: Run) -> None:
        remove_live_rows(run)

    def required_end_step(self, attempt: Attempt) -> int | None:
        return attempt.end_step

    def min_end_step(self, attempt: Attempt) -> int:
        return attempt.highest_step
