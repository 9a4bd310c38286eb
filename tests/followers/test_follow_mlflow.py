"""A real MLflow server on loopback, away at first and back later: each value once, whatever happened before."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import WorkError
from pipeline.events import Event, Message, WarningMessage
from pipeline.followers import MetricLog
from pipeline.followers.to_mlflow import POSITION, ToMlflow, flat
from pipeline.verbs.follow import follow
from tests.faults.fault_evidence import wait_for
from tests.followers.followed_runs import Trained, free_port, mlflow_server

mlflow = pytest.importorskip("mlflow", reason="trainyard[mlflow] is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # mlflow's own

SECRET = "hunter2-hunter2"


def test_each_value_once_with_the_jobs_parameters_and_the_runs_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into MLflow's own store without a server before it."""
    url, store = str(tmp_path / "runs"), f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", "0.05")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    trained = Trained(url).to(250)
    assert follow("run", to=["mlflow"], storage=url, once=True).cells == {"mlflow": 2}
    client = mlflow.MlflowClient(store)
    run = only_run(client)
    assert (run.info.status, run.info.run_name) == ("RUNNING", "run")
    assert steps_of(client, "loss") == list(range(1, 201))
    assert run.data.params["train.phases.0.lr"] == "0.5"
    assert run.data.tags["trainyard.url"] == trained.run.url

    trained.on(280)
    for _ in range(2):
        follow("run", to=["mlflow"], storage=url, once=True)
        assert steps_of(client, "loss") == list(range(1, 201)), "what is exact stays apart"
        assert steps_of(client, "live/loss") == list(range(201, 281)), "each once, though it was sent twice"
        assert steps_of(client, "live/val/loss") == [250, 280]

    trained.to(320, end=True)
    follow("run", to=["mlflow"], storage=url)
    client.set_tag(run.info.run_id, POSITION, "1/100")  # as after a kill, or a reply that was lost
    assert follow("run", to=["mlflow"], storage=url).cells == {"mlflow": 3}
    assert only_run(client).info.status == "FINISHED"
    assert steps_of(client, "loss") == list(range(1, 321))
    history = client.get_metric_history(run.info.run_id, "val/loss")
    moments = [(step, 1_800_000_000_000 + 1000 * step) for step in (0, 250, 280, 320)]
    assert [(one.step, one.timestamp) for one in history] == moments


@pytest.mark.slow
def test_a_server_that_is_away_is_one_warning_and_knows_all_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, url = free_port(), str(tmp_path / "runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{SECRET}@127.0.0.1:{port}")
    trained, gone, seen = Trained(url).to(250), threading.Event(), list[Event]()
    known = {"to": ["mlflow"], "storage": url, "driven": gone, "on_event": seen.append}
    monkeypatch.setattr("pipeline.verbs.follow.PAUSE_S", 0.2)
    follower = threading.Thread(target=follow, args=["run"], kwargs=known)
    follower.start()
    wait_for(lambda: "the run goes on" in str(seen), 60, "a warning")
    with mlflow_server(tmp_path, port) as server:
        wait_for(lambda: "back, and all is told" in str(seen), 120, "the server's return")
        client = mlflow.MlflowClient(server)
        assert only_run(client).info.status == "RUNNING"
        assert steps_of(client, "loss") == list(range(1, 201))
        trained.to(320)
        trained.close()
        gone.set()
        follower.join(60)
        assert only_run(client).info.status == "KILLED", "its driver is gone, and it did not end"
        assert steps_of(client, "loss") == list(range(1, 301))
        assert [type(event) for event in seen] == [WarningMessage, Message]
        assert SECRET not in f"{seen} {only_run(client).to_dictionary()}"
    trained.close()
    with pytest.raises(WorkError, match="refused") as raised:
        follow("run", to=["mlflow"], storage=url, once=True)
    assert raised.value.exit_code == 1
    assert SECRET not in str(raised.value)


def test_live_rows_are_sent_as_they_come_and_again_where_a_resume_took_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, store = str(tmp_path / "runs"), f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("TRAINYARD_HEARTBEAT_S", "0.05")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    trained = Trained(url).on(20)
    log = MetricLog(trained.run)
    follower, client = ToMlflow(log), mlflow.MlflowClient(store)
    assert follower.catch_up(log, log.look("running")) == 0
    assert steps_of(client, "live/loss") == list(range(1, 21))
    trained.on(30)
    follower.catch_up(log, log.look("running"))
    assert steps_of(client, "live/loss") == list(range(1, 31))
    again = trained.resumed()  # from step 0, for there was no commit
    again.on(25)
    follower.catch_up(log, log.look("running"))
    assert sorted(set(steps_of(client, "live/loss"))) == list(range(1, 31))
    assert steps_of(client, "live/val/loss").count(25) == 1
    again.to(30, end=True)
    follower.catch_up(log, log.look("finished"))
    assert steps_of(client, "loss") == list(range(1, 31))


def only_run(client: Any) -> Any:
    (run,) = client.search_runs([client.get_experiment_by_name("run").experiment_id])
    return run


def steps_of(client: Any, metric: str) -> list[int]:
    return [one.step for one in client.get_metric_history(only_run(client).info.run_id, metric)]


def test_parameters_are_the_leaves_of_the_job_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    tree = {
        "train": {"phases": [{"lr": 0.5}]},
        "storage": "s3://key:word@bucket/x",
        "args": {"word": SECRET},
        "none": [],
    }
    assert dict(flat(tree)) == {
        "train.phases.0.lr": "0.5",
        "storage": "s3://key:***@bucket/x",
        "args.word": "***",
        "none": "[]",
    }
