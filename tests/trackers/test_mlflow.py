"""MLflow: each value is logged once, also after kills, lost replies and an outage of the server."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands.follow import follow
from pipeline.errors import WorkError
from pipeline.events import Event, Message, WarningMessage
from pipeline.trackers import MetricLogReader
from pipeline.trackers.mlflow import POSITION_TAG, MlflowTracker, flatten_params
from tests.process_kill.run_assertions import wait_for
from tests.trackers.tracked_runs import TrainedRun, find_free_port, start_mlflow_server

mlflow = pytest.importorskip("mlflow", reason="trainyard[mlflow] is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of mlflow

SECRET = "hunter2-hunter2"


def test_each_value_is_logged_once_with_parameters_and_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into an MLflow store without a server."""
    url, store = str(tmp_path / "runs"), f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", "0.05")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    trained = TrainedRun(url).commit_at(250)
    assert follow("run", to=["mlflow"], storage=url, once=True).segments == {"mlflow": 2}
    client = mlflow.MlflowClient(store)
    run = find_mlflow_run(client)
    assert (run.info.status, run.info.run_name) == ("RUNNING", "run")
    assert logged_steps(client, "loss") == list(range(1, 201))
    assert run.data.params["train.phases.0.lr"] == "0.5"
    assert run.data.tags["trainyard.url"] == trained.run.url

    trained.train_to(280)
    for _ in range(2):
        follow("run", to=["mlflow"], storage=url, once=True)
        assert logged_steps(client, "loss") == list(range(1, 201)), "committed rows are separate from live rows"
        assert logged_steps(client, "live/loss") == list(range(201, 281)), "each once, though it was sent twice"
        assert logged_steps(client, "live/val/loss") == [250, 280]

    trained.commit_at(320, end=True)
    follow("run", to=["mlflow"], storage=url)
    client.set_tag(run.info.run_id, POSITION_TAG, "1/100")  # as after a kill or a lost reply
    assert follow("run", to=["mlflow"], storage=url).segments == {"mlflow": 3}
    assert find_mlflow_run(client).info.status == "FINISHED"
    assert logged_steps(client, "loss") == list(range(1, 321))
    history = client.get_metric_history(run.info.run_id, "val/loss")
    expected = [(step, 1_800_000_000_000 + 1000 * step) for step in (0, 250, 280, 320)]
    assert [(metric.step, metric.timestamp) for metric in history] == expected


@pytest.mark.slow
def test_unreachable_server_is_one_warning_and_catches_up_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, url = find_free_port(), str(tmp_path / "runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{SECRET}@127.0.0.1:{port}")
    trained, driver_done, events = TrainedRun(url).commit_at(250), threading.Event(), list[Event]()
    arguments = {"to": ["mlflow"], "storage": url, "driver_done": driver_done, "on_event": events.append}
    monkeypatch.setattr("pipeline.commands.follow.POLL_INTERVAL_S", 0.2)
    thread = threading.Thread(target=follow, args=["run"], kwargs=arguments)
    thread.start()
    wait_for(lambda: "the run goes on" in str(events), 60, "a warning")
    with start_mlflow_server(tmp_path, port) as server:
        wait_for(lambda: "available again, and all metrics are sent" in str(events), 120, "the server's return")
        client = mlflow.MlflowClient(server)
        assert find_mlflow_run(client).info.status == "RUNNING"
        assert logged_steps(client, "loss") == list(range(1, 201))
        trained.commit_at(320)
        trained.close()
        driver_done.set()
        thread.join(60)
        assert find_mlflow_run(client).info.status == "KILLED", "its driver exited before the run finished"
        assert logged_steps(client, "loss") == list(range(1, 301))
        assert [type(event) for event in events] == [WarningMessage, Message]
        assert SECRET not in f"{events} {find_mlflow_run(client).to_dictionary()}"
    trained.close()
    with pytest.raises(WorkError, match="refused") as raised:
        follow("run", to=["mlflow"], storage=url, once=True)
    assert raised.value.exit_code == 1
    assert SECRET not in str(raised.value)


def test_live_rows_are_logged_and_rewritten_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, store = str(tmp_path / "runs"), f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", "0.05")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    trained = TrainedRun(url).train_to(20)
    log = MetricLogReader(trained.run)
    tracker, client = MlflowTracker(log), mlflow.MlflowClient(store)
    assert tracker.catch_up(log, log.read_view("running")) == 0
    assert logged_steps(client, "live/loss") == list(range(1, 21))
    trained.train_to(30)
    tracker.catch_up(log, log.read_view("running"))
    assert logged_steps(client, "live/loss") == list(range(1, 31))
    again = trained.resume()  # from step 0, for there was no commit
    again.train_to(25)
    tracker.catch_up(log, log.read_view("running"))
    assert sorted(set(logged_steps(client, "live/loss"))) == list(range(1, 31))
    assert logged_steps(client, "live/val/loss").count(25) == 1
    again.commit_at(30, end=True)
    tracker.catch_up(log, log.read_view("finished"))
    assert logged_steps(client, "loss") == list(range(1, 31))


def find_mlflow_run(client: Any) -> Any:
    (run,) = client.search_runs([client.get_experiment_by_name("run").experiment_id])
    return run


def logged_steps(client: Any, metric: str) -> list[int]:
    return [value.step for value in client.get_metric_history(find_mlflow_run(client).info.run_id, metric)]


def test_parameters_are_job_fields_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    tree = {
        "train": {"phases": [{"lr": 0.5}]},
        "storage": "s3://key:word@bucket/x",
        "args": {"word": SECRET},
        "none": [],
    }
    assert dict(flatten_params(tree)) == {
        "train.phases.0.lr": "0.5",
        "storage": "s3://key:***@bucket/x",
        "args.word": "***",
        "none": "[]",
    }
