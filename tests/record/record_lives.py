"""Writers for the test of the record's protocols: the real code, stopped before each request to storage."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import torch

from pipeline.errors import BusyError
from pipeline.record.attempt import Attempt, choose_base, take
from pipeline.record.cells import CellLayout, Columns
from pipeline.record.checkpoint import DamagedError
from pipeline.record.entries import BestSoFar, Claim
from pipeline.record.live import LiveWriter
from pipeline.record.live import remove as remove_live_rows
from pipeline.record.run import Run
from pipeline.record.writer import Snapshot, Writer
from pipeline.storage import Storage

TOTAL = 10
CELLS = CellLayout(1, 3)
"""The log's cells end at steps 1, 2, 4, 7 and 10."""
KEEP = 2
EVERY = 2
"""Steps between two evaluations."""
SHOWN = 3
"""Steps between two writes of the live rows."""

Files = dict[str, bytes]
Fate = Literal["done", "refused", "unanswered", "late"]


class Killed(BaseException):
    """SIGKILL, for a thread."""


# ------------------------------------------------------------------------------------- a run's pure arithmetic


def weight_at(step: int) -> float:
    """The one weight after a step, a chain: whoever resumes from anything else than the step before is found out."""
    value = 0.5
    for number in range(1, step + 1):
        value = math.fmod(value * 3.7 + number * 0.123, 1.0)
    return value


def loss_at(step: int) -> float:
    return 1.0 + weight_at(step)


def evaluation_at(step: int) -> float:
    return round(2.0 + math.sin(7.0 * weight_at(step)), 1)


def best_at(step: int) -> int | None:
    """The earliest best evaluation until a step; step 0 is no candidate."""
    steps = range(EVERY, step + 1, EVERY)
    return min(steps, key=lambda at: (evaluation_at(at), at), default=None)


# ------------------------------------------------------------------------------------------ storage that decides


class Store:
    """What is in storage, and the requests that are still on their way there."""

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


class Requests:
    """A backend whose requests wait for their fate, which a `Life` decides; without one they are done at once."""

    far = False

    def __init__(self, store: Store, life: Life | None = None) -> None:
        self.store = store
        self.life = life

    def _ask(self, effect: Callable[[], Any], *, writes: bool, what: str) -> Any:
        return effect() if self.life is None else self.life.ask(effect, writes, what)

    def read(self, path: str) -> bytes:
        def effect() -> bytes:
            if path not in self.store.files:
                raise FileNotFoundError(path)
            return self.store.files[path]

        data: bytes = self._ask(effect, writes=False, what=f"read {path}")
        return data

    def replace(self, path: str, data: bytes, temporary: str, sync: bool) -> None:
        self._ask(lambda: self.store.put(path, data), writes=True, what=f"replace {path}")

    def upload(self, path: str, size: int) -> None:
        return None

    def create(self, path: str, data: bytes, temporary: str) -> None:
        self._ask(lambda: self.store.put_new(path, data), writes=True, what=f"create {path}")

    def list(self, path: str) -> list[str]:
        names: list[str] = self._ask(lambda: self.store.children(path), writes=False, what=f"list {path}")
        return names

    def exists(self, path: str) -> bool:
        there: bool = self._ask(lambda: path in self.store.files, writes=False, what=f"exists {path}")
        return there

    def delete(self, path: str) -> None:
        self._ask(lambda: self.store.remove(path), writes=True, what=f"delete {path}")

    def delete_folder(self, path: str) -> None:
        for file in [name for name in self.store.files if name.startswith(f"{path}/")]:
            self.delete(file)

    def sweep(self, temporary: str) -> None:
        return

    def conditional_writes(self, folder: str) -> bool:
        return True

    def renew(self) -> None:
        return


def open_run(store: Store, life: Life | None = None) -> Run:
    return Run(Storage(Requests(store, life), "/runs", "test://runs"), "run")


# ---------------------------------------------------------------------------------------------------- writers


class Life:
    """One attempt: the real writer in a thread, which advances one request at a time.

    Parameters
    ----------
    saves: steps after which it commits.
    wish: a step at which it would like to end early, if any.
    believes: number of an attempt that it takes for dead, rightly or wrongly.
    """

    def __init__(
        self,
        store: Store,
        protocol: Faithful,
        number: int,
        *,
        saves: frozenset[int],
        wish: int | None,
        believes: int | None,
    ) -> None:
        self.store = store
        self.protocol = protocol
        self.saves = saves
        self.wish = wish
        self.believes = believes
        self.name = f"life {number}"
        self.nonce = f"{number:032x}"
        self.error: BaseException | None = None
        self.over = False
        self.killed = False
        self.what = ""
        self.writes = False
        self._effect: Callable[[], Any] = lambda: None
        self._fate: Fate = "done"
        self._asked = threading.Semaphore(0)
        self._answered = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._live, name=self.name, daemon=True)
        self._thread.start()
        self._asked.acquire()

    # Called by the writer's thread.

    def ask(self, effect: Callable[[], Any], writes: bool, what: str) -> Any:
        if self.killed:
            raise Killed
        self._effect, self.writes, self.what = effect, writes, what
        self._asked.release()
        self._answered.acquire()
        if self.killed:
            raise Killed
        if self._fate == "done":
            return effect()
        if self._fate == "unanswered":
            effect()
        if self._fate == "late":
            self.store.late.append(effect)
        raise TimeoutError(self._fate)

    def _live(self) -> None:
        try:
            train(self, open_run(self.store, self), self.protocol)
        except (Killed, BusyError):
            pass  # the second says that another attempt has the run
        except DamagedError as error:
            # A checkpoint may be damaged after it was found sound: then the attempt ends, and the next looks again.
            if not any(name in str(error) for name in self.store.damaged):
                self.error = error
        except BaseException as error:
            self.error = error
        finally:
            self.over = True
            self._asked.release()

    # Called by the test.

    def go_on(self, fate: Fate = "done") -> None:
        """Decide the request that waits, and run to the next."""
        if self.over:
            return
        self._fate = fate if self.writes else ("refused" if fate != "done" else "done")
        self._answered.release()
        self._asked.acquire()
        if self.error is not None:
            raise self.error

    def kill(self, *, done: bool, late: bool) -> None:
        """End the process: its last request was done, is on its way, or never left."""
        if self.over:
            return
        if done and self.writes:
            with suppress(FileExistsError):
                self._effect()
        elif late and self.writes:
            self.store.late.append(self._effect)
        self.killed = True
        self._answered.release()
        self._thread.join()


def train(life: Life, run: Run, protocol: Faithful) -> None:
    """An attempt as the worker does it: claim, restore, fit, commit, end."""
    template = Claim(number=0, nonce=life.nonce, time="", attempt=0, driver="driver", interval_s=1e-6)
    attempt = protocol.claim(run, template, life.believes)
    writer, live = protocol.writer(attempt), protocol.live_writer(attempt)
    base = attempt.base
    if base is not None and base.end:
        writer.complete()
        protocol.remove_live_rows(run)
        return
    writer.begin()
    live.begin(writer.rows)
    step, weight = 0, weight_at(0)
    best: tuple[int, float] | None = None
    best_weight: float | None = None
    blocks, evaluations = [], []
    if base is None:
        evaluations.append(_evaluation(0))
        live.evaluation(evaluations[-1])
    else:
        with attempt.reading_base():
            step, weight, state = base.step, float(base.weights()["weight"]), base.state()["weight"]
        assert weight == weight_at(step), "the base is not what training left at its step"
        assert float(state) == weight
        assert base.position == {"step": step}
        if base.best is not None:
            best = (base.best.step, base.best.value)
    while True:
        step += 1
        weight = math.fmod(weight * 3.7 + step * 0.123, 1.0)
        blocks.append(_block(step, 1.0 + weight))
        live.steps(blocks[-1])
        if step % EVERY == 0:
            evaluations.append(_evaluation(step))
            live.evaluation(evaluations[-1])
            if best is None or evaluation_at(step) < best[1]:
                best, best_weight = (step, evaluation_at(step)), weight
        bound = protocol.bound(attempt)
        early = life.wish is not None and step >= max(life.wish, protocol.floor(attempt))
        end = step >= TOTAL or (step >= bound if bound is not None else early)
        if end or step in life.saves:
            so_far = None if best is None else BestSoFar(metric="val/loss", step=best[0], value=best[1])
            elsewhere = best is not None and best[0] != step and best_weight is not None
            snapshot = Snapshot(
                step=step,
                epoch=1,
                weights={"weight": torch.tensor(weight, dtype=torch.float64)},
                state={"weight": torch.tensor(weight, dtype=torch.float64)},
                position={"step": step},
                metrics={"val/loss": evaluation_at(step - step % EVERY)},
                best=so_far,
                best_weights={"weight": torch.tensor(best_weight, dtype=torch.float64)} if elsewhere else None,
                end=end,
            )
            writer.commit(snapshot, blocks, evaluations)
            blocks, evaluations, best_weight = [], [], None
            live.drop(writer.rows)
        if end:
            protocol.remove_live_rows(run)
            return
        if step % SHOWN == 0:
            live.write()


def _block(step: int, loss: float) -> dict[str, np.ndarray[Any, Any]]:
    whole, real = np.array([step]), np.array([loss])
    return {"step": whole, "epoch": whole * 0 + 1, "loss": real, "samples": whole, "seconds": real, "time": real}


def _evaluation(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": 1, "split": "val", "loss": evaluation_at(step)}


class Faithful:
    """The protocol as it is. A mutant overrides one of these to leave out a clause."""

    def claim(self, run: Run, template: Claim, dead: int | None) -> Attempt:
        attempt = take(run, template, dead)
        choose_base(attempt)
        return attempt

    def writer(self, attempt: Attempt) -> Writer:
        return Writer(attempt, layout=CELLS, keep=KEEP, columns=Columns())

    def live_writer(self, attempt: Attempt) -> LiveWriter:
        return LiveWriter(attempt.run, attempt.number, CELLS, Columns())

    def remove_live_rows(self, run: Run) -> None:
        remove_live_rows(run)

    def bound(self, attempt: Attempt) -> int | None:
        return attempt.ended_at

    def floor(self, attempt: Attempt) -> int:
        return attempt.highest_step
