"""Standard output and error that cannot be written, and the JSON line of `--json`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from pipeline.cli import main
from pipeline.cli.app import print_json
from tests.cli.command_line import RunCommand, write_job

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(params=["/dev/full", "a closed pipe"])
def broken_stream(request: pytest.FixtureRequest) -> Iterator[TextIO]:
    """A stream that cannot be written."""
    if request.param == "/dev/full":
        target: int | str = request.param
    else:
        read, target = os.pipe()
        os.close(read)
    with open(target, "w") as stream:
        yield stream


def exit_code_of(*arguments: str) -> int:
    """Run a command without capturing its output, and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trainyard", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_unprintable_result_does_not_fail_the_run(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_stream: TextIO, form: tuple[str, ...]
) -> None:
    job = write_job(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", broken_stream)
        assert exit_code_of("train", job, "--name", "unprinted", *form) == 0
    assert trainyard("show", "unprinted", "--json").json["status"] == "finished"


def test_unprintable_progress_does_not_fail_the_run(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_stream: TextIO
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", broken_stream)
        assert trainyard("train", write_job(tmp_path), "--json").json["status"] == "finished"


def test_failing_progress_bar_does_not_fail_the_run(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_stream: TextIO
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(broken_stream, "isatty", lambda: True, raising=False)
        patch.setattr(sys, "stderr", broken_stream)
        assert trainyard("train", write_job(tmp_path), "--json").json["status"] == "finished"


def test_train_without_standard_streams(trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, None)
        assert exit_code_of("train", write_job(tmp_path), "--name", "mute") == 0
    assert trainyard("show", "mute", "--json").json["status"] == "finished"


@pytest.mark.parametrize(
    ("redirection", "code", "stderr"),
    [
        (">/dev/full", 1, "error: standard output: No space left on device: nothing is printed\n"),
        (">/dev/full 2>/dev/full", 1, ""),
        ("| true", 0, ""),
        (">&-", 0, ""),
    ],
)
def test_interpreter_exits_without_extra_output(tmp_path: Path, redirection: str, code: int, stderr: str) -> None:
    """At exit, the interpreter flushes what is still in a buffer, which would fail again."""
    command = f"sleep 1; {sys.executable} -m pipeline runs --storage {tmp_path}"
    shell = f"({command}; echo $? >{tmp_path}/code) {redirection}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert (int((tmp_path / "code").read_text()), done.stderr) == (code, stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--json"],
        ["train", "small.yaml", "--no-such-option", "--json"],
        ["train", "small.yaml", "--json", "--max-steps", "many"],
        ["train", "small.yaml", "small.yaml", "--json"],
        ["no-such-command", "--json"],
        ["show", "--json"],
        ["evaluate", "run", "--json", "--checkpoint"],
        ["train", "nowhere.yaml", "--json"],
    ],
)
def test_every_error_is_json_with_json_output(trainyard: RunCommand, tmp_path: Path, arguments: list[str]) -> None:
    write_job(tmp_path)
    completed = trainyard(*arguments)
    assert completed.exit_code == 2
    assert completed.json["exit_code"] == 2
    assert completed.json["error"]["message"]
    assert completed.json["error"]["message"].splitlines()[0] in completed.stderr, "standard error has the message too"
    assert len(completed.stdout.splitlines()) == 1


def test_keyboard_interrupt_is_json(trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.commands.show.runs", interrupted)
    completed = trainyard("runs", "--json")
    assert (completed.exit_code, completed.json["exit_code"]) == (130, 130)
    assert "interrupted" in completed.stderr


def test_nonfinite_numbers_are_null_in_json(
    trainyard: RunCommand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diverging = {"batch_size": 100, "phases": [{"epochs": 1, "lr": 1e30}]}
    completed = trainyard("check", write_job(tmp_path, train=diverging), "--batch", "--json")
    assert completed.exit_code == 0, completed.stderr
    batch = json.loads(completed.stdout.splitlines()[-1], parse_constant=reject_constant)["batch"]
    assert batch["loss_after"] is None
    assert batch["loss_before"] > 0
    print_json({"a": [1.5, float("inf"), {"b": (float("-inf"), float("nan"), "nan")}]})
    assert json.loads(capsys.readouterr().out, parse_constant=reject_constant) == {
        "a": [1.5, None, {"b": [None, None, "nan"]}]
    }


def reject_constant(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")
