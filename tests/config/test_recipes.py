"""The recipe of a kind of data fills the sections that a job file leaves out, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import JobConfig
from pipeline.config.files import build_job, dump_job, list_recipe_sections, parse_job, resolve_job
from pipeline.config.recipes import TABLE_RECIPE, auto_batch_size
from pipeline.errors import JobError

TABLE: dict[str, Any] = {"source": "parquet", "url": "/x", "label": "y"}
ALL_SECTIONS = ["data.normalize", "model", "train.optimizer", "train.phases", "train.batch_size", "best"]


def make_tree(**sections: Any) -> dict[str, Any]:
    return {"name": "a", "data": TABLE, **sections}


def without_recipe(tree: dict[str, Any]) -> dict[str, Any]:
    return build_job(tree, "test").to_dict()


def test_a_table_gets_all_sections_of_the_recipe() -> None:
    job = resolve_job(make_tree()).to_dict()
    assert list_recipe_sections(make_tree()) == ALL_SECTIONS
    assert {key: job["model"][key] for key in TABLE_RECIPE.model} == TABLE_RECIPE.model
    assert {key: job["train"]["optimizer"][key] for key in TABLE_RECIPE.optimizer} == TABLE_RECIPE.optimizer
    assert [phase["epochs"] for phase in job["train"]["phases"]] == [80]
    assert job["train"]["batch_size"] == "auto"
    assert job["best"] == {"metric": "val/loss", "mode": "min", "patience": 20}


@pytest.mark.parametrize(
    ("given_sections", "filled"),
    [
        ({"model": {"hidden": [8]}}, ["data.normalize", *ALL_SECTIONS[2:]]),
        ({"train": {"batch_size": 7}}, ["data.normalize", "model", "train.optimizer", "train.phases", "best"]),
        ({"train": {"optimizer": {"kind": "adam"}}}, ["data.normalize", "model", "train.batch_size", "best"]),
        ({"train": {"phases": [{"epochs": 1, "lr": 0.1}]}}, ["data.normalize", "model", "train.batch_size", "best"]),
        ({"train": {"clip_norm": 1.0}}, ALL_SECTIONS),
        ({"best": {"patience": 3}}, ALL_SECTIONS[:-1]),
        ({"task": "regression", "seed": 3}, ALL_SECTIONS),
    ],
)
def test_a_section_that_is_given_keeps_the_defaults_of_its_class(
    given_sections: dict[str, Any], filled: list[str]
) -> None:
    tree = make_tree(**given_sections)
    assert list_recipe_sections(tree) == filled
    job, plain = resolve_job(tree).to_dict(), without_recipe(tree)
    for section in set(ALL_SECTIONS) - set(filled):
        first, _, second = section.partition(".")
        assert (job[first][second] if second else job[first]) == (plain[first][second] if second else plain[first])


@pytest.mark.parametrize("data", [{}, {"source": "cifar10"}, {"source": "image_folder", "url": "/x"}])
def test_images_get_a_convolutional_network(data: dict[str, Any]) -> None:
    tree = {"name": "a", **({"data": data} if data else {})}
    assert list_recipe_sections(tree) == ALL_SECTIONS[1:-1]
    job = resolve_job(tree).to_dict()
    assert (job["model"]["kind"], job["model"]["batch_norm"], job["train"]["batch_size"]) == ("cnn", True, "auto")
    assert [phase["schedule"] for phase in job["train"]["phases"]] == ["one_cycle"]
    mlp = resolve_job(tree, ["model.kind=mlp"]).to_dict()
    assert mlp["model"]["hidden"] == [32]


@pytest.mark.parametrize(
    "data",
    [{"source": "disc"}, {"source": {"call": "m:f"}}, {**TABLE, "shape": [1, 28, 28]}],
)
def test_data_without_a_recipe_keeps_the_defaults(data: dict[str, Any]) -> None:
    tree = make_tree(data=data)
    assert list_recipe_sections(tree) == []
    assert resolve_job(tree).to_dict() == without_recipe(tree)


@pytest.mark.parametrize(
    ("sections", "patience"),
    [
        ({}, 20),
        ({"evaluate": {"every_epochs": 1}}, 20),
        ({"evaluate": {"every_steps": 5}}, None),
        ({"evaluate": {"every_epochs": 4}}, None),
        ({"evaluate": {"splits": ["train"]}}, None),
        ({"data": {**TABLE, "splits": {"val": 0}}}, None),
        ({"data": {**TABLE, "splits": {"by": "range", "train": [0, 9]}}}, None),
        ({"data": {**TABLE, "splits": {"by": "range", "train": [0, 9], "val": [9, 12]}}}, 20),
        ({"data": {**TABLE, "splits": {"by": "time", "column": "day"}}}, 20),
    ],
)
def test_patience_counts_evaluations_of_the_validation_split_after_each_epoch(
    sections: dict[str, Any], patience: int | None
) -> None:
    assert resolve_job(make_tree(**sections)).best.patience == patience


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["model.dropout=0.3"], "model.dropout", 0.3),
        (["model.dropout=0.3"], "model.hidden", [256, 128]),
        (["train.phases.0.lr=0.1"], "train.phases.0.epochs", 80),
        (["train.optimizer.weight_decay=0"], "train.optimizer.kind", "adamw"),
        (["train.optimizer.kind=sgd"], "train.optimizer.weight_decay", 0.0),
        (["train.batch_size=9"], "train.batch_size", 9),
        (["best.patience=3"], "best.patience", 3),
        (["model.kind=cnn"], "model.kind", "cnn"),
        (["model={kind: cnn}"], "model.kind", "cnn"),
        (["model={kind: mlp}"], "model.hidden", [32]),
        (["train.optimizer={kind: adamw}"], "train.optimizer.weight_decay", 0.0),
        (["best={metric: val/auc}"], "best.patience", None),
        (["best.metric=val/auc"], "best.mode", "max"),
        (["best.metric=val/auc"], "best.patience", 20),
        (["data.source=disc", "data.url=null", "data.label=null"], "train.batch_size", 100),
    ],
)
def test_overrides_change_the_recipe(overrides: list[str], key: str, value: Any) -> None:
    node: Any = resolve_job(make_tree(), overrides).to_dict()
    for part in key.split("."):
        node = node[int(part)] if part.isdigit() else node[part]
    assert node == value


def test_an_override_may_make_it_a_table() -> None:
    overrides = [f"data.{key}={value}" for key, value in TABLE.items()]
    assert resolve_job({"name": "a", "data": {"source": "disc"}}, overrides).best.patience == 20


def test_a_base_may_give_sections(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: base\nmodel: {hidden: [8]}\ntrain: {batch_size: 5}\n")
    (tmp_path / "job.yaml").write_text("base: base.yaml\ndata: {source: parquet, url: x, label: y}\n")
    job = resolve_job(tmp_path / "job.yaml")
    assert (job.to_dict()["model"]["hidden"], job.train.batch_size) == ([8], 5)
    assert list_recipe_sections(tmp_path / "job.yaml") == ["data.normalize", "train.optimizer", "train.phases", "best"]


def test_a_stored_job_is_never_filled_in() -> None:
    job = build_job(make_tree(), "test")
    assert parse_job(dump_job(job), "there") == job
    assert resolve_job(job) == job
    filled = resolve_job(make_tree())
    assert parse_job(dump_job(filled), "there") == filled
    assert isinstance(filled, JobConfig)
    assert list_recipe_sections(filled) == []


def test_the_recipe_leaves_a_broken_job_to_the_validation() -> None:
    for tree in ({"name": "a", "data": 3}, make_tree(train=3), make_tree(data={"source": ["x"]}), make_tree(best=None)):
        with pytest.raises(JobError):
            resolve_job(tree)


@given(st.integers(1, 20_000))
def test_the_automatic_batch_grows_with_the_table(rows: int) -> None:
    assert auto_batch_size(rows) <= auto_batch_size(rows + 1)
    expected = 32 if rows < 2_800 else 64 if rows < 4_500 else 128 if rows < 6_400 else 256
    assert auto_batch_size(rows) == expected
