"""A rank's copy of the model: precision, clipping, what it draws, its buffers, and going on from saved state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.device import Arithmetic
from pipeline.errors import JobError
from pipeline.learn.flat import FlatModel
from pipeline.learn.scaling import INITIAL_SCALE
from pipeline.learn.trainee import Trainee
from tests.learn.trainees import CPU, make_batch, make_job, make_trainee, mean_gradients, model_of

CNN = {"kind": "cnn", "conv": [{"channels": 3, "kernel": 3, "pool": 2}], "hidden": [8]}


def steps(trainee: Trainee, count: int, *, first: int = 1, lr: float = 0.1, rows: int = 6) -> None:
    for step in range(first, first + count):
        inputs, targets = make_batch(trainee._job, rows, seed=step)
        trainee.gradient(step, inputs, targets)
        trainee.update(lr)


def bits(trainee: Trainee) -> list[bytes]:
    state: dict[str, Tensor] = {**trainee.flat.weights(), **trainee.state()}
    return [tensor.numpy().tobytes() for _, tensor in sorted(state.items())]


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", [{"hidden": [7]}, CNN], ids=["mlp", "cnn"])
def test_every_precision_learns(precision: str, model: dict[str, Any]) -> None:
    trainee = make_trainee(make_job(model=model, train={"precision": precision}))
    assert trainee.flat.values.dtype == (torch.float64 if precision == "fp64" else torch.float32)
    inputs, targets = make_batch(trainee._job, 16)
    losses = []
    for step in range(1, 41):
        trainee.gradient(step, inputs, targets)
        losses.append(float(trainee.flat.loss / trainee.flat.weight))
        trainee.update(0.3)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.005)])
def test_half_precision_gradients_are_near_those_of_fp64(precision: str, tolerance: float) -> None:
    exact = make_job(train={"precision": "fp64"})
    half = make_job(train={"precision": precision})
    inputs, targets = make_batch(exact, 32)
    reference = mean_gradients(make_trainee(exact), inputs, targets)
    gradient = mean_gradients(make_trainee(half), inputs, targets).double()
    assert float((gradient - reference).norm() / reference.norm()) < tolerance


def test_fp16_skips_an_update_that_overflows() -> None:
    trainee = make_trainee(make_job(train={"precision": "fp16", "optimizer": {"kind": "adam"}}))
    steps(trainee, 2)
    before = trainee.flat.weights() | trainee.state()
    inputs, targets = make_batch(trainee._job, 4)
    trainee.gradient(3, inputs * 3e3, targets)  # fits fp16, but not once multiplied by the scale
    assert torch.isfinite(trainee.flat.loss)
    assert not torch.isfinite(trainee.flat.gradient).all()
    trainee.update(0.1)
    after = trainee.flat.weights() | trainee.state()
    assert float(after.pop("scale.factor")) == INITIAL_SCALE / 2
    assert int(after.pop("scale.good_steps")) == 0
    assert int(after.pop("scale.skipped")) == 1
    assert float(after["optimizer.step"]) == 2
    for name in after:
        assert torch.equal(after[name], before[name]), name
    steps(trainee, 1)
    assert not torch.equal(trainee.flat.weights()["0.weight"], before["0.weight"])


def test_the_scale_leaves_the_size_of_gradients_and_losses_alone() -> None:
    trainee = make_trainee(make_job(train={"precision": "fp16"}))
    inputs, targets = make_batch(trainee._job, 8)
    first = mean_gradients(trainee, inputs, targets).clone()
    loss = float(trainee.flat.loss)
    assert trainee._scale is not None
    trainee._scale.factor.mul_(0.25)
    torch.testing.assert_close(mean_gradients(trainee, inputs, targets), first, rtol=1e-2, atol=1e-3)
    assert float(trainee.flat.loss) == loss


def test_clipping_is_torchs() -> None:
    free, clipped = make_job(train={"precision": "fp64"}), make_job(train={"precision": "fp64", "clip_norm": 0.05})
    inputs, targets = make_batch(free, 9)
    model = model_of(free).double()
    nn.functional.cross_entropy(model(inputs.double()), targets).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    trainee = make_trainee(clipped)
    trainee.gradient(1, inputs, targets)
    trainee.update(0.5)
    for name, tensor in trainee.flat.weights().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-11, atol=1e-13)
    roomy = make_trainee(make_job(train={"precision": "fp64", "clip_norm": 1e9}))
    unclipped = make_trainee(free)
    steps(roomy, 3)
    steps(unclipped, 3)
    assert bits(roomy) == bits(unclipped)


@pytest.mark.parametrize(
    "tree",
    [
        {"train": {"optimizer": {"kind": "sgd", "momentum": 0.9}}},
        {"train": {"optimizer": {"kind": "adamw"}, "precision": "fp16"}},
        {"model": {"hidden": [7], "dropout": 0.5, "batch_norm": True}, "train": {"optimizer": {"kind": "adam"}}},
        {"model": {**CNN, "batch_norm": True}},
        {
            "model": {**CNN, "batch_norm": True, "freeze": ["features.*"]},
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
def test_going_on_from_saved_state_is_bit_identical(tree: dict[str, Any]) -> None:
    whole, cut = make_trainee(make_job(**tree)), make_trainee(make_job(**tree))
    steps(whole, 6)
    steps(cut, 3)
    weights, state = cut.flat.weights(), cut.state()
    fresh = make_trainee(make_job(**tree))
    torch.rand(17)  # other draws in between
    fresh.load(weights, state)
    steps(fresh, 3, first=4)
    assert bits(fresh) == bits(whole)


def test_saved_weights_are_copies() -> None:
    trainee = make_trainee(make_job(train={"optimizer": {"kind": "adam"}}))
    steps(trainee, 1)
    weights, state = trainee.flat.weights(), trainee.state()
    kept = {name: tensor.clone() for name, tensor in (weights | state).items()}
    steps(trainee, 1, first=2)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in (weights | state).items())


def test_a_draw_is_a_function_of_the_step() -> None:
    job = make_job(model={"hidden": [40], "dropout": 0.5})
    inputs, targets = make_batch(job, 9)
    trainee = make_trainee(job)
    first = mean_gradients(trainee, inputs, targets, step=8).clone()
    other = mean_gradients(trainee, inputs, targets, step=9).clone()
    trainee.outputs(inputs)
    torch.rand(5)
    assert torch.equal(mean_gradients(trainee, inputs, targets, step=8), first)
    assert not torch.equal(other, first)
    assert torch.equal(mean_gradients(make_trainee(job), inputs, targets, step=8), first)


def test_evaluation_neither_draws_nor_learns() -> None:
    trainee = make_trainee(make_job(model={"hidden": [9], "dropout": 0.5, "batch_norm": True}))
    steps(trainee, 2)
    inputs, _ = make_batch(trainee._job, 5)
    before = bits(trainee)
    assert torch.equal(trainee.outputs(inputs), trainee.outputs(inputs))
    assert torch.equal(trainee.outputs(inputs)[:2], trainee.outputs(inputs)[:2])
    assert bits(trainee) == before


def test_weights_are_views_of_one_vector_and_named_as_in_sequential() -> None:
    trainee = make_trainee(make_job())
    steps(trainee, 2)
    weights = trainee.flat.weights()
    assert list(weights) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(torch.cat([tensor.reshape(-1) for tensor in weights.values()]), trainee.flat.values)
    assert torch.equal(
        trainee.outputs(make_batch(trainee._job, 3)[0]), trainee.flat.model(make_batch(trainee._job, 3)[0])
    )


class WithMask(nn.Module):
    """A buffer that is infinite, a frozen parameter, and a parameter used twice."""

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


def test_a_model_with_tied_and_frozen_parameters_trains() -> None:
    trainee = make_trainee(make_job(), model=WithMask(), way="eager")
    reference = WithMask()
    reference.load_state_dict(trainee.flat.weights())
    inputs, targets = make_batch(trainee._job, 6)
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.1)
    for step in (1, 2, 3):
        trainee.gradient(step, inputs, targets)
        trainee.update(0.1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(inputs), targets).backward()
        optimizer.step()
    for name, tensor in trainee.flat.weights().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_buffers_are_averaged_by_samples() -> None:
    counts, means = (
        [5, 1, 0],
        [torch.tensor([1.0, 4.0]), torch.tensor([7.0, -2.0]), torch.tensor([100.0, float("inf")])],
    )
    ranks = [FlatModel(nn.BatchNorm1d(2), CPU, torch.float64, 3) for _ in counts]
    for rank, count, mean in zip(ranks, counts, means, strict=True):
        rank.buffers[0].copy_(mean)
        rank.exchange.zero_()
        rank.count.fill_(count)
        rank.pack_buffers(count)
    total = sum(rank.exchange for rank in ranks)
    assert isinstance(total, Tensor)
    ranks[2].exchange.copy_(total)
    ranks[2].unpack_buffers()
    assert ranks[2].buffers[0].tolist() == [(5 * 1 + 7) / 6, (5 * 4 - 2) / 6]
    assert ranks[2].buffers[1].tolist() == [1.0, 1.0]


def test_what_cannot_be_trained_is_an_error_of_the_job() -> None:
    with pytest.raises(JobError, match="no trainable parameters"):
        make_trainee(make_job(), model=nn.Flatten(), way="eager")
    wrong = make_trainee(make_job(), model=nn.Sequential(nn.Flatten(), nn.Linear(30, 3)), way="eager")
    with pytest.raises(JobError, match=r"\(2, 3\) for 2 samples, but the task needs \(2, 4\)"):
        wrong.outputs(make_batch(make_job(), 2)[0])


def test_there_is_no_fp64_on_mps() -> None:
    with pytest.raises(JobError.__mro__[1], match="no fp64"):
        Arithmetic.of("fp64", torch.device("mps"))
