"""What a run is named by: all that changes its weights, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.job import STREAMS, Seeds, digest, identity, plain_name
from pipeline.job_file import build_job

BASE: dict[str, Any] = {"name": "a"}


def key(tree: dict[str, Any], *, fingerprint: str = "f", max_steps: int | None = None) -> str:
    return digest(identity(build_job({**BASE, **tree}, "here"), fingerprint=fingerprint, max_steps=max_steps))


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
def test_where_and_how_fast_and_defaults_written_out_change_nothing(tree: dict[str, Any]) -> None:
    assert key(tree) == key({})


@pytest.mark.parametrize(
    "tree",
    [
        {"name": "b"},
        {"seed": 2},
        *({"seed": {stream: 9}} for stream in STREAMS),
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
def test_what_changes_the_weights_or_the_choice_changes_the_identity(tree: dict[str, Any]) -> None:
    assert key(tree) != key({})


def test_the_data_and_max_steps_count() -> None:
    assert len({key({}), key({}, fingerprint="g"), key({}, max_steps=5), key({}, max_steps=6)}) == 4


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})


def test_streams_take_their_own_seed_or_that_of_all() -> None:
    seeds = Seeds(all=5, split=0)
    assert {stream: seeds.of(stream) for stream in STREAMS} == {**dict.fromkeys(STREAMS, 5), "split": 0}


@pytest.mark.parametrize(
    "name",
    ["..", ".", "", "a/b", "../a", "a\\b", ".hidden", "-x", "a b", "a\n", "a..b", "ä", "a" * 129, "models"],
)
def test_a_name_that_could_lead_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"name|taken"):
        plain_name(name)


@given(st.text(max_size=12))
def test_a_name_is_refused_or_one_plain_part_of_a_path(name: str) -> None:
    try:
        plain_name(name)
    except ValueError:
        return
    assert name
    assert not set(name) & set("/\\\0\n %:?*")
    assert ".." not in name
    assert name[0].isalnum()
