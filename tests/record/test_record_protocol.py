"""The protocols of the record against everything that may happen to their writers.

Several writers run the real code, each in a thread that stops before every request to storage. The test decides what
becomes of each request: done, refused, done without a reply, or on its way and done much later. Writers are killed,
or go on as zombies after the next one has claimed the run; checkpoints get damaged; readers list now and read later.
After every move the store must keep the promises.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import hypothesis.strategies as st
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pipeline.errors import BusyError
from pipeline.record import decisions
from pipeline.record.attempt import Attempt, choose_base, peek, take
from pipeline.record.cells import Columns
from pipeline.record.checkpoint import BestSoFar, Checkpoint, DamagedError
from pipeline.record.entries import Claim, Commit, Entry
from pipeline.record.journal import Journal
from pipeline.record.run import Run
from pipeline.record.standing import standing
from pipeline.record.writer import Snapshot, Writer
from pipeline.storage import Storage
from pipeline.storage import faults as storage_faults

TOTAL = 10
CELL = 3
KEEP = 2
EVERY = 2
"""Steps between two evaluations."""
LIVES = 7

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
        self.late: list[Callable[[], None]] = []

    def put(self, path: str, data: bytes) -> None:
        self.files[path] = data

    def put_new(self, path: str, data: bytes) -> None:
        if path in self.files:
            raise FileExistsError(path)
        self.files[path] = data

    def remove(self, path: str) -> None:
        self.files.pop(path, None)

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


def open_run(store: Store, life: Life | None = None) -> Run:
    return Run(Storage(Requests(store, life), "/runs", "test://runs"), "run")


# ---------------------------------------------------------------------------------------------------- writers


class Life:
    """One attempt: the real writer in a thread, which advances one request at a time.

    Parameters
    ----------
    saves: steps after which it commits.
    wish: a step at which it would like to end early, if any.
    """

    def __init__(
        self, store: Store, number: int, saves: frozenset[int], wish: int | None, believes: int | None
    ) -> None:
        self.store = store
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
            train(self, open_run(self.store, self))
        except (Killed, BusyError):
            pass
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
            try:
                self._effect()
            except FileExistsError:
                pass
        elif late and self.writes:
            self.store.late.append(self._effect)
        self.killed = True
        self._answered.release()
        self._thread.join()


def train(life: Life, run: Run, *, writer_type: type[Writer] | None = None) -> None:
    """An attempt as the worker does it: claim, restore, fit, commit, end."""
    template = Claim(number=0, nonce=life.nonce, time="", attempt=0, driver="driver")
    attempt = MUTANT.claim(run, template, life.believes)
    writer = MUTANT.writer(attempt)
    base = attempt.base
    if base is not None and base.end:
        writer.complete()
        return
    writer.begin()
    step, weight = 0, weight_at(0)
    best: tuple[int, float] | None = None
    best_weight: float | None = None
    blocks, evaluations = [], []
    if base is None:
        evaluations.append(_evaluation(0))
    else:
        step, weight = base.step, float(base.weights()["weight"])
        assert weight == weight_at(step), "the base is not what training left at its step"
        assert base.state() == {"weight": weight}
        assert base.position == {"step": step}
        if base.best is not None:
            best = (base.best.step, base.best.value)
    while True:
        step += 1
        weight = math.fmod(weight * 3.7 + step * 0.123, 1.0)
        blocks.append(_block(step, 1.0 + weight))
        if step % EVERY == 0:
            evaluations.append(_evaluation(step))
            if best is None or evaluation_at(step) < best[1]:
                best, best_weight = (step, evaluation_at(step)), weight
        bound = attempt.ended_at
        early = life.wish is not None and step >= max(life.wish, MUTANT.floor(attempt))
        end = step >= TOTAL or (step >= bound if bound is not None else early)
        if end or step in life.saves:
            so_far = None if best is None else BestSoFar(metric="val/loss", step=best[0], value=best[1])
            elsewhere = best is not None and best[0] != step and best_weight is not None
            snapshot = Snapshot(
                step=step,
                epoch=1,
                weights={"weight": torch.tensor(weight, dtype=torch.float64)},
                state={"weight": weight},
                position={"step": step},
                metrics={"val/loss": evaluation_at(step - step % EVERY)},
                best=so_far,
                best_weights={"weight": torch.tensor(best_weight, dtype=torch.float64)} if elsewhere else None,
                end=end,
            )
            writer.commit(snapshot, blocks, evaluations)
            blocks, evaluations, best_weight = [], [], None
        if end:
            return


def _block(step: int, loss: float) -> dict[str, np.ndarray[Any, Any]]:
    whole, real = np.array([step]), np.array([loss])
    return {"step": whole, "epoch": whole * 0 + 1, "loss": real, "samples": whole, "seconds": real, "time": real}


def _evaluation(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": 1, "split": "val", "loss": evaluation_at(step)}


class Faithful:
    """The protocol as it is. Each mutant leaves out one of its clauses, and must be found out."""

    def claim(self, run: Run, template: Claim, dead: int | None) -> Attempt:
        attempt = take(run, template, dead)
        choose_base(attempt)
        return attempt

    def writer(self, attempt: Attempt) -> Writer:
        return Writer(attempt, cell_steps=CELL, keep=KEEP, columns=Columns())

    def floor(self, attempt: Attempt) -> int:
        return attempt.highest_step


MUTANT = Faithful()


# ------------------------------------------------------------------------------------------------- the machine


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = Store()
        self.run = open_run(self.store)
        self.run.birth("name: run\n", {"total_steps": TOTAL, "cell_steps": CELL})
        self.lives: list[Life] = []
        self.journal: dict[int, bytes] = {}
        self.damaged: set[str] = set()
        self.shown: dict[str, int] = {}
        self.tables: dict[bytes, dict[str, list[Any]]] = {}
        self.snapshots: list[list[str]] = []

    def alive(self) -> list[Life]:
        return [life for life in self.lives if not life.over]

    @precondition(lambda self: len(self.lives) < LIVES and len(self.alive()) < 3)
    @rule(saves=st.frozensets(st.integers(1, TOTAL)), wish=st.none() | st.integers(1, TOTAL), ahead=st.integers(0, 12))
    def begin_an_attempt(self, saves: frozenset[int], wish: int | None, ahead: int) -> None:
        """By a driver that takes the last one for dead, rightly or wrongly."""
        claim = decisions.last_claim(Journal(self.run.storage).read())
        life = Life(self.store, len(self.lives) + 1, saves, wish, claim.attempt if claim is not None else None)
        self.lives.append(life)
        self._advance(life, ahead)

    @precondition(lambda self: bool(self.alive()))
    @rule(data=st.data(), requests=st.integers(1, 40))
    def go_on(self, data: st.DataObject, requests: int) -> None:
        self._advance(self._one(data), requests)

    @precondition(lambda self: bool(self.alive()))
    @rule(data=st.data(), word=st.sampled_from(["create", "journal", "metrics", "manifest", "delete", "result", "end"]))
    def go_on_until(self, data: st.DataObject, word: str) -> None:
        """Up to the request of interest, which is where faults find most."""
        life = self._one(data)
        for _ in range(80):
            self._advance(life, 1)
            if life.over or word in life.what:
                break

    @precondition(lambda self: bool(self.alive()))
    @rule(data=st.data(), fate=st.sampled_from(["refused", "unanswered", "late"]))
    def fail_a_request(self, data: st.DataObject, fate: Fate) -> None:
        life = self._one(data)
        note(f"{life.name}: {life.what}: {fate}")
        life.go_on(fate)

    @precondition(lambda self: bool(self.alive()))
    @rule(data=st.data(), done=st.booleans(), late=st.booleans())
    def kill(self, data: st.DataObject, done: bool, late: bool) -> None:
        life = self._one(data)
        note(f"{life.name}: killed at {life.what} {done=} {late=}")
        life.kill(done=done, late=late)

    @precondition(lambda self: bool(self.store.late))
    @rule(data=st.data())
    def land_a_late_request(self, data: st.DataObject) -> None:
        effect = self.store.late.pop(data.draw(st.integers(0, len(self.store.late) - 1)))
        try:
            effect()
        except FileExistsError:
            note("a late create finds its name taken")

    @precondition(lambda self: len(self.damaged) < 3 and self._checkpoints())
    @rule(data=st.data(), way=st.sampled_from(["cut", "flip", "lose"]))
    def damage_a_checkpoint(self, data: st.DataObject, way: str) -> None:
        name = data.draw(st.sampled_from(self._checkpoints()))
        file = data.draw(st.sampled_from(sorted(path for path in self.store.files if f"/{name}/" in path)))
        note(f"{way} {file}")
        content = self.store.files[file]
        if way == "lose":
            del self.store.files[file]
        else:
            self.store.files[file] = content[:-1] if way == "cut" else content[:-1] + bytes([content[-1] ^ 1])
        self.damaged.add(name)

    @rule()
    def list_as_a_reader(self) -> None:
        self.snapshots.append(self._listed("steps") + self._listed("evals"))

    @precondition(lambda self: bool(self.snapshots))
    @rule(data=st.data())
    def read_what_was_listed(self, data: st.DataObject) -> None:
        """Steps without a gap and once each, whatever happened since the listing."""
        names = self.snapshots.pop(data.draw(st.integers(0, len(self.snapshots) - 1)))
        steps = [step for name in names if "/steps/" in name for step in self._table(name)["step"]]
        assert steps == list(range(1, len(steps) + 1)), "a reader saw a gap, or a step twice"

    # What must hold at any moment.

    @invariant()
    def nothing_in_the_journal_changes(self) -> None:
        numbers = sorted(int(path[-13:-5]) for path in self.store.files if "/journal/" in path)
        assert numbers == list(range(1, len(numbers) + 1)), "a gap in the journal"
        for number in numbers:
            data = self.store.files[f"/runs/run/journal/{number:08d}.json"]
            assert self.journal.setdefault(number, data) == data, "an entry changed"
        assert len(self.journal) == len(numbers), "an entry vanished"

    @invariant()
    def the_log_holds_each_step_once_as_it_was(self) -> None:
        entries = self._entries()
        names = self._listed("steps")
        steps: list[int] = []
        for index, name in enumerate(names):
            assert name.endswith(f"/{index:06d}.parquet"), "a gap between cells"
            table = self._table(name)
            steps += table["step"]
            assert [loss_at(step) for step in table["step"]] == table["loss"], "a row is not what training computed"
            own, whole = table["step"], list(range(index * CELL + 1, index * CELL + CELL + 1))
            assert own == whole[: len(own)], "a cell holds the wrong steps"
            if own != whole:
                assert own[-1:] == [decisions.ended_at(entries)], "an incomplete cell before the end"
                assert index == len(names) - 1
            assert len(own) >= self.shown.get(name, 0), "a cell lost rows"
            self.shown[name] = len(own)
            other = name.replace("/steps/", "/evals/")
            assert other in self.store.files, "the steps of a cell show before its evaluations"
            evaluations = self._table(other)
            first = own[0] if index else 0
            expected = [step for step in range(first, (own[-1]) + 1) if step % EVERY == 0]
            assert evaluations["step"] == expected, "an evaluation is missing, or stands twice"
            assert evaluations["loss"] == [evaluation_at(step) for step in expected]
        assert set(self.shown) <= set(names), "a listed file vanished"
        assert len(steps) <= decisions.highest_step(entries), "a step shows that no commit covers"

    @invariant()
    def what_is_kept_is_there(self) -> None:
        entries = self._entries()
        commit = decisions.newest_commit(entries)
        for entry in [*([commit] if commit is not None else []), *decisions.ends(entries)]:
            assert len(entry.kept) <= KEEP
            assert entry.kept[0][0] == entry.checkpoint
            for name in {name for pair in entry.kept for name in pair if name is not None} - self.damaged:
                try:
                    Checkpoint(self.run, name).verify()
                except DamagedError as error:
                    raise AssertionError(
                        f"entry {entry.number} keeps a checkpoint that is not whole: {error}"
                    ) from error

    @invariant()
    def the_end_binds(self) -> None:
        entries = self._entries()
        steps = [entry.step for entry in entries if isinstance(entry, Commit)]
        for end in decisions.ends(entries):
            assert max(steps) == end.step, "a commit beyond an end, or an end below a commit"

    @invariant()
    def the_best_is_the_earliest_of_the_best(self) -> None:
        for entry in self._entries():
            if isinstance(entry, Commit):
                assert (entry.best.step if entry.best is not None else None) == best_at(entry.step)
                name = entry.best.checkpoint if entry.best is not None else None
                assert entry.kept[0] == (entry.checkpoint, name)
                if (
                    name is not None
                    and name not in self.damaged
                    and f"/runs/run/checkpoints/{name}/manifest.json" in self.store.files
                ):
                    assert entry.best is not None
                    assert float(Checkpoint(self.run, name).weights()["weight"]) == weight_at(entry.best.step)

    @invariant()
    def its_standing_can_be_told(self) -> None:
        assert standing(open_run(self.store)).status in ("running", "stalled", "interrupted", "finished")

    def teardown(self) -> None:
        """Land what is late, end every process, run once more undisturbed: all must be as if nothing had happened."""
        try:
            if not any(life.error for life in self.lives):
                self._conclude()
        finally:
            for life in self.lives:
                life.kill(done=False, late=False)

    def _conclude(self) -> None:
        for life in self.alive():
            life.kill(done=False, late=False)
        while self.store.late:
            self.land_one()
        last = Life(self.store, 99, frozenset({4, 7}), None, self._last_attempt())
        self.lives.append(last)
        while not last.over:
            last.go_on()
        if last.error is not None:
            raise last.error
        for check in (
            self.nothing_in_the_journal_changes,
            self.the_log_holds_each_step_once_as_it_was,
            self.what_is_kept_is_there,
            self.the_end_binds,
            self.the_best_is_the_earliest_of_the_best,
        ):
            check()
        entries = self._entries()
        end = decisions.ended_at(entries)
        assert end is not None
        assert [step for name in self._listed("steps") for step in self._table(name)["step"]] == list(range(1, end + 1))
        run = open_run(self.store)
        assert peek(run) == "finished"
        assert run.has_result()
        assert standing(run).status == "finished"
        commit = decisions.ends(entries)[-1]
        assert float(Checkpoint(run, commit.checkpoint).weights()["weight"]) == weight_at(end)
        spare = decisions.spared(commit.kept, entries)
        there = {path.split("/")[4] for path in self.store.files if "/checkpoints/" in path}
        assert there <= spare, "retention left what no entry keeps"

    # Helpers.

    def land_one(self) -> None:
        try:
            self.store.late.pop()()
        except FileExistsError:
            note("a late create finds its name taken")

    def _advance(self, life: Life, requests: int) -> None:
        for _ in range(requests):
            if life.over:
                break
            life.go_on()
            self.nothing_in_the_journal_changes()
        if life.error is not None:
            raise life.error

    def _one(self, data: st.DataObject) -> Life:
        alive = self.alive()
        return alive[data.draw(st.integers(0, len(alive) - 1))]

    def _entries(self) -> tuple[Entry, ...]:
        return Journal(open_run(self.store).storage).read()

    def _last_attempt(self) -> int | None:
        claim = decisions.last_claim(self._entries())
        return claim.attempt if claim is not None else None

    def _checkpoints(self) -> list[str]:
        """Of those that a commit names, for only these are promised."""
        named = {name for entry in self._entries() if isinstance(entry, Commit) for pair in entry.kept for name in pair}
        return sorted({path.split("/")[4] for path in self.store.files if "/checkpoints/" in path} & named)

    def _listed(self, folder: str) -> list[str]:
        return sorted(path for path in self.store.files if path.startswith(f"/runs/run/metrics/{folder}/"))

    def _table(self, name: str) -> dict[str, list[Any]]:
        data = self.store.files[name]
        if data not in self.tables:
            self.tables[data] = pq.read_table(io.BytesIO(data)).to_pydict()
        return self.tables[data]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_faults, "FIRST_PAUSE_S", 0.0)


COMMON = settings(
    deadline=None,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    print_blob=True,
)


def test_whatever_happens_the_record_keeps_its_promises() -> None:
    run_state_machine_as_test(Machine, settings=settings(COMMON, max_examples=60, derandomize=True))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_whatever_happens_the_record_keeps_its_promises_at_length() -> None:
    run_state_machine_as_test(Machine, settings=settings(COMMON, max_examples=2000, stateful_step_count=60))
