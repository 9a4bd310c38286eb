"""The command line, called in this process."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from pipeline.cli import main
from tests.cli.command_line import CompletedCommand as CompletedCommand
from tests.cli.command_line import RunCommand


@pytest.fixture
def trainyard(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCommand:
    """Run `trainyard ARG...` in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRAINYARD_STORAGE", raising=False)

    def run(*arguments: str) -> CompletedCommand:
        monkeypatch.setattr(sys, "argv", ["trainyard", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        output = capsys.readouterr()
        code = caught.value.code
        return CompletedCommand(code if isinstance(code, int) else 0 if code is None else 1, output.out, output.err)

    return run
