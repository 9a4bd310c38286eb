"""Fixtures of the training tests: one thread, as a worker has by default, and the devices to run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pipeline.device import restore_torch_settings, set_deterministic
from tests.devices import require_device


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """On layers this small, several threads are slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Run a test on the CPU and, if there is one, on a CUDA device, with deterministic algorithms as in training."""
    device = require_device(request.param)
    with restore_torch_settings():
        set_deterministic(device)
        yield device
