"""What is said about a job that diverges: by `check --batch`, and at the first loss that is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.commands.check import check
from pipeline.commands.train import train
from pipeline.config.files import build_job
from pipeline.errors import NotFiniteError
from pipeline.training.divergence import suggest_stable_settings

PHASES = [{"epochs": 1, "lr": 0.1}, {"epochs": 1, "lr": 0.5}]


def make_tree(**changes: Any) -> dict[str, Any]:
    tree = {"name": "d", "data": {"source": "disc"}, "model": {"kind": "mlp", "hidden": [8]}}
    return {**tree, "train": {"batch_size": 100, "phases": PHASES}, **changes}


@pytest.mark.parametrize(
    ("changes", "phase", "expected"),
    [
        ({}, 1, "lower train.phases.0.lr from 0.1 to 0.01, or set train.clip_norm: 1"),
        ({}, 2, "lower train.phases.1.lr from 0.5 to 0.05, or set train.clip_norm: 1"),
        ({"train": {"phases": PHASES, "clip_norm": 2.0}}, 1, "lower train.phases.0.lr from 0.1 to 0.01"),
        (
            {"data": {"source": "disc", "normalize": "none"}, "task": {"kind": "regression", "scale_targets": False}},
            1,
            "lower train.phases.0.lr from 0.1 to 0.01, or set train.clip_norm: 1 or data.normalize: auto or "
            "task.scale_targets: true",
        ),
    ],
)
def test_the_advice_names_settings_and_values(changes: dict[str, Any], phase: int, expected: str) -> None:
    assert suggest_stable_settings(build_job(make_tree(**changes), "test"), phase) == expected


def test_an_update_that_raises_the_loss_is_a_warning() -> None:
    assert not any("one update" in text for text in check(make_tree(), batch=True).warnings)
    (warning,) = check(make_tree(), ["train.phases.0.lr=300"], batch=True).warnings
    assert "one update raises the loss of its own batch from 0.6" in warning
    assert "lower train.phases.0.lr from 300 to 30" in warning
    (warning,) = check(make_tree(), ["train.phases.0.lr=1e30"], batch=True).warnings
    assert "raises the loss" in warning


def test_the_first_loss_that_is_not_finite_says_what_to_change(tmp_path: Path) -> None:
    tree = make_tree(train={"batch_size": 100, "phases": [{"epochs": 1, "lr": 0.1}, {"epochs": 9, "lr": 1e30}]})
    with pytest.raises(NotFiniteError) as caught:
        train(tree, storage=str(tmp_path))
    assert caught.value.fix.startswith("lower train.phases.1.lr from 1e+30 to 1e+29, or set train.clip_norm: 1")
