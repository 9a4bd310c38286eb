"""Devices: selection, precision, recorded environment, and CPU limits of containers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline import cpus
from pipeline import device as devices
from pipeline.errors import InputError


def test_auto_selects_the_best_device() -> None:
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert devices.select_device("auto").type == best
    assert devices.select_device("cpu", local_rank=3) == torch.device("cpu")


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_unavailable_device_is_bad_input(kind: str) -> None:
    if (torch.cuda if kind == "cuda" else torch.backends.mps).is_available():
        pytest.skip(f"this machine has {kind}")
    with pytest.raises(InputError) as caught:
        devices.select_device(kind)
    assert str(caught.value).startswith(f"scale.device: {kind} is not available on this machine")
    assert "cpu" in caught.value.fix


@pytest.mark.parametrize(
    ("precision", "dtype", "autocast", "scales"),
    [
        ("fp64", torch.float64, None, False),
        ("fp32", torch.float32, None, False),
        ("bf16", torch.float32, torch.bfloat16, False),
        ("fp16", torch.float32, torch.float16, True),
    ],
)
def test_precision_selects_dtypes(
    precision: devices.PrecisionName, dtype: torch.dtype, autocast: torch.dtype | None, scales: bool
) -> None:
    device = torch.device("cpu")
    selected = devices.Precision.from_name(precision, device)
    assert selected == devices.Precision(dtype, autocast, scales)
    with selected.autocast_context(device):
        product = torch.ones(2, 2, dtype=dtype) @ torch.ones(2, 2, dtype=dtype)
    assert product.dtype == (autocast or dtype)


def test_environment_info_is_plain_values() -> None:
    info = devices.environment_info(torch.device("cpu"))
    assert json.loads(json.dumps(info)) == info
    assert {"device", "cpu_capability", "threads", "torch"} <= set(info)
    assert cpus.available_cpus() >= 1


@pytest.mark.parametrize(
    ("limits", "cores"),
    [({}, math.inf), ({"a/b": "max 100000"}, math.inf), ({"a/b": "150000 100000"}, 1.5), ({"a": "200000 100000"}, 2)],
)
def test_container_cpu_limit_is_respected(tmp_path: Path, limits: dict[str, str], cores: float) -> None:
    (tmp_path / "groups/a/b").mkdir(parents=True)
    (tmp_path / "own").write_text("0::/a/b\n")
    for group, limit in limits.items():
        (tmp_path / "groups" / group / "cpu.max").write_text(f"{limit}\n")
    assert cpus._cpu_limit(tmp_path / "groups", tmp_path / "own") == cores
    assert cpus._cpu_limit(tmp_path / "groups", tmp_path / "none") == math.inf
