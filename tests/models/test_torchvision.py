"""torchvision models: adapted to the task, untrained and pretrained, frozen, and errors that name the fix."""

from __future__ import annotations

import io
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from pipeline.config import JobConfig, TorchvisionModelConfig
from pipeline.errors import JobError
from pipeline.models import build_model
from pipeline.models.freezing import last_layer_names
from pipeline.models.torchvision import load_pretrained
from pipeline.setup.initial_weights import InitialWeights, find_initial_weights, load_matching_weights
from tests.training.factories import make_batch, make_engine, make_job

SMALL = "torchvision:mobilenet_v3_small"


def make_torchvision_job(kind: str, **model: Any) -> JobConfig:
    return make_job(model={"kind": kind, **model})


def build_from_config(kind: str, shape: tuple[int, ...] = (3, 32, 32), seed: int = 1, **model: Any) -> nn.Module:
    return build_model(make_torchvision_job(kind, **model), shape, 4, seed)


HEAD_LAYERS = {
    "torchvision:resnet18": "fc",
    SMALL: "classifier.3",
    "torchvision:squeezenet1_1": "classifier.1",
    "torchvision:shufflenet_v2_x0_5": "fc",
}


@pytest.mark.parametrize(("kind", "head"), HEAD_LAYERS.items())
def test_last_layer_fits_and_is_outside_the_backbone(kind: str, head: str) -> None:
    model = build_from_config(kind, freeze="backbone")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"{head}.weight", f"{head}.bias"}
    assert model.get_parameter(f"{head}.weight").shape[0] == 4
    assert last_layer_names(model) == [f"{head}.weight", f"{head}.bias"]
    again, other = build_from_config(kind), build_from_config(kind, seed=2)
    first = model.get_parameter(f"{head}.weight")
    assert torch.equal(first, again.get_parameter(f"{head}.weight"))
    assert not torch.equal(first, other.get_parameter(f"{head}.weight"))


@pytest.mark.parametrize(
    ("kind", "shape", "args"),
    [
        ("torchvision:googlenet", (3, 64, 64), {}),
        ("torchvision:squeezenet1_1", (1, 28, 28), {}),
        ("torchvision:shufflenet_v2_x0_5", (5, 32, 32), {}),
        (SMALL, (3, 32, 32), {"dropout": 0.5}),
    ],
)
def test_any_number_of_channels_and_no_auxiliary_output(
    kind: str, shape: tuple[int, ...], args: dict[str, Any]
) -> None:
    model = build_from_config(kind, shape, args=args)
    engine = make_engine(make_job(), model=model, gradient_backend="eager", shape=shape)
    inputs, targets = make_batch(make_job(), 2, shape=shape)
    engine.forward_backward(1, inputs, targets)
    assert torch.isfinite(engine.flat.grad).all()


@pytest.mark.parametrize(
    ("model", "shape", "where", "words"),
    [
        ({"kind": "torchvision:resnet19"}, (3, 32, 32), "model.kind: torchvision:resnet19", "resnet18"),
        ({"kind": "torchvision:fcn_resnet50"}, (3, 32, 32), "model.kind: torchvision:fcn_resnet50", "resnet50"),
        ({"kind": "torchvision:resnet18"}, (13,), "model.kind", "kind: mlp"),
        ({"kind": "torchvision:resnet18", "weights": "DEFAULT"}, (1, 32, 32), "model.weights", "data.mode: rgb"),
        ({"kind": "torchvision:resnet18", "args": {"num_classes": 3}}, (3, 32, 32), "model.args.num_classes", "task"),
        (
            {"kind": "torchvision:resnet18", "args": {"wide": 3}},
            (3, 32, 32),
            "model.kind: torchvision:resnet18",
            "args",
        ),
        ({"kind": "torchvision:alexnet"}, (3, 16, 16), "model.kind: torchvision:alexnet", "data.resize"),
        ({"kind": "torchvision:vit_b_32"}, (3, 64, 64), "model.kind: torchvision:vit_b_32", "data.resize"),
        (
            {"kind": "torchvision:googlenet", "args": {"aux_logits": True}},
            (3, 64, 64),
            "model.args.aux_logits",
            "leave it out",
        ),
    ],
)
def test_invalid_model_error_names_its_field(
    model: dict[str, Any], shape: tuple[int, ...], where: str, words: str
) -> None:
    with pytest.raises(JobError) as caught:
        build_model(make_job(model=model), shape, 4, 1)
    assert caught.value.where == where
    assert words in caught.value.fix


@pytest.fixture(scope="module")
def published_model() -> nn.Module:
    """A model as torchvision publishes it, with 1,000 classes."""
    torch.manual_seed(7)
    model: nn.Module = models.mobilenet_v3_small()
    return model


def make_start(path: Path) -> InitialWeights:
    start = find_initial_weights(make_torchvision_job(SMALL, weights=str(path)), "unused")
    assert start is not None
    return start


def test_local_file_initializes_all_but_the_head(published_model: nn.Module, tmp_path: Path) -> None:
    torch.save(published_model.state_dict(), tmp_path / "small.pth")
    save_file(published_model.state_dict(), tmp_path / "small.safetensors")
    starts = [make_start(tmp_path / name) for name in ("small.pth", "small.safetensors")]
    assert starts[0].digest == starts[1].digest
    fresh, model = (
        build_from_config(SMALL),
        build_from_config(SMALL, weights=str(tmp_path / "small.pth"), freeze="backbone"),
    )
    assert load_matching_weights(model, starts[0], strict=True) == []
    state, given, head = model.state_dict(), published_model.state_dict(), last_layer_names(model)
    assert all(torch.equal(tensor, given[name]) for name, tensor in state.items() if name not in head)
    assert all(torch.equal(state[name], fresh.state_dict()[name]) for name in head)
    with torch.no_grad():
        published_model.get_parameter("features.0.0.weight").add_(1)
    torch.save(published_model.state_dict(), tmp_path / "small.pth")
    assert make_start(tmp_path / "small.pth").digest != starts[0].digest
    with pytest.raises(JobError, match=r"of another shape: features\.\S+ \(\d+, .*, in this model \(") as caught:
        load_matching_weights(build_from_config(SMALL, args={"reduced_tail": True}), starts[0], strict=True)
    assert caught.value.where == f"model.weights: {tmp_path / 'small.pth'}"


def test_torch_hub_cache_is_used_and_missing_network_is_reported(
    published_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))

    def no_network(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    spec = make_torchvision_job(SMALL, weights="DEFAULT").model
    assert isinstance(spec, TorchvisionModelConfig)
    with pytest.raises(JobError, match=r"cannot be downloaded from https://.*no route to host") as caught:
        load_pretrained(spec)
    assert caught.value.exit_code == 2
    assert "model.weights" in caught.value.fix
    file = models.MobileNet_V3_Small_Weights.DEFAULT.url.rpartition("/")[2]
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    torch.save(published_model.state_dict(), tmp_path / "checkpoints" / file)
    weights, name = load_pretrained(spec)
    assert name == "torchvision's MobileNet_V3_Small_Weights.IMAGENET1K_V1"
    assert all(torch.equal(tensor, weights[key]) for key, tensor in published_model.state_dict().items())


class Canary:
    """Code that must not run when a file is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1/0",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no weights at all", "cannot be read"),
        (b"", "cannot be read"),
        (Canary(), "cannot be read"),
        ({"model": {"weight": torch.ones(2)}}, "is not a state dict"),
        (torch.ones(2), "is not a state dict"),
    ],
    ids=["text", "empty", "code", "nested", "tensor"],
)
def test_file_without_weights_is_rejected(content: Any, words: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    for name in ("weights.pth", "weights.safetensors") if isinstance(content, bytes) else ("weights.pth",):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else buffer.getvalue())
        with pytest.raises(JobError, match=words) as caught:
            make_start(tmp_path / name)
        assert caught.value.where == f"model.weights: {tmp_path / name}"
        assert caught.value.fix


def test_missing_pretrained_weights() -> None:
    with pytest.raises(JobError, match="neither a file nor weights of mobilenet_v3_small") as caught:
        find_initial_weights(make_torchvision_job(SMALL, weights="IMAGENET1K_V9"), "unused")
    assert "did you mean IMAGENET1K_V1" in caught.value.fix
    with pytest.raises(JobError, match="both"):
        find_initial_weights(make_torchvision_job(SMALL, weights="DEFAULT", init_from="other"), "unused")


def test_state_dict_keys_of_old_files_are_converted(tmp_path: Path) -> None:
    """As torchvision does: googlenet's auxiliary heads are dropped, and densenet's `norm.1` is renamed `norm1`."""
    google = {f"{part}.conv.weight": torch.ones(2) for part in ("aux1", "aux2", "conv1")}
    dense = {f"features.denseblock1.denselayer2.{key}": torch.ones(2) for key in ("norm.1.bias", "conv.2.weight")}
    for kind, tensors, expected in (
        ("torchvision:googlenet", google, {"conv1.conv.weight"}),
        (
            "torchvision:densenet121",
            dense,
            {f"features.denseblock1.denselayer2.{key}" for key in ("norm1.bias", "conv2.weight")},
        ),
    ):
        torch.save(tensors, tmp_path / "old.pth")
        start = find_initial_weights(make_torchvision_job(kind, weights=str(tmp_path / "old.pth")), "unused")
        assert start is not None
        assert set(start.state_dict) == expected
