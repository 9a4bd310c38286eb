"""Calls from Python restore the state of the process, and its settings do not change results."""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import load, train
from pipeline.commands.check import check
from pipeline.commands.evaluate import evaluate
from pipeline.commands.predict import predict

JOB: dict[str, Any] = {
    "name": "small",
    "data": {"source": "disc", "normalize": "scalar", "splits": {"val": 0.2}},
    "model": {"kind": "mlp", "hidden": [8], "dropout": 0.1},
    "train": {"batch_size": 100, "phases": [{"epochs": 1, "lr": 0.1}]},
}


def process_state() -> dict[str, Any]:
    """Return the global state that the pipeline or its dependencies could change."""
    cudnn = torch.backends.cudnn
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "python generator": random.getstate(),
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        ),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "path": [*sys.path],
        "environment": dict(os.environ),
        "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "filters": [*warnings.filters],
        "folder": os.getcwd(),
        "excepthook": sys.excepthook,
    }


@pytest.fixture
def unusual_settings() -> Iterator[None]:
    """Set global state to values that are not the defaults."""
    torch.rand(1)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    precision = torch.get_float32_matmul_precision()
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def custom_model_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A job with a custom model that uses the default dtype, in its forward pass too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    (tmp_path / "code/caller_net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(), torch.nn.Linear(8, 2))\n"
        "    def forward(self, inputs):\n"
        "        return self.layers(inputs) + torch.full((2,), 0.1)\n"
    )
    return {**JOB, "code": "code", "model": {"kind": "caller_net:Net"}}


def test_callers_process_state_is_restored(
    custom_model_job: dict[str, Any], unusual_settings: None, tmp_path: Path
) -> None:
    import ray  # noqa: F401  # their imports change the state too
    import torchvision  # noqa: F401

    run = train(JOB, storage="warm").url  # imports at the first use change the state too
    calls: dict[str, Callable[[], Any]] = {
        "train": lambda: train(custom_model_job, storage="runs"),
        "check": lambda: check(custom_model_job, batch=True),
        "evaluate": lambda: evaluate(run),
        "load": lambda: load(run).predict(np.zeros((3, 2))),
        "load its code": lambda: load(f"runs/{os.listdir('runs')[0]}", trust=True).predict(np.zeros((3, 2))),
    }
    for name, call in calls.items():
        torch.set_num_threads(3)
        torch.manual_seed(7)
        torch.rand(2)
        before = process_state()
        call()
        after = process_state()
        assert {key for key in before if before[key] != after[key]} == set(), name


def read_weights(run: str) -> dict[str, torch.Tensor]:
    return load(run, trust=True).model.state_dict()


def test_caller_settings_do_not_change_results(custom_model_job: dict[str, Any], unusual_settings: None) -> None:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        stack.enter_context(torch.device("meta"))
        there = read_weights(train(custom_model_job, storage="there").url)
        probabilities = load(f"there/{os.listdir('there')[0]}", trust=True).predict_proba(np.ones((3, 2)))
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    baseline = read_weights(train(custom_model_job, storage="here").url)
    assert {name: tensor.dtype for name, tensor in there.items()} == dict.fromkeys(baseline, torch.float32)
    assert all(torch.equal(there[name], baseline[name]) for name in baseline)
    again = load(f"here/{os.listdir('here')[0]}", trust=True).predict_proba(np.ones((3, 2)))
    np.testing.assert_array_equal(probabilities, again)


def test_prediction_from_python_restores_the_process_state(unusual_settings: None, tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame({"x": np.linspace(-1, 1, 60), "y": np.tile([0, 1], 30)})
    frame.to_parquet(tmp_path / "rows.parquet")
    data = {"source": "parquet", "url": str(tmp_path / "rows.parquet"), "label": "y"}
    run = train({**JOB, "data": data}, storage=str(tmp_path)).url
    before = process_state()
    predict(run, input=str(tmp_path / "rows.parquet"), output=str(tmp_path / "said.parquet"))
    after = process_state()
    assert {key for key in before if before[key] != after[key]} == set()
