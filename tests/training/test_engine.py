"""The engine: precision, clipping, random numbers, buffers, and resuming from saved state. On the CPU and on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.device import Precision
from pipeline.errors import JobError
from pipeline.training.engine import TrainEngine
from pipeline.training.flat_parameters import FlatParameters
from pipeline.training.optimizers import INITIAL_SCALE
from tests.training.factories import make_batch, make_engine, make_job, make_model, mean_gradient

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")  # on CUDA

CNN_MODEL = {"kind": "cnn", "conv": [{"channels": 3, "kernel": 3, "pool": 2}], "hidden": [8]}


def run_steps(engine: TrainEngine, count: int, *, first: int = 1, lr: float = 0.1) -> None:
    for step in range(first, first + count):
        inputs, targets = make_batch(engine._job, 6, seed=step, device=engine.device)
        engine.forward_backward(step, inputs, targets)
        engine.optimizer_step(lr)


def state_bytes(engine: TrainEngine) -> list[bytes]:
    state: dict[str, Tensor] = {**engine.flat.state_dict(), **engine.state_dict()}
    return [tensor.numpy().tobytes() for _, tensor in sorted(state.items())]


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", [{"hidden": [7]}, CNN_MODEL], ids=["mlp", "cnn"])
def test_every_precision_learns(precision: str, model: dict[str, Any], device: torch.device) -> None:
    engine = make_engine(make_job(model=model, train={"precision": precision}), device=device)
    assert engine.flat.params.dtype == (torch.float64 if precision == "fp64" else torch.float32)
    inputs, targets = make_batch(engine._job, 16, device=device)
    losses = []
    for step in range(1, 41):
        engine.forward_backward(step, inputs, targets)
        losses.append(float(engine.flat.loss_sum / engine.flat.weight_sum))
        engine.optimizer_step(0.3)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.005)])
def test_half_precision_gradients_are_close_to_fp64(precision: str, tolerance: float, device: torch.device) -> None:
    exact = make_job(train={"precision": "fp64"})
    half = make_job(train={"precision": precision})
    inputs, targets = make_batch(exact, 32, device=device)
    reference = mean_gradient(make_engine(exact, device=device), inputs, targets)
    gradient = mean_gradient(make_engine(half, device=device), inputs, targets).double()
    assert float((gradient - reference).norm() / reference.norm()) < tolerance


def test_fp16_skips_an_overflowing_update(device: torch.device) -> None:
    engine = make_engine(make_job(train={"precision": "fp16", "optimizer": {"kind": "adam"}}), device=device)
    run_steps(engine, 2)
    before = engine.flat.state_dict() | engine.state_dict()
    inputs, targets = make_batch(engine._job, 4, device=device)
    engine.forward_backward(3, inputs * 3e3, targets)  # the gradient fits fp16, but not times the loss scale
    assert torch.isfinite(engine.flat.loss_sum)
    assert not torch.isfinite(engine.flat.grad).all()
    engine.optimizer_step(0.1)
    after = engine.flat.state_dict() | engine.state_dict()
    assert float(after.pop("scale.factor")) == INITIAL_SCALE / 2
    assert int(after.pop("scale.good_steps")) == 0
    assert int(after.pop("scale.skipped")) == 1
    assert float(after["optimizer.step"]) == 2
    for name in after:
        assert torch.equal(after[name], before[name]), name
    run_steps(engine, 1)
    assert not torch.equal(engine.flat.state_dict()["0.weight"], before["0.weight"])


def test_loss_scale_does_not_change_gradients_and_losses(device: torch.device) -> None:
    engine = make_engine(make_job(train={"precision": "fp16"}), device=device)
    inputs, targets = make_batch(engine._job, 8, device=device)
    first = mean_gradient(engine, inputs, targets).clone()
    loss = float(engine.flat.loss_sum)
    assert engine._grad_scaler is not None
    engine._grad_scaler.scale.mul_(0.25)
    torch.testing.assert_close(mean_gradient(engine, inputs, targets), first, rtol=1e-2, atol=1e-3)
    assert float(engine.flat.loss_sum) == loss


def test_clipping_matches_torch(device: torch.device) -> None:
    free, clipped = make_job(train={"precision": "fp64"}), make_job(train={"precision": "fp64", "clip_norm": 0.05})
    inputs, targets = make_batch(free, 9)
    model = make_model(free).double()
    nn.functional.cross_entropy(model(inputs.double()), targets).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    engine = make_engine(clipped, device=device)
    engine.forward_backward(1, inputs.to(device), targets.to(device))
    engine.optimizer_step(0.5)
    for name, tensor in engine.flat.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-11, atol=1e-13)
    loosely_clipped = make_engine(make_job(train={"precision": "fp64", "clip_norm": 1e9}), device=device)
    unclipped = make_engine(free, device=device)
    run_steps(loosely_clipped, 3)
    run_steps(unclipped, 3)
    assert state_bytes(loosely_clipped) == state_bytes(unclipped)


@pytest.mark.parametrize(
    "tree",
    [
        {"train": {"optimizer": {"kind": "sgd", "momentum": 0.9}}},
        {"train": {"optimizer": {"kind": "adamw"}, "precision": "fp16"}},
        {"model": {"hidden": [7], "dropout": 0.5, "batch_norm": True}, "train": {"optimizer": {"kind": "adam"}}},
        {"model": {**CNN_MODEL, "batch_norm": True}},
        {
            "model": {**CNN_MODEL, "batch_norm": True, "freeze": ["features.*"]},
            "train": {
                "optimizer": {
                    "kind": "adamw",
                    "groups": [{"match": "*.bias", "weight_decay": 0.0}, {"match": "head.3.*", "lr_factor": 0.1}],
                }
            },
        },
    ],
    ids=["momentum", "fp16", "dropout and batch statistics", "cnn", "frozen, with groups"],
)
def test_resume_from_saved_state_is_bit_identical(tree: dict[str, Any], device: torch.device) -> None:
    whole, cut = make_engine(make_job(**tree), device=device), make_engine(make_job(**tree), device=device)
    run_steps(whole, 6)
    run_steps(cut, 3)
    weights, state = cut.flat.state_dict(), cut.state_dict()
    fresh = make_engine(make_job(**tree), device=device)
    torch.rand(17, device=device)  # advances the global generator
    fresh.load_state_dict(weights, state)
    run_steps(fresh, 3, first=4)
    assert state_bytes(fresh) == state_bytes(whole)


def test_saved_state_is_a_copy(device: torch.device) -> None:
    engine = make_engine(make_job(train={"optimizer": {"kind": "adam"}}), device=device)
    run_steps(engine, 1)
    weights, state = engine.flat.state_dict(), engine.state_dict()
    kept = {name: tensor.clone() for name, tensor in (weights | state).items()}
    run_steps(engine, 1, first=2)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in (weights | state).items())


def test_random_numbers_depend_only_on_the_step(device: torch.device) -> None:
    job = make_job(model={"hidden": [40], "dropout": 0.5})
    inputs, targets = make_batch(job, 9, device=device)
    engine = make_engine(job, device=device)
    first = mean_gradient(engine, inputs, targets, step=8).clone()
    other = mean_gradient(engine, inputs, targets, step=9).clone()
    engine.predict_logits(inputs)
    torch.rand(5, device=device)
    assert torch.equal(mean_gradient(engine, inputs, targets, step=8), first)
    assert not torch.equal(other, first)
    assert torch.equal(mean_gradient(make_engine(job, device=device), inputs, targets, step=8), first)


def test_evaluation_uses_no_rng_and_changes_nothing(device: torch.device) -> None:
    engine = make_engine(make_job(model={"hidden": [9], "dropout": 0.5, "batch_norm": True}), device=device)
    run_steps(engine, 2)
    inputs, _ = make_batch(engine._job, 5, device=device)
    before = state_bytes(engine)
    assert torch.equal(engine.predict_logits(inputs), engine.predict_logits(inputs))
    assert torch.equal(engine.predict_logits(inputs)[:2], engine.predict_logits(inputs)[:2])
    assert state_bytes(engine) == before


def test_parameters_are_views_of_one_vector_with_sequential_names(device: torch.device) -> None:
    engine = make_engine(make_job(), device=device)
    run_steps(engine, 2)
    weights = engine.flat.state_dict()
    assert list(weights) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(torch.cat([tensor.reshape(-1) for tensor in weights.values()]), engine.flat.params.cpu())
    inputs, _ = make_batch(engine._job, 3, device=device)
    assert torch.equal(engine.predict_logits(inputs), engine.flat.model(inputs))


class WithMask(nn.Module):
    """A model with an infinite buffer, a frozen parameter, and a parameter used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(30, 30)
        self.tied = self.layer
        self.frozen = nn.Parameter(torch.ones(30), requires_grad=False)
        self.head = nn.Linear(30, 4)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.tied(self.layer(inputs.flatten(1))) * self.frozen)
        return outputs


def test_model_with_tied_and_frozen_parameters_trains(device: torch.device) -> None:
    engine = make_engine(make_job(), model=WithMask(), gradient_backend="eager", device=device)
    reference = WithMask()
    reference.load_state_dict(engine.flat.state_dict())
    inputs, targets = make_batch(engine._job, 6)
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.1)
    for step in (1, 2, 3):
        engine.forward_backward(step, inputs.to(device), targets.to(device))
        engine.optimizer_step(0.1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(inputs), targets).backward()
        optimizer.step()
    for name, tensor in engine.flat.state_dict().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_buffers_are_averaged_by_sample_count(device: torch.device) -> None:
    counts, means = (
        [5, 1, 0],
        [torch.tensor([1.0, 4.0]), torch.tensor([7.0, -2.0]), torch.tensor([100.0, float("inf")])],
    )
    ranks = [FlatParameters(nn.BatchNorm1d(2), device, torch.float64, 3) for _ in counts]
    for rank, count, mean in zip(ranks, counts, means, strict=True):
        rank.buffers[0].copy_(mean)
        rank.all_reduce_buffer.zero_()
        rank.num_samples.fill_(count)
        rank.pack_buffers(count)
    total = sum(rank.all_reduce_buffer for rank in ranks)
    assert isinstance(total, Tensor)
    ranks[2].all_reduce_buffer.copy_(total)
    ranks[2].unpack_buffers()
    assert ranks[2].buffers[0].tolist() == [(5 * 1 + 7) / 6, (5 * 4 - 2) / 6]
    assert ranks[2].buffers[1].tolist() == [1.0, 1.0]


def test_untrainable_model_is_a_job_error() -> None:
    with pytest.raises(JobError, match="no trainable parameters"):
        make_engine(make_job(), model=nn.Flatten(), gradient_backend="eager")
    wrong = make_engine(make_job(), model=nn.Sequential(nn.Flatten(), nn.Linear(30, 3)), gradient_backend="eager")
    with pytest.raises(JobError, match=r"\(2, 3\) for 2 samples, but the task needs \(2, 4\)"):
        wrong.predict_logits(make_batch(make_job(), 2)[0])


def test_no_fp64_on_mps() -> None:
    with pytest.raises(JobError.__mro__[1], match="does not support fp64"):
        Precision.from_name("fp64", torch.device("mps"))
