"""TensorBoard's reader finds each value of the metric log once, on any storage, during the run and after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.commands.follow import follow
from pipeline.storage import Storage
from pipeline.trackers import MetricLogReader, tensorboard
from pipeline.trackers.metric_reader import MetricRow
from pipeline.trackers.tensorboard import TensorBoardTracker, encode_events
from tests.trackers.tracked_runs import TrainedRun

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of tensorboard


def read_scalars(run: Storage, split: str, copy: Path) -> dict[str, list[Any]]:
    """Read steps and values of each tag with TensorBoard's accumulator."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = copy / split
    folder.mkdir(parents=True, exist_ok=True)
    for name in run.list(f"tensorboard/{split}"):
        (folder / name).write_bytes(run.read(f"tensorboard/{split}/{name}"))
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "runs") if request.param == "local" else str(request.getfixturevalue("s3_url"))


def test_each_value_is_written_once_during_and_after_the_run(url: str, tmp_path: Path) -> None:
    trained = TrainedRun(url).commit_at(250)
    result = follow("run", to=["tensorboard"], storage=url, once=True)
    assert (result.status, result.segments) == ("running", {"tensorboard": 2})
    steps = read_scalars(trained.run.storage, "steps", tmp_path / "1")
    assert steps["loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 201)]
    assert steps["accuracy"] == [(step, 0.5) for step in range(1, 201)]
    assert steps["samples_per_second"][0] == (1, pytest.approx(1e6))
    assert {"epoch", "lr"} < steps.keys()
    before = {
        name: trained.run.storage.read(f"tensorboard/steps/{name}")
        for name in trained.run.storage.list("tensorboard/steps")
    }

    trained.commit_at(320, end=True)
    assert follow("run", to=["tensorboard"], storage=url).segments == {"tensorboard": 2}
    assert follow("run", to=["tensorboard"], storage=url).segments == {"tensorboard": 0}
    assert [step for step, _ in read_scalars(trained.run.storage, "steps", tmp_path / "2")["loss"]] == list(
        range(1, 321)
    )
    assert read_scalars(trained.run.storage, "val", tmp_path / "2")["loss"] == [
        (0, pytest.approx(0.7)),
        (250, pytest.approx(1 / 250)),
        (320, pytest.approx(1 / 320)),
    ]
    for name, data in before.items():
        assert trained.run.storage.read(f"tensorboard/steps/{name}") == data


def test_missing_event_files_are_rewritten_with_the_same_bytes(tmp_path: Path) -> None:
    trained = TrainedRun(str(tmp_path)).commit_at(250, end=True)
    storage = trained.run.storage
    follow(trained.run.url, to=["tensorboard"])
    files = [
        f"tensorboard/{split}/{name}" for split in ("steps", "val") for name in storage.list(f"tensorboard/{split}")
    ]
    whole = {file: storage.read(file) for file in files}
    storage.delete("tensorboard/steps/events.out.tfevents.000002")
    storage.delete("tensorboard/val/events.out.tfevents.000002")
    assert follow(trained.run.url, to=["tensorboard"]).segments == {"tensorboard": 1}
    assert {file: storage.read(file) for file in files} == whole


class TensorBoardReader:
    """TensorBoard's two readers of a folder in Python, which read incrementally at each reload."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
        from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer as PluginMultiplexer

        self._folder = folder
        self._scalars = EventMultiplexer(size_guidance={"scalars": 0})
        self._tensors = PluginMultiplexer(tensor_size_guidance={"scalars": 0, "tensors": 0})

    def steps(self) -> dict[str, list[int]]:
        """Return the steps of the loss by TensorBoard run."""
        for runs in (self._scalars, self._tensors):
            runs.AddRunsFromDirectory(str(self._folder))
            runs.Reload()
        scalars = {run: [event.step for event in self._scalars.Scalars(run, "loss")] for run in self._scalars.Runs()}
        tensors = {run: [event.step for event in self._tensors.Tensors(run, "loss")] for run in self._tensors.Runs()}
        assert scalars == tensors
        return scalars


def test_live_rows_are_separate_runs_until_their_segment_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", "0.05")
    monkeypatch.setattr(tensorboard, "LIVE_INTERVAL_DIVISOR", 1e9)
    trained = TrainedRun(str(tmp_path)).train_to(40)
    log = MetricLogReader(trained.run)
    reader, tracker = TensorBoardReader(tmp_path / "run/tensorboard"), TensorBoardTracker(log)
    assert tracker.catch_up(log, log.read_view("running")) == 0
    assert reader.steps() == {"live-000000/steps": list(range(1, 41)), "live-000000/val": [0, 40]}
    trained.train_to(70)
    tracker.catch_up(log, log.read_view("running"))
    tracker.catch_up(log, log.read_view("running"))
    assert reader.steps() == {"live-000000/steps": list(range(1, 71)), "live-000000/val": [0, 40, 70]}
    trained.commit_at(150).train_to(180)
    assert tracker.catch_up(log, log.read_view("running")) == 1
    exact = {"steps": list(range(1, 101)), "val": [0, 40, 70]}
    assert reader.steps() == {
        **exact,
        "live-000001/steps": list(range(101, 181)),
        "live-000001/val": [150, 180],
    }
    again = trained.resume()
    tracker.catch_up(log, log.read_view("running"))
    assert reader.steps() == {**exact, "live-000001/steps": list(range(101, 151)), "live-000001/val": [150]}
    again.train_to(160)
    tracker = TensorBoardTracker(log)  # as after a kill of the tracker
    tracker.catch_up(log, log.read_view("running"))
    assert reader.steps() == {**exact, "live-000001/steps": list(range(101, 161)), "live-000001/val": [150, 160]}
    again.commit_at(180, end=True)
    assert tracker.catch_up(log, log.read_view("finished")) == 1
    assert reader.steps() == {"steps": list(range(1, 181)), "val": [0, 40, 70, 150, 160, 180]}


def test_many_live_rows_are_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", "0.05")
    clock = [0.0]
    monkeypatch.setattr("pipeline.trackers.tensorboard.monotonic", lambda: clock[0])
    trained = TrainedRun(str(tmp_path)).train_to(1)
    log = MetricLogReader(trained.run)
    tracker = TensorBoardTracker(log)
    for step in range(2, 40):
        tracker.catch_up(log, log.read_view("running"))
        clock[0] += 1000.0 if step == 20 else 5.0
        trained.train_to(step)
    files = trained.run.storage.list("tensorboard/live-000000/steps")
    assert 20 <= len(files) < 35
    tracker.catch_up(log, log.read_view("interrupted"))
    assert len(trained.run.storage.list("tensorboard/live-000000/steps")) == len(files) + 1, (
        "the last rows are written at once"
    )
    trained.close()


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
tags = st.text("abz_", min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.dictionaries(tags, finite, min_size=1, max_size=3), max_size=5))
def test_event_file_round_trip(tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, float]]) -> None:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    path = tmp_path_factory.mktemp("events") / "events.out.tfevents.000000"
    path.write_bytes(encode_events(MetricRow("steps", step, 1.5e9 + step, row) for step, row in enumerate(values, 1)))
    version, *events = LegacyEventFileLoader(str(path)).Load()
    assert version.file_version == "brain.Event:2"
    assert [(event.step, event.wall_time) for event in events] == [
        (step, 1.5e9 + step) for step in range(1, len(values) + 1)
    ]
    assert [{value.tag: value.simple_value for value in event.summary.value} for event in events] == values
