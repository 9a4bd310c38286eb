"""The identity of a run, which names it: everything that changes its weights, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import SEED_STREAMS, SeedConfig, compute_identity, digest_tree, validate_name
from pipeline.config.files import build_job

BASE: dict[str, Any] = {"name": "a"}


def identity_of(tree: dict[str, Any], *, fingerprint: str = "f", max_steps: int | None = None) -> str:
    return digest_tree(
        compute_identity(build_job({**BASE, **tree}, "here"), fingerprint=fingerprint, max_steps=max_steps)
    )


@pytest.mark.parametrize(
    "tree",
    [
        {"scale": {"workers": 3, "device": "cpu", "threads": 2, "retries": 0, "cpus_per_worker": 2}},
        {"storage": "s3://elsewhere"},
        {"checkpoint": {"every_steps": 3, "keep": 1, "every_minutes": None}},
        {"data": {"root": "/elsewhere"}},
        {"data": {"loader": {"processes": 4, "pin_memory": True, "eval_batch_size": 7}}},
        {"train": {"batch_size": 100}},
        {"seed": {"all": 1}},
    ],
)
def test_location_speed_and_explicit_defaults_keep_the_identity(tree: dict[str, Any]) -> None:
    assert identity_of(tree) == identity_of({})


@pytest.mark.parametrize(
    "tree",
    [
        {"name": "b"},
        {"seed": 2},
        *({"seed": {stream: 9}} for stream in SEED_STREAMS),
        {"data": {"source": "disc"}},
        {"data": {"normalize": "none"}},
        {"data": {"splits": {"val": 0.1}}},
        {"data": {"shuffle": False}},
        {"data": {"augment": {"flip": True}}},
        {"model": {"hidden": []}},
        {"model": {"activation": "tanh"}},
        {"model": {"kind": "a:B", "args": {"x": 1}}},
        {"task": {"class_weights": "balanced"}},
        {"train": {"batch_size": 99}},
        {"train": {"micro_batch": 10}},
        {"train": {"phases": [{"epochs": 5, "lr": 0.5}]}},
        {"train": {"optimizer": {"momentum": 0.9}}},
        {"train": {"precision": "fp64"}},
        {"train": {"compile": "off"}},
        {"evaluate": {"every_steps": 5}},
        {"best": {"patience": 3}},
    ],
)
def test_settings_that_affect_weights_or_selection_change_the_identity(tree: dict[str, Any]) -> None:
    assert identity_of(tree) != identity_of({})


def test_data_and_max_steps_change_the_identity() -> None:
    assert (
        len(
            {
                identity_of({}),
                identity_of({}, fingerprint="g"),
                identity_of({}, max_steps=5),
                identity_of({}, max_steps=6),
            }
        )
        == 4
    )


def test_digest_is_independent_of_key_order() -> None:
    assert digest_tree({"a": 1, "b": {"c": 2, "d": 3}}) == digest_tree({"b": {"d": 3, "c": 2}, "a": 1})


def test_stream_seeds_default_to_the_common_seed() -> None:
    seeds = SeedConfig(all=5, split=0)
    assert {stream: seeds.for_stream(stream) for stream in SEED_STREAMS} == {
        **dict.fromkeys(SEED_STREAMS, 5),
        "split": 0,
    }


@pytest.mark.parametrize(
    "name",
    ["..", ".", "", "a/b", "../a", "a\\b", ".hidden", "-x", "a b", "a\n", "a..b", "ä", "a" * 129, "models"],
)
def test_name_that_escapes_its_folder_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match=r"name|reserved"):
        validate_name(name)


@given(st.text(max_size=12))
def test_name_is_rejected_or_a_single_path_component(name: str) -> None:
    try:
        validate_name(name)
    except ValueError:
        return
    assert name
    assert not set(name) & set("/\\\0\n %:?*")
    assert ".." not in name
    assert name[0].isalnum()
