"""The command line, called in this process: exit code, standard output and standard error of one command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from pipeline.cli import main


@dataclass(frozen=True)
class CompletedCommand:
    """A command that has ended."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of standard output."""
        tree: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return tree


@pytest.fixture
def trainyard(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., CompletedCommand]:
    """Call `trainyard ARG...` in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRAINYARD_STORAGE", raising=False)

    def call(*arguments: str) -> CompletedCommand:
        monkeypatch.setattr(sys, "argv", ["trainyard", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        code = ended.value.code
        return CompletedCommand(code if isinstance(code, int) else 0 if code is None else 1, printed.out, printed.err)

    return call
