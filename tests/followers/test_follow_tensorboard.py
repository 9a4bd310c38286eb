"""TensorBoard's own reader sees each value of the metric log once, on any storage, during the run and after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.followers import MetricLog, to_tensorboard
from pipeline.followers.log import Row
from pipeline.followers.to_tensorboard import ToTensorBoard, events
from pipeline.storage import Storage
from pipeline.verbs.follow import follow
from tests.followers.followed_runs import Trained

pytestmark = pytest.mark.filterwarnings("ignore")  # tensorboard's own


def read(run: Storage, split: str, copy: Path) -> dict[str, list[Any]]:
    """Steps and values of each tag, by TensorBoard's own accumulator."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = copy / split
    folder.mkdir(parents=True, exist_ok=True)
    for name in run.list(f"tensorboard/{split}"):
        (folder / name).write_bytes(run.read(f"tensorboard/{split}/{name}"))
    shown = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    shown.Reload()
    return {tag: [(one.step, one.value) for one in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "runs") if request.param == "local" else str(request.getfixturevalue("s3_url"))


def test_each_value_once_while_the_run_goes_on_and_after_its_end(url: str, tmp_path: Path) -> None:
    trained = Trained(url).to(250)
    written = follow("run", to=["tensorboard"], storage=url, once=True)
    assert (written.status, written.cells) == ("running", {"tensorboard": 2})
    steps = read(trained.run.storage, "steps", tmp_path / "1")
    assert steps["loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 201)]
    assert steps["accuracy"] == [(step, 0.5) for step in range(1, 201)]
    assert steps["samples_per_second"][0] == (1, pytest.approx(1e6))
    assert {"epoch", "lr"} < steps.keys()
    before = {
        name: trained.run.storage.read(f"tensorboard/steps/{name}")
        for name in trained.run.storage.list("tensorboard/steps")
    }

    trained.to(320, end=True)
    assert follow("run", to=["tensorboard"], storage=url).cells == {"tensorboard": 2}
    assert follow("run", to=["tensorboard"], storage=url).cells == {"tensorboard": 0}
    assert [step for step, _ in read(trained.run.storage, "steps", tmp_path / "2")["loss"]] == list(range(1, 321))
    assert read(trained.run.storage, "val", tmp_path / "2")["loss"] == [
        (0, pytest.approx(0.7)),
        (250, pytest.approx(1 / 250)),
        (320, pytest.approx(1 / 320)),
    ]
    for name, data in before.items():
        assert trained.run.storage.read(f"tensorboard/steps/{name}") == data


def test_a_cell_that_a_kill_cut_short_is_told_again_in_the_same_bytes(tmp_path: Path) -> None:
    trained = Trained(str(tmp_path)).to(250, end=True)
    storage = trained.run.storage
    follow(trained.run.url, to=["tensorboard"])
    files = [
        f"tensorboard/{split}/{name}" for split in ("steps", "val") for name in storage.list(f"tensorboard/{split}")
    ]
    whole = {file: storage.read(file) for file in files}
    storage.delete("tensorboard/steps/events.out.tfevents.000002")
    storage.delete("tensorboard/val/events.out.tfevents.000002")
    assert follow(trained.run.url, to=["tensorboard"]).cells == {"tensorboard": 1}
    assert {file: storage.read(file) for file in files} == whole


class Watching:
    """TensorBoard's two ways to read a folder in Python, which read on whenever they are asked."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
        from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer as PluginMultiplexer

        self._folder = folder
        self._scalars = EventMultiplexer(size_guidance={"scalars": 0})
        self._tensors = PluginMultiplexer(tensor_size_guidance={"scalars": 0, "tensors": 0})

    def steps(self) -> dict[str, list[int]]:
        """Steps of the loss, by TensorBoard's run."""
        for runs in (self._scalars, self._tensors):
            runs.AddRunsFromDirectory(str(self._folder))
            runs.Reload()
        found = {run: [one.step for one in self._scalars.Scalars(run, "loss")] for run in self._scalars.Runs()}
        tensors = {run: [one.step for one in self._tensors.Tensors(run, "loss")] for run in self._tensors.Runs()}
        assert found == tensors
        return found


def test_live_rows_are_runs_of_their_own_until_their_cell_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", "0.05")
    monkeypatch.setattr(to_tensorboard, "LIVE_SHARE", 1e9)
    trained = Trained(str(tmp_path)).on(40)
    log = MetricLog(trained.run)
    watching, follower = Watching(tmp_path / "run/tensorboard"), ToTensorBoard(log)
    assert follower.catch_up(log, log.look("running")) == 0
    assert watching.steps() == {"live-000000/steps": list(range(1, 41)), "live-000000/val": [0, 40]}
    trained.on(70)
    follower.catch_up(log, log.look("running"))
    follower.catch_up(log, log.look("running"))
    assert watching.steps() == {"live-000000/steps": list(range(1, 71)), "live-000000/val": [0, 40, 70]}
    trained.to(150).on(180)
    assert follower.catch_up(log, log.look("running")) == 1
    exact = {"steps": list(range(1, 101)), "val": [0, 40, 70]}
    assert watching.steps() == {
        **exact,
        "live-000001/steps": list(range(101, 181)),
        "live-000001/val": [150, 180],
    }
    again = trained.resumed()
    follower.catch_up(log, log.look("running"))
    assert watching.steps() == {**exact, "live-000001/steps": list(range(101, 151)), "live-000001/val": [150]}
    again.on(160)
    follower = ToTensorBoard(log)  # as after a kill of the follower
    follower.catch_up(log, log.look("running"))
    assert watching.steps() == {**exact, "live-000001/steps": list(range(101, 161)), "live-000001/val": [150, 160]}
    again.to(180, end=True)
    assert follower.catch_up(log, log.look("finished")) == 1
    assert watching.steps() == {"steps": list(range(1, 181)), "val": [0, 40, 70, 150, 160, 180]}


def test_live_rows_of_a_long_stretch_are_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", "0.05")
    clock = [0.0]
    monkeypatch.setattr("pipeline.followers.to_tensorboard.monotonic", lambda: clock[0])
    trained = Trained(str(tmp_path)).on(1)
    log = MetricLog(trained.run)
    follower = ToTensorBoard(log)
    for step in range(2, 40):
        follower.catch_up(log, log.look("running"))
        clock[0] += 1000.0 if step == 20 else 5.0
        trained.on(step)
    files = trained.run.storage.list("tensorboard/live-000000/steps")
    assert 20 <= len(files) < 35
    follower.catch_up(log, log.look("interrupted"))
    assert len(trained.run.storage.list("tensorboard/live-000000/steps")) == len(files) + 1, "the last rows at once"
    trained.close()


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
tags = st.text("abz_", min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.dictionaries(tags, finite, min_size=1, max_size=3), max_size=5))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, float]]) -> None:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    path = tmp_path_factory.mktemp("events") / "events.out.tfevents.000000"
    path.write_bytes(events(Row("steps", step, 1.5e9 + step, one) for step, one in enumerate(values, 1)))
    version, *found = LegacyEventFileLoader(str(path)).Load()
    assert version.file_version == "brain.Event:2"
    assert [(one.step, one.wall_time) for one in found] == [(step, 1.5e9 + step) for step in range(1, len(values) + 1)]
    assert [{value.tag: value.simple_value for value in one.summary.value} for one in found] == values
