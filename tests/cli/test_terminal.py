"""Phases, evaluations and the progress bar, with and without a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest

from pipeline.cli import terminal
from pipeline.cli.terminal import ProgressDisplay
from pipeline.events import EarlyStopped, EvaluationLogged, Message, PhaseStarted, StepsLogged, TrainingStarted
from pipeline.format_metrics import format_rate


def render(capsys: pytest.CaptureFixture[str], quiet: bool = False) -> str:
    with ProgressDisplay(quiet=quiet) as progress:
        for text in ("caching 9.2 of 10.9 GB", "caching 10.9 of 10.9 GB"):
            progress.show(PhaseStarted(text))
        progress.show(Message("done"))
    return capsys.readouterr().err


def test_phases_replace_each_other_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    output = render(capsys)
    assert output.count("\n") == 1
    assert output.split("\r")[-1] == f"{terminal.ERASE_LINE}done\n"
    assert "caching 9.2 of 10.9 GB ..." in output
    assert render(capsys, quiet=True) == ""


def test_only_long_phases_are_printed_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert render(capsys) == "done\n"
    monkeypatch.setattr(terminal, "PHASE_INTERVAL_S", -1.0)
    assert render(capsys).splitlines() == ["caching 9.2 of 10.9 GB ...", "caching 10.9 of 10.9 GB ...", "done"]


START_EVENT = TrainingStarted(step=0, last_step=3000, num_evaluations=3000, workers="cpu")


def make_evaluation(number: int, **changes: Any) -> EvaluationLogged:
    """Return the evaluation of a regression after step `number`, with one evaluation per step."""
    metrics = {"val/loss": 1.5 * number, "val/rmse": 12345.678 / (number + 1), "val/mae": 1.0, "val/r2": -1 / 3}
    values: dict[str, Any] = {"is_best": False, "no_gain": False, "phase": 1, "ends_epoch": True, **changes}
    return EvaluationLogged(step=number, epoch=number, number=number, metrics=metrics, best_metric="val/rmse", **values)


def shown_epochs(output: str) -> list[int]:
    return [int(line.split()[1]) for line in output.splitlines() if line.startswith("epoch")]


def test_output_of_thousands_of_evaluations_is_thinned(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(quiet=False) as progress:
        progress.show(START_EVENT)
        for number in range(2991):
            best, phase = number in (70, 1234, 2985), 1 if number < 2107 else 2
            progress.show(make_evaluation(number, is_best=best, phase=phase))
        progress.show(EarlyStopped(step=2990, last_step=3000, evaluations_since_best=5, metric="val/rmse"))
    output = capsys.readouterr().err
    assert "1 in 50 of 3,000 evaluations is shown here" in output
    assert shown_epochs(output) == sorted([*range(0, 2951, 50), 2107, 2990])
    lines = {line.split()[1]: line for line in output.splitlines() if line.startswith("epoch")}
    assert [epoch for epoch, line in lines.items() if "best" in line] == ["100", "1250", "2990"]
    assert lines["1250"].endswith("best at step 1234")
    assert output.splitlines()[-1].startswith("early stop at step 2990 of 3000")
    with ProgressDisplay(quiet=False) as progress:  # an interrupted run, with a line for each evaluation
        progress.show(replace(START_EVENT, num_evaluations=100))
        for number in range(8):
            progress.show(make_evaluation(number))
    assert shown_epochs(capsys.readouterr().err) == list(range(8))


def test_interrupted_run_prints_its_last_evaluation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ProgressDisplay(quiet=False) as progress:
        progress.show(replace(START_EVENT, step=20))
        for number in range(21, 26):
            monkeypatch.setattr(terminal, "MAX_SILENCE_S", -1.0 if number == 23 else 600.0)
            progress.show(make_evaluation(number))
    assert shown_epochs(capsys.readouterr().err) == [21, 23, 25]


@pytest.mark.parametrize(("columns", "fields"), [(120, 4), (80, 2), (60, 1), (40, 0)])
def test_progress_line_fits_the_width_and_keeps_its_layout(
    columns: int, fields: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a pseudo-terminal: always step, bar and remaining time, then as many fields as fit."""
    master, slave = pty.openpty()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    terminal_end = os.fdopen(slave, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", terminal_end)
    chunks: list[str] = []

    def read() -> None:
        with contextlib.suppress(OSError), open(master, encoding="utf-8", errors="replace", newline="") as screen:
            while text := screen.read(1):
                chunks.append(text)

    reader = threading.Thread(target=read)
    reader.start()
    with ProgressDisplay(quiet=False) as progress:
        progress.show(replace(START_EVENT, step=2000))
        progress.show(make_evaluation(2000))
        for step in range(2000, 3001, 100):
            loss, throughput = 10.0 ** (step % 700 / 100 - 3), 3.0 ** (step / 200)
            progress.show(StepsLogged(step=step, epoch=1, loss=loss, lr=0.1, samples=100, samples_per_s=throughput))
            progress.show(make_evaluation(step))
            assert progress._bar is not None
            progress._bar._progress.refresh()
    terminal_end.close()
    reader.join()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "".join(chunks))
    lines = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("step ")]
    with_loss = [line for line in lines if columns == 40 or re.search(r"(?<!val )loss", line)]
    assert len(with_loss) >= 11
    assert {len(line) for line in with_loss} == {len(with_loss[0])}, "the width of the line never changes"
    assert len(with_loss[0]) <= columns
    for line in with_loss:
        assert re.match(r"step \d{4}/3000 [━╸╺]+ +(\d+:\d\d:\d\d|-:--:--) ", line), line
        names = re.findall(r"(?:val )?(?:loss|rmse|r2|mae)|samples/s", line)
        assert names == ["loss", "val rmse", "samples/s", "val loss", "val r2"][:fields]


@pytest.mark.parametrize("value", [0, 0.9996, 912.4, 999.7, 1000, 52_134, 999_600, 1_234_567, 99_999_999, 4.2e9])
def test_throughput_takes_at_most_five_characters(value: float) -> None:
    shown = format_rate(value)
    assert len(shown) <= 5
    unit = {"k": 1e3, "M": 1e6, "G": 1e9}.get(shown[-1], 1)
    assert float(shown.rstrip("kMG")) * unit == pytest.approx(value, rel=6e-3, abs=0.5)
