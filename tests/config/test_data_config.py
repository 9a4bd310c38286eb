"""The keys of `data` depend on the source; runs of jobs that were stored with all keys are found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import (
    SOURCE_CONFIGS,
    JobConfig,
    UserFunctionDataConfig,
    compute_identity,
    digest_tree,
    sources_with,
)
from pipeline.config.data import COMMON_KEYS
from pipeline.config.files import build_job, dump_job, load_job, override_job, parse_job
from pipeline.config.job import IDENTITY_OF_OTHER_SOURCES, IDENTITY_OPTIONAL_KEYS
from pipeline.errors import JobError

JOBS = Path(__file__).parents[2] / "jobs"

FILES = {
    "cifar10.yaml": "70d286402ce3bc8211183f5fcbe4c47a46ee4440b39e47f954e5868cac6949ac",
    "cifar100.yaml": "6c0a58e77929375d82302f3f068e7d2beea866e937ebcb6af9c9da24d28d83d1",
    "cnn.yaml": "18ae6108530e09eba3fa29de879ebbdc905165497498e3253272ab9486e3d787",
    "disc.yaml": "df107ef73241f046cbd44e797dff597e0a9dee4bce4cdc57f8de159e3f318a84",
    "finetune.yaml": "8c94130642c89cf647ae762fe611adc6465577bb5504235eede8a768f596b108",
    "mnist.yaml": "9b2d89c4660e6f4a4588b6614da37bdffe6c781fb74e8757742857719bc5fd23",
    "mnist_128.yaml": "6e25b135fb55ee88d6ff335be44f853b5212d6374f7177588ec8c75df5515733",
    "mnist_logistic.yaml": "961585e7b8ef069964d76f2acb76e271285d7badbf663e4ab0268ec01edbadab",
    "examples/own_model/job.yaml": "6fd4e90c528f884bb85be344d14f217b0cbaeeffc795f0fc7d461c172236c338",
    "pictures.yaml": "a66f215ecd1916a49f2ba2d560ae1d836f292fd8b41d16a125fef40749c16883",
    "pigeon.yaml": "66bde0d1e9b79706f03a32e421ea0832014cf7b1804823d173190150a1dc14df",
    "pigeon_batch1.yaml": "d2b23e6dc7ac671aaf53fc6b37c1db7124f81d1e770f24f88b8f86147d345daf",
    "regression.yaml": "8a408f8a19810c7bc42ba499ee5cbe1d13e3af799a0a462ed77e37d299292b03",
    "table.yaml": "19ebc9da808c99d62eda5e86222a9448b5963c1c5371c2b3114c29a907abf9b8",
}
"""Digest of the identity of each job file with the fingerprint `f`, from when every job had the keys of every source. A
change of a file in `jobs/` changes its digest; a change of the code must change none."""

PARQUET = {
    "source": "parquet",
    "url": "/x",
    "label": ["y", "z"],
    "features": ["num_*"],
    "keys": ["id"],
    "categorical": ["zip"],
    "missing": {"numeric": 0.5, "categorical": "fail"},
    "one_hot_up_to": 4,
    "splits": {"by": "time", "column": "day", "val": "14d"},
}
IMAGE_FOLDER = {
    "source": "image_folder",
    "url": "/x",
    "resize": [8, 9],
    "crop": 7,
    "mode": "grey",
    "on_error": "skip",
    "skip_up_to": 0.1,
}
CALL = {"source": {"call": "m:f", "args": {"n": 3}}, "shuffle": False}

JOB_TREES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"data": PARQUET, "task": "regression"}, {}, "b507a15efb51cb5ce29c231e9bc514039e5956c63181f8758c8390542726a46d"),
    (
        {"data": {"source": "parquet", "url": "/x", "label": "y", "shape": [1, 28, 28]}},
        {},
        "8ec940be74045205f0f1a2a858d2c97a0d3dbca8f89819931937ce294cb2aa1c",
    ),
    ({"data": IMAGE_FOLDER}, {}, "d219850e6f468344e2076b2e1f04c7875396a6af67802dafec8a73fe9d7618fd"),
    (
        {"data": {"source": "image_folder", "url": "/x.parquet", "label": "y", "path": "file"}},
        {},
        "024c9f9ffe6daac76b8e98e9cb5620edcbd006e7ed03596933582149b9216a82",
    ),
    ({"data": CALL}, {"max_steps": 5}, "1d03485c9511907cb18f5b039a34434572488c3912936908696a17aca16549e7"),
    (
        {"data": {"source": "disc"}},
        {"initial_weights_digest": "s"},
        "04a18a3c00c1d18167f8a3026d659ff65a6749dd4b8e659044b126ea617603c8",
    ),
    (
        {"data": {"source": "cifar100", "root": "/r", "augment": {"crop": 4, "flip": True}}},
        {},
        "9c5fd2b803a0e3b7d2141a2cc4daadf8d55444750eec7ebdedc5547b72be7473",
    ),
]

ALL_KEYS: dict[str, Any] = {"root": "~/.cache/trainyard", "url": None, **IDENTITY_OF_OTHER_SOURCES}
"""The values of the keys of other sources in a stored job of any source, as once written."""

SOURCES_OF_ALL_KEYS = ("mnist", "fashion_mnist", "cifar10", "cifar100", "disc", "parquet", "image_folder")
"""The sources of that time; the keys of later ones are in no other job."""


def stored_before(job: JobConfig) -> str:
    """The text of `job.yaml` as written when every job had the keys of every source."""
    tree = job.to_dict()
    return yaml.safe_dump({**tree, "data": {**ALL_KEYS, **tree["data"]}})


def test_every_job_file_has_a_digest_above() -> None:
    assert set(JOBS.rglob("*.yaml")) == {JOBS / name for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_the_identity_of_a_job_file_never_changes(name: str) -> None:
    assert digest_tree(compute_identity(load_job(JOBS / name), fingerprint="f")) == FILES[name]


@pytest.mark.parametrize(("tree", "known", "expected"), JOB_TREES)
def test_the_identity_of_a_job_of_each_source_never_changes(
    tree: dict[str, Any], known: dict[str, Any], expected: str
) -> None:
    assert digest_tree(compute_identity(build_job({"name": "a", **tree}, "here"), fingerprint="f", **known)) == expected


@pytest.mark.parametrize("tree", [tree for tree, _, _ in JOB_TREES] + [{}])
def test_a_job_stored_with_the_keys_of_all_sources_is_the_same_job(tree: dict[str, Any]) -> None:
    job = build_job({"name": "a", **tree}, "here")
    again = parse_job(stored_before(job), "there")
    assert again == job
    assert override_job(again, ["train.batch_size=7"]).data == job.data
    data = again.to_dict()["data"]
    config_class = UserFunctionDataConfig if isinstance(data["source"], dict) else SOURCE_CONFIGS[data["source"]]
    assert set(data) == set(config_class.model_fields), "only the keys of its source"
    assert parse_job(dump_job(again), "there") == job


def test_any_root_in_a_stored_job_of_another_source_is_ignored() -> None:
    job = build_job({"name": "a", "data": PARQUET, "task": "regression"}, "here")
    tree = yaml.safe_load(stored_before(job))
    tree["data"]["root"] = "/elsewhere"
    assert parse_job(yaml.safe_dump(tree), "there") == job
    assert override_job(job, ["data.root=/elsewhere"]) == job


@pytest.mark.parametrize(
    ("data", "overrides", "source"),
    [
        (CALL, ["data.source=mnist"], "mnist"),
        ({}, ["data.source=disc"], "disc"),
        ({}, ["data.source={call: 'm:f'}"], {"call": "m:f", "args": {}}),
        ({}, ["data.source=parquet", "data.url=/x", "data.label=y", "data.features.0=a"], "parquet"),
        ({"source": "parquet", "url": "/x", "label": "y"}, ["data.source=image_folder"], "image_folder"),
        ({"source": "image_folder", "url": "/x"}, ["data.source=parquet", "data.label=y"], "parquet"),
        (
            {"source": "parquet", "url": "/x", "label": "y"},
            ["data={source: cifar10, url: null, label: null}"],
            "cifar10",
        ),
    ],
)
def test_an_override_may_name_another_source(data: dict[str, Any], overrides: list[str], source: object) -> None:
    job = build_job({"name": "a", "data": data}, "here")
    for stored in (job, parse_job(stored_before(job), "there")):
        assert override_job(stored, overrides).to_dict()["data"]["source"] == source


def test_a_job_file_on_a_base_may_name_another_source(tmp_path: Path) -> None:
    assert load_job(JOBS / "cnn.yaml", ["data.source=fashion_mnist"]).data.source == "fashion_mnist"
    (tmp_path / "base.yaml").write_text("name: a\ndata: {root: raw, shuffle: false}\n")
    (tmp_path / "job.yaml").write_text("base: base.yaml\ndata: {source: parquet, url: x, label: y}\n")
    data = load_job(tmp_path / "job.yaml").data
    assert (data.source, data.shuffle, data.labels) == ("parquet", False, ["y"])


def test_all_set_keys_of_the_previous_source_are_named() -> None:
    job = build_job({"name": "a", "data": PARQUET, "task": "regression"}, "here")
    with pytest.raises(JobError) as caught:
        override_job(job, ["data.source=mnist"])
    lines = [line.strip() for line in caught.value.what.splitlines()]
    assert lines == [
        "7 problems",
        "data: url goes with source: parquet, csv, arrow, numpy, jsonl or image_folder",
        "data: label goes with source: parquet, csv, arrow, numpy, jsonl or image_folder",
        *(
            f"data: {key} goes with source: parquet, csv, arrow, numpy or jsonl"
            for key in ("features", "keys", "categorical", "missing", "one_hot_up_to")
        ),
    ]


def test_the_frozen_defaults_are_those_of_the_fields() -> None:
    for key, value in IDENTITY_OF_OTHER_SOURCES.items():
        owners = [SOURCE_CONFIGS[source].model_fields[key] for source in sources_with(key)]
        defaults = [field.get_default() for field in owners if not field.is_required()]
        assert [getattr(default, "model_dump", lambda default=default: default)() for default in defaults] == [
            value
        ] * len(defaults)
    keys = {key for source in SOURCES_OF_ALL_KEYS for key in SOURCE_CONFIGS[source].model_fields}
    assert set(ALL_KEYS) == keys - COMMON_KEYS - {"source"} - set(IDENTITY_OPTIONAL_KEYS["data"])


def test_the_source_comes_first_and_its_keys_next() -> None:
    keys = list(build_job({"name": "a", "data": IMAGE_FOLDER}, "here").to_dict()["data"])
    assert keys[:4] == ["source", "url", "label", "path"]
    assert set(keys[-6:]) == COMMON_KEYS
