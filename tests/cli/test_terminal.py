"""What takes long before training is shown in place on a terminal, and now and then elsewhere."""

from __future__ import annotations

import sys

import pytest

from pipeline import terminal
from pipeline.terminal import Progress


def shown(capsys: pytest.CaptureFixture[str], quiet: bool = False) -> str:
    with Progress(quiet=quiet) as progress:
        for text in ("caching 9.2 of 10.9 GB", "caching 10.9 of 10.9 GB"):
            progress.show({"kind": "phase", "text": text})
        progress.show({"kind": "message", "text": "done"})
    return capsys.readouterr().err


def test_on_a_terminal_each_phase_takes_the_place_of_the_one_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    said = shown(capsys)
    assert said.count("\n") == 1
    assert said.split("\r")[-1] == f"{terminal.ERASE}done\n"
    assert "caching 9.2 of 10.9 GB ..." in said
    assert shown(capsys, quiet=True) == ""


def test_elsewhere_only_what_takes_long_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shown(capsys) == "done\n"
    monkeypatch.setattr(terminal, "PHASE_S", -1.0)
    assert shown(capsys).splitlines() == ["caching 9.2 of 10.9 GB ...", "caching 10.9 of 10.9 GB ...", "done"]
