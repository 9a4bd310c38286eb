"""`check`, `init`, `evaluate` and invalid input: one clear message and exit code 2, no traceback, no lost data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import app
from pipeline.cpus import available_cpus
from pipeline.events import EvaluationLogged, Event, RunOpened, TrainingStarted
from tests.cli.command_line import RunCommand, write_job

REPOSITORY = Path(__file__).parents[2]


def test_help_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; sys.argv = ['trainyard', '--help']\n"
        "from pipeline.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'ray', 'pyarrow', 'numpy', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "trainyard" in done.stdout


COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback is not None]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(trainyard: RunCommand, command: str) -> None:
    ended = trainyard(command, "--help")
    assert ended.exit_code == 0
    assert f"Example: trainyard {command}" in ended.stdout


def test_python_m_pipeline_is_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "runs", "--storage", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout == f"no runs in {tmp_path}\n"


def test_init_writes_a_valid_job(trainyard: RunCommand, tmp_path: Path) -> None:
    assert trainyard("init", "churn").exit_code == 0
    checked = trainyard("check", "churn.yaml", "--json")
    assert checked.exit_code == 0
    assert checked.json["job"]["name"] == "churn"
    again = trainyard("init", "churn")
    assert again.exit_code == 2
    assert "already exists" in again.stderr
    assert trainyard("init", "../churn").exit_code == 2


def test_check_prints_an_equivalent_job(trainyard: RunCommand, tmp_path: Path) -> None:
    job = write_job(tmp_path)
    printed = trainyard("check", job).stdout
    (tmp_path / "resolved.yaml").write_text(printed)
    first = trainyard("train", job, "--max-steps", "1", "--json").json
    assert trainyard("train", "resolved.yaml", "--max-steps", "1", "--json").json["run"] == first["run"]


def test_check_batch_reports_model_and_batch(trainyard: RunCommand, tmp_path: Path) -> None:
    batch = trainyard("check", write_job(tmp_path), "--batch", "--json").json["batch"]
    assert batch["parameters"] == [["0.weight", [16, 2]], ["0.bias", [16]], ["2.weight", [2, 16]], ["2.bias", [2]]]
    assert batch["parameter_count"] == 82
    assert batch["inputs"] == [100, 2]
    assert batch["outputs"] == [100, 2]
    assert batch["device"] in ("cpu", "cuda:0", "mps")
    assert batch["loss_after"] < batch["loss_before"]
    assert batch["rows"] == {"train": 800, "val": 200, "test": 1000}
    assert not (tmp_path / "runs").exists(), "check writes nothing"


def test_check_overfit_fits_a_batch_or_reports_failure(trainyard: RunCommand, tmp_path: Path) -> None:
    able = {"hidden": [64], "kind": "mlp"}
    job = write_job(tmp_path, model=able, train={"batch_size": 16, "phases": [{"epochs": 1, "lr": 0.5}]})
    ended = trainyard("check", job, "--overfit", "--json")
    assert ended.exit_code == 0, ended.stderr
    assert ended.json["overfit"]["loss"] < 0.01
    unable = trainyard("check", write_job(tmp_path, model={"hidden": []}), "--overfit")
    assert unable.exit_code == 1
    assert "cannot be overfitted" in unable.stderr


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["train", "nowhere.yaml"], ["nowhere.yaml", "no such job file"]),
        (["train", "small.yaml", "--set", "train.batchsize=3"], ["train.batchsize", "batch_size"]),
        (["train", "small.yaml", "--set", "train.batch_size=-1"], ["train.batch_size", "-1"]),
        (["train", "small.yaml", "--workers", "two"], ["--workers", "two"]),
        (["train", "small.yaml", "--name", "../out"], ["../out"]),
        (["train", "small.yaml", "--storage", "nosuch://bucket/x"], ["nosuch"]),
        (["train", "small.yaml", "--set", "scale.device=cuda"], ["cuda", "scale.device"]),
        (["train", "small.yaml", "--set", "data.splits={by: range, train: [0, 5000]}"], ["data.splits.train", "1,000"]),
        (["train", "small.yaml", "--set", "data.splits.val=0.0001"], ["data.splits.val"]),
        (["train", "small.yaml", "--set", "data.normalize=unit"], ["data.normalize", "float32"]),
        (["train", "small.yaml", "--set", "data.source={call: nosuch:load}"], ["nosuch"]),
        (["train", "small.yaml", "--set", "model.kind=cnn"], ["model"]),
        (["train", "small.yaml", "--set", "best.metric=train/loss"], ["best.metric"]),
        (["train", "small.yaml", "--max-steps", "0"], ["max-steps"]),
        (["evaluate", "nosuch"], ["nosuch", "no such run"]),
        (["show", "nosuch"], ["nosuch", "no such run"]),
        (["show", "../../etc"], ["etc"]),
        (["check", "small.yaml", "--set", "seed"], ["KEY=VALUE"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_exit_2(
    trainyard: RunCommand, tmp_path: Path, arguments: list[str], messages: list[str]
) -> None:
    import torch

    if "scale.device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so scale.device=cuda is no error")
    write_job(tmp_path)
    ended = trainyard(*arguments)
    assert ended.exit_code == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    for message in messages:
        assert message in ended.stderr
    assert not (tmp_path / "runs").exists(), "nothing is written before the input is checked"


def test_error_is_json_with_json_output(trainyard: RunCommand, tmp_path: Path) -> None:
    ended = trainyard("train", "nowhere.yaml", "--json")
    assert ended.exit_code == 2
    assert ended.json["error"]["type"] == "JobError"


def test_evaluate_rejects_missing_runs_and_splits(trainyard: RunCommand, tmp_path: Path) -> None:
    run = trainyard("train", write_job(tmp_path), "--json").json["run"]
    for arguments in (["--checkpoint", "7"], ["--split", "nosuch"], ["--set", "train.batch_size=7"]):
        ended = trainyard("evaluate", run, *arguments)
        assert ended.exit_code == 2, arguments
        assert "Traceback" not in ended.stderr
    assert trainyard("evaluate", run, "--checkpoint", "24", "--set", "data.loader.eval_batch_size=7").exit_code == 0


def test_a_stored_job_imports_nothing_without_trust(trainyard: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "user_data_module.py").write_text(
        "import numpy as np\n"
        "def load(rows):\n"
        "    x = np.random.default_rng(0).normal(size=(rows, 3)).astype('float32')\n"
        "    return x, (x.sum(1) > 0).astype('int64')\n"
    )
    source = {"call": "user_data_module:load", "args": {"rows": 200}}
    job = write_job(tmp_path, data={"source": source, "normalize": "standard"})
    trained = trainyard("train", job, "--json")
    assert trained.exit_code == 0, trained.stderr
    run = trained.json["run"]
    refused = trainyard("evaluate", run)
    assert refused.exit_code == 2
    assert "user_data_module:load" in refused.stderr
    assert "--trust" in refused.stderr
    assert trainyard("evaluate", run, "--trust").exit_code == 0


@pytest.mark.parametrize(
    "arguments", [("train", "--trust"), ("check", "--trust"), ("check", "--quiet"), ("check", "-q")]
)
def test_options_of_other_commands_are_rejected(
    trainyard: RunCommand, tmp_path: Path, arguments: tuple[str, str]
) -> None:
    command, option = arguments
    ended = trainyard(command, write_job(tmp_path), option)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert f"No such option: {option}" in ended.stderr


def test_python_api_matches_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from pipeline import train

    events: list[Event] = []
    settings = {"train.batch_size": 200, "train.clip_norm": None, "data.shuffle": False, "data.root": "5"}
    run = train(write_job(tmp_path), set=settings, max_steps=4, on_event=events.append)
    assert run.status == "finished"
    assert run.step == 4
    assert Path(run.url).is_dir()
    assert {RunOpened, TrainingStarted, EvaluationLogged} <= {type(event) for event in events}
    assert json.loads((Path(run.url) / "run.json").read_text())["status"] == "finished"


def test_suspicious_settings_are_warnings(trainyard: RunCommand, tmp_path: Path) -> None:
    job = write_job(
        tmp_path,
        data={
            "source": "disc",
            "normalize": "scalar",
            "splits": {"val": 0},
            "loader": {"processes": available_cpus() + 1},
        },
        best={"patience": 3},
    )
    checked = trainyard("check", job, "--batch")
    assert checked.exit_code == 0
    assert "warning: data.loader.processes is" in checked.stdout
    assert "warning: best.patience has no effect" in checked.stdout
    few = trainyard("train", write_job(tmp_path, train={"batch_size": 1001, "phases": [{"epochs": 1, "lr": 0.1}]}))
    assert few.exit_code == 0
    assert "warning: train.batch_size is 1,001, but the training split has only 800 rows" in few.stderr


def test_batch_norm_on_a_single_sample_is_rejected_before_training(trainyard: RunCommand, tmp_path: Path) -> None:
    model = {"hidden": [4], "batch_norm": True}
    job = write_job(tmp_path, model=model, train={"batch_size": 17, "phases": [{"epochs": 1, "lr": 0.1}]})
    ended = trainyard("train", job)
    assert ended.exit_code == 2
    assert "a batch of 1 samples leaves one to worker 0" in ended.stderr
    assert not (tmp_path / "runs").exists()
