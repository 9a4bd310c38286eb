"""Job files: reading them, messages about invalid ones, and writing them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.config import JobConfig
from pipeline.config.files import build_job, dump_job, load_job, parse_job, parse_yaml, resolve_job
from pipeline.errors import JobError


def load_text(text: str, folder: Path, *overrides: str) -> JobConfig:
    file = folder / "job.yaml"
    file.write_text(text, encoding="utf-8")
    return load_job(file, overrides)


def messages_of(text: str, folder: Path, *overrides: str) -> list[str]:
    """The lines of the error message, without location and fix."""
    with pytest.raises(JobError) as caught:
        load_text(text, folder, *overrides)
    assert caught.value.exit_code == 2
    assert caught.value.where
    return [line.strip() for line in caught.value.what.splitlines()]


# ------------------------------------------------------------------------------------------------ YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("y", "y"),
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("5e+2", 500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("-.inf", float("-inf")),
        ("010", 10),
        ("08", 8),
        ("0o10", 8),
        ("0xfF", 255),
        ("-7", -7),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-11-21", "2026-11-21"),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("e5", "e5"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    read = parse_yaml(text, "here")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    ["a: [", "a: 1\na: 2", "? [1]\n: 2", "a: !!python/object:os.system x", "a: !!binary aGk=", "a: &x [*x]", "\t- a",
     "[" * 5000, "a: " + "9" * 6000, "a: 1\n---\nb: 2", "a: \x07"],
)  # fmt: skip
def test_invalid_yaml_is_an_error_with_its_location(text: str) -> None:
    with pytest.raises(JobError, match="not valid YAML") as caught:
        parse_yaml(text, "job.yaml")
    assert caught.value.where.startswith("job.yaml")


def test_broken_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        load_text("name: a\ntrain: {\n", tmp_path)
    assert "line 3" in caught.value.where


# ------------------------------------------------------------------------------------------- base chains


def test_base_is_merged_and_lists_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "root.yaml").write_text(
        "name: root\ntask: binary\nseed: 0\ntrain: {batch_size: 7, phases: [{steps: 1, lr: 1}, {steps: 2, lr: 2}]}"
    )
    (tmp_path / "middle.yaml").write_text("base: shared/root.yaml\ntask: {positive: [3]}\nseed: {split: 4}")
    read = load_text("base: middle.yaml\nname: leaf\ntrain: {phases: [{steps: 5, lr: 3}]}", tmp_path)
    assert read.name == "leaf"
    assert (read.task.kind, read.task.positive) == ("binary", [3])
    assert (read.seed.for_stream("init"), read.seed.for_stream("split")) == (0, 4)
    assert read.train.batch_size == 7
    assert [phase.steps for phase in read.train.phases] == [5]


@pytest.mark.parametrize(
    ("below", "over", "expected"),
    [
        ("optimizer: {momentum: 0.9}", "optimizer: {kind: adam}", {"kind": "adam", "momentum": 0.0}),
        ("optimizer: {momentum: 0.9}", "optimizer: {kind: sgd}", {"kind": "sgd", "momentum": 0.9}),
        ("optimizer: {kind: adam, eps: 1}", "optimizer: {eps: 2}", {"kind": "adam", "eps": 2.0}),
        ("optimizer: {kind: adam, eps: 1}", "optimizer: {kind: sgd}", {"kind": "sgd", "eps": 1e-8}),
    ],
)
def test_other_kind_replaces_and_same_kind_merges(
    tmp_path: Path, below: str, over: str, expected: dict[str, Any]
) -> None:
    (tmp_path / "base.yaml").write_text(f"name: a\ntrain: {{{below}}}")
    read = load_text(f"base: base.yaml\ntrain: {{{over}}}", tmp_path).train.optimizer.model_dump()
    assert {key: read[key] for key in expected} == expected


@pytest.mark.parametrize("base", ["job.yaml", "other.yaml"])
def test_circular_bases_are_rejected(tmp_path: Path, base: str) -> None:
    (tmp_path / "other.yaml").write_text("base: job.yaml")
    assert "circular" in messages_of(f"base: {base}", tmp_path)[0]


@pytest.mark.parametrize("base", ["nowhere.yaml", "''", "[a]", "'a\\0b'", '"a\\0b"', "n" * 5000, "."])
def test_unreadable_base_is_an_error(tmp_path: Path, base: str) -> None:
    assert messages_of(f"base: {base}", tmp_path)


def test_missing_file_and_binary_file(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no such job file"):
        load_job(tmp_path / "absent.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JobError, match="cannot be read"):
        load_job(tmp_path / "bytes.yaml")


def test_environment_variables_are_substituted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH", "64")
    monkeypatch.setenv("WHO", "me")
    read = load_text("name: by-${WHO}\ntrain: {batch_size: '${BATCH}'}\nstorage: s3://b/${WHO}/${BATCH}", tmp_path)
    assert (read.name, read.train.batch_size, read.storage) == ("by-me", 64, "s3://b/me/64")
    monkeypatch.delenv("WHO")
    assert messages_of("name: by-${WHO}", tmp_path) == ["the environment has no WHO"]


# ------------------------------------------------------------------------------------------------- paths


def path_fields(job: JobConfig) -> dict[str, Any]:
    """The fields that may hold a local path, as resolved."""
    tree = job.to_dict()
    paths = {f"data.{key}": tree["data"][key] for key in ("url", "root") if key in tree["data"]}
    paths |= {f"model.{key}": tree["model"][key] for key in ("init_from", "weights") if key in tree["model"]}
    return {**paths, "cache": tree["data"]["cache"]["folder"], "storage": tree["storage"]}


def test_paths_in_files_are_relative_to_the_file_and_overrides_to_the_cwd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("jobs/shared", "here"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "jobs/shared/net.pth").touch()
    (tmp_path / "jobs/shared/base.yaml").write_text(
        "name: base\nstorage: runs\n"
        "data: {source: parquet, url: rows/*.parquet, label: y, root: raw, cache: {folder: cache}}\n"
        "model: {kind: 'torchvision:resnet18', weights: net.pth}\n"
    )
    (tmp_path / "jobs/job.yaml").write_text("base: shared/base.yaml\nname: job\ndata: {root: ../raw}\n")
    shared = tmp_path / "jobs/shared"
    expected = {
        "data.url": f"{shared}/rows/*.parquet",
        "model.init_from": None,
        "model.weights": f"{shared}/net.pth",
        "cache": f"{shared}/cache",
        "storage": "runs",
    }
    for path in ("../jobs/job.yaml", str(tmp_path / "jobs/job.yaml")):
        assert path_fields(load_job(path)) == expected

    overrides = ("data.url=rows.parquet", "data.cache={folder: ../cache}", "model={kind: mlp, init_from: runs/a@best}")
    assert path_fields(load_job("../jobs/job.yaml", overrides)) == {
        "data.url": f"{tmp_path}/here/rows.parquet",
        "model.init_from": f"{tmp_path}/here/runs/a@best",
        "cache": f"{tmp_path}/cache",
        "storage": "runs",
    }
    (tmp_path / "jobs/shared/named.yaml").write_text("name: base\ndata: {root: raw}\n")
    (tmp_path / "jobs/named.yaml").write_text("base: shared/named.yaml\n")
    assert path_fields(load_job("../jobs/named.yaml"))["data.root"] == f"{shared}/raw"
    assert path_fields(load_job("../jobs/named.yaml", ["data.root=../raw"]))["data.root"] == f"{tmp_path}/raw"
    from_python = resolve_job(build_job({"name": "p", "data": {"root": "raw"}}, "here"))
    assert path_fields(from_python)["data.root"] == f"{tmp_path}/here/raw"


@pytest.mark.parametrize("url", ["s3://b/x", "file:///x/y", "env:PLACE", "simplecache::s3://b/x", "/x/y", "memory://x"])
def test_absolute_paths_and_other_strings_are_unchanged(tmp_path: Path, url: str) -> None:
    data = f"data: {{source: parquet, label: y, url: '{url}', root: ~/raw}}"
    for start in ("base", "base@last", "s3://b/runs/base@3", "env:PLACE"):
        read = load_text(f"name: a\n{data}\nmodel: {{kind: mlp, init_from: '{start}'}}", tmp_path)
        assert path_fields(read) == {
            "data.url": url,
            "model.init_from": start,
            "cache": "~/.cache/trainyard/data",
            "storage": "./runs",
        }
        assert resolve_job(read) == read
    assert path_fields(load_text("name: a\ndata: {root: ~/raw}", tmp_path))["data.root"] == "~/raw"
    weights = load_text(f"name: a\n{data}\nmodel: {{kind: 'torchvision:resnet18', weights: DEFAULT}}", tmp_path)
    assert path_fields(weights)["model.weights"] == "DEFAULT"


# -------------------------------------------------------------------------------------------- overriding


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.batch_size=256", "train.batch_size", 256),
        ("train.batch_size=all", "train.batch_size", "all"),
        ("train.clip_norm=1e-3", "train.clip_norm", 0.001),
        ("train.phases.0.lr=0.25", "train.phases.0.lr", 0.25),
        ("train.phases.0.epochs=9", "train.phases.0.epochs", 9),
        ("model.hidden=[8, 4]", "model.hidden", [8, 4]),
        ("model.hidden.0=64", "model.hidden.0", 64),
        ("model={kind: cnn}", "model.conv.0.channels", 6),
        ("evaluate.splits=[train]", "evaluate.splits", ["train"]),
        ("data.shuffle=False", "data.shuffle", False),
        ("seed=5", "seed.all", 5),
        ("seed.split=7", "seed.split", 7),
        ("task=binary", "task.kind", "binary"),
        ("task.class_weights.1=2.5", "task.class_weights.1", 2.5),
        ("task.class_weights.-1=2.5", "task.class_weights.-1", 2.5),
        ("data.normalize={mean: 0, std: 2}", "data.normalize.std", 2),
        ("train.compile=on", "train.compile", "on"),
        ("train.compile=true", "train.compile", "on"),
        ("storage=a=b", "storage", "a=b"),
        (" data.root =/x", "data.root", "/x"),
    ],
)
def test_override_sets_its_field(tmp_path: Path, override: str, path: str, value: object) -> None:
    node: Any = load_text("name: a", tmp_path, override).to_dict()
    for key in path.split("."):
        node = node[int(key)] if isinstance(node, list) else node[key]
    assert node == value


def test_overrides_apply_in_order_and_keep_siblings(tmp_path: Path) -> None:
    text = "name: a\nseed: 3\ntask: {kind: binary, class_weights: {0: 1, 1: 1}}\ntrain: {phases: [{steps: 3, lr: 1}]}"
    sets = ("train.phases.0.lr=2", "train.phases.0.lr=4", "task.class_weights.1=9", "seed.init=8", "model.kind=cnn",
            "model.conv.1.kernel=3")  # fmt: skip
    read = load_text(text, tmp_path, *sets)
    assert (read.train.phases[0].steps, read.train.phases[0].lr) == (3, 4.0)
    assert read.task.class_weights == {0: 1.0, 1: 9.0}
    assert (read.seed.for_stream("shuffle"), read.seed.for_stream("init")) == (3, 8)
    assert read.model.model_dump()["conv"][1]["kernel"] == 3


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.batch_size", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("train.phases.2.lr=1", "the list has 2 items, no '2'"),
        ("train.phases.x.lr=1", "the list has 2 items, no 'x'"),
        ("train.phases.²=1", "the list has 2 items"),
        ("train.batchsize=1", "did you mean 'batch_size'?"),
        ("train.batch_size=[", "not valid YAML"),
        ("base=x.yaml", "base"),
        ("a..b=1", "unknown key"),
    ],
)
def test_invalid_override_is_an_error(tmp_path: Path, override: str, part: str) -> None:
    assert part in " ".join(messages_of("name: a\ndata: {source: disc}", tmp_path, override))


# --------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("nmae: a", ["nmae: unknown key (did you mean 'name'?)"]),
        ("name: a\ntrain: {batchsize: 3}", ["train.batchsize: unknown key (did you mean 'batch_size'?)"]),
        ("name: a\ndata: {splits: {vall: 0.2}}", ["data.splits.vall: unknown key (did you mean 'val'?)"]),
        ("name: a\ndata: {splits: {by: range, train: [0, 1], vl: 1}}", ["data.splits.vl: unknown key"]),
        ("name: a\ndata: {splits: {by: ranges}}", ["data.splits.by: must be 'random', 'range', 'group', 'time'"]),
        ("name: a\ndata: {splits: {by: 5}}", ["data.splits.by: must be"]),
        ("name: a\ndata: {source: mist}", ["data.source: must be 'mnist', 'fashion_mnist', 'cifar10', 'cifar100', "
                                           "'disc', 'parquet', 'csv', 'arrow', 'numpy', 'jsonl' or 'image_folder' "
                                           "(did you mean 'mnist'?), not 'mist'"]),
        ("name: a\ndata: {source: {call: 'x'}}", ["data.source.call: 'x' is not of the form module:name"]),
        ("name: a\nscale: {workers: -1}", ["scale.workers: must be greater than or equal to 0, not -1"]),
        ("name: a\nscale: {workers: {min: 2, max: 1}}", ["scale.workers: min (2) must not exceed max (1)"]),
        ("name: a\nscale: {workers: two}", ["scale.workers: must be a whole number, not 'two'"]),
        ("name: a\ntrain: {batch_size: 0}", ["train.batch_size: must be greater than 0 or 'all' or 'auto', not 0"]),
        (
            "name: a\ntrain: {batch_size: '100'}",
            ["train.batch_size: must be a whole number or 'all' or 'auto', not '100'"],
        ),
        ("name: a\ntrain: {phases: []}", ["train.phases: must not be empty"]),
        ("name: a\ntrain: {phases: [{lr: 1}]}", ["train.phases.0: a phase has either epochs or steps"]),
        ("name: a\ntrain: {phases: [{epochs: true, lr: .inf}]}", ["train.phases.0.epochs: must be a whole number",
                                                                  "train.phases.0.lr: must be a finite number"]),
        ("name: a\ndata: {shuffle: yes}", ["data.shuffle: must be true or false, not 'yes'"]),
        ("name: a\nmodel: {kind: mpl}", ["model.kind: must be mlp, cnn, torchvision:NAME or "
                                          "module:Class (did you mean 'mlp'?)"]),
        ("name: a\nmodel: {kind: [x]}", ["model.kind: must be text"]),
        ("name: a\nmodel: 3", ["model: must be a mapping of keys to values, not 3"]),
        ("name: a\nmodel: {hiden: [3]}", ["model.hiden: unknown key (did you mean 'hidden'?); known here: activation, "
                                          "batch_norm, dropout, embedding_width, ensemble, freeze, hidden, "
                                          "init_from, kind, layers, numeric_embedding, strict"]),
        ("name: a\nmodel: {hidden: [0]}", ["model.hidden.0: must be greater than 0, not 0"]),
        ("name: a\nmodel: {kind: cnn, conv: [{chanels: 3}]}", ["model.conv.0.chanels: unknown key (did you mean"]),
        ("name: a\nmodel: {hidden: doubling}", ["model: layers goes with hidden: doubling"]),
        ("name: a\nseed: -1", ["seed: must be greater than or equal to 0, not -1"]),
        ("name: a\ntask: multiclas", [
            "task: must be 'multiclass', 'binary', 'multilabel' or 'regression' (did you mean 'multiclass'?)"]),
        ("name: a\ntask: {class_weights: {a: 0}}", ["task.class_weights.a: must be greater than 0"]),
        ("name: a\ntask: {class_weights: {0: 0}}", ["task.class_weights.0: must be greater than 0"]),
        ("name: a\ntask: regression\nbest: {metric: val/accuracy}", [
            "best.metric: val/accuracy is not measured; regression has loss, rmse"]),
        ("name: a\nbest: {metric: test/loss}", ["best.metric: 'test/loss' is not of the form val/loss"]),
        ("name: a\nbest: {metric: val/cost}\nmetrics: ['m:cost']", ["best: set mode: min or mode: max for val/cost"]),
        ("name: a\nbest: {metric: val/baseline_accuracy}", ["best: set mode"]),
        ("name: a\nbest: {metric: val/acuracy}", ["best: set mode: min or mode: max for val/acuracy (did "
                                                       "you mean 'val/accuracy'?)"]),
        ("name: a\nbest: {metric: val/acuracy, mode: max}", ["best.metric: val/acuracy is not measured (did "
                                                                  "you mean 'val/accuracy'?)"]),
        ("name: a\nbest: {metric: train/cots, mode: min}\nmetrics: ['m:cost']", ["best.metric: train/cots is not "
            "measured (did you mean 'train/cost'?)"]),
        ("name: a\nbest: {metric: vall/loss}", ["best.metric: 'vall/loss' is not of the form val/loss, "
            "val/accuracy, train/loss, ... (did you mean 'val/loss'?)"]),
        ("name: a\nbest: {metric: val/r2}", ["best.metric: val/r2 is not measured; multiclass has loss,"]),
        ("name: a\nbest: {metric: val/auc, mode: min}", ["best: mode: min would choose the worst val/auc as the best"]),
        ("name: a\nbest: {metric: val/loss, mode: max}", ["best: mode: max would choose the worst val/loss"]),
        ("name: a\nmetrics: ['m:loss']", ["metrics: m:loss: another column is called 'loss'"]),
        ("name: a\nmetrics: ['m:cost', 'n:cost']", ["metrics: m:cost: another column is called 'cost'"]),
        ("name: a\ntask: {loss: mae}", ["task: loss: mae goes with kind: regression"]),
        ("name: a\ntask: {kind: regression, loss: mea}", ["task.loss: 'mea' is not of the form module:name"]),
        ("name: a\ndata: {url: x}", ["data: url goes with source: parquet, csv, arrow, numpy, jsonl or "]),
        ("name: a\ndata: {source: parquet, label: y}", ["data: source: parquet needs url, the file or folder of"]),
        ("name: a\ndata: {source: parquet, url: x}", ["data: source: parquet needs label, the column to predict"]),
        ("name: a\ndata: {source: parquet}", ["data: source: parquet needs url", "data: source: parquet needs label"]),
        ("name: a\ndata: {source: parquet, url: x, lable: y}", ["data.lable: unknown key (did you mean 'label'?)"]),
        ("name: a\ndata: {fetures: [y]}", ["data.fetures: unknown key (did you mean 'features'?); known here: augment, "
                                           "cache, loader, normalize, root, shuffle, source, splits"]),
        ("name: a\ndata: {source: parqet, url: x, label: y, keys: [z]}", ["data.source: must be 'mnist', 'fash"]),
        ("name: a\ndata: {source: {cal: 'm:f'}}", ["data.source.cal: unknown key (did you mean 'call'?)"]),
        ("name: a\ndata: {source: {call: 'm:f'}, keys: [a], loader: {processes: -1}, resize: 3}", [
            "data: keys goes with source: parquet", "data: resize goes with source: image_folder",
            "data.loader.processes: must be greater than or equal to 0"]),
        ("name: a\ndata: {source: image_folder, url: x, label: [a]}", ["data.label: source: image_folder takes one"]),
        ("name: a\ndata: {source: disc, missing: {numeric: mean}}", ["data: missing goes with source: parquet"]),
        ("name: a\ndata: {source: [x]}", ["data.source: must be 'mnist'"]),
        ("name: a\ndata: 3", ["data: must be a mapping of keys to values, not 3"]),
        ("name: a\ndata: {label: x}", ["data: label goes with"]),
        ("name: a\ndata: {source: image_folder, url: x, keys: [a]}", ["data: keys goes with source: parquet"]),
        ("name: a\ndata: {source: parquet, url: x, label: y, resize: 3}", ["data: resize goes with source: image_"]),
        ("name: a\ndata: {splits: {by: time, column: t, val: 14x}}", ["data.splits: val must be a share below 1"]),
        ("name: a\ndata: {splits: {val: 1.0}}", ["data.splits.val: 1.0 would be all rows: a share is below 1"]),
        ("name: a\ndata: {splits: {test: 1.0}}", ["data.splits.test: 1.0 would be all rows"]),
        ("name: a\ndata: {splits: {train: 1.0}}", ["data.splits.train: 1.0 would be all rows"]),
        ("name: a\ndata: {splits: {by: group, column: g, val: 1.0}}", ["data.splits.val: 1.0 would be all rows"]),
        ("name: a\ndata: {splits: {val: '0.2'}}", ["data.splits.val: must be a number, not '0.2'"]),
        ("name: a\ndata: {splits: {val: 20%}}", ["data.splits.val: must be a number, not '20%'"]),
        ("name: a\ndata: {splits: {by: time, column: t, val: '0.2'}}", ["data.splits: val must be a share below 1"]),
        ("name: a\ndata: {splits: {by: column, column: s, val: [train]}}", ["data.splits: 'train' cannot mean two"]),
        ("name: a\nevaluate: {splits: [test]}", ["evaluate.splits.0: must be 'train' or 'val'"]),
        ("name: a\nschema: 2", ["schema: must be 1, not 2"]),
        ("name: ../a", ["name: '../a' is not a valid name"]),
        ("name: 1e3", ["name: must be text, not 1000.0"]),
        ("name: a\n3: x", ["3: "]),
        ("train: {micro_batch: 0}\nmodel: {dropout: 1}", ["name: missing", "model.dropout: must be less than 1, not 1",
                                                          "train.micro_batch: must be greater than 0"]),
        ("[a]", ["a job file is a mapping"]),
        ("", ["a job file is a mapping"]),
    ],
)  # fmt: skip
def test_each_problem_is_reported_once_by_its_written_key(tmp_path: Path, text: str, lines: list[str]) -> None:
    messages = messages_of(text, tmp_path)
    if len(lines) > 1:
        assert messages.pop(0) == f"{len(lines)} problems"
    assert len(messages) == len(lines), messages
    for line in lines:
        assert any(message.startswith(line) for message in messages), messages


# ------------------------------------------------------------------------------------------- properties

job_words = st.sampled_from(
    ["name", "seed", "all", "data", "source", "call", "splits", "by", "random", "range", "val", "model", "kind", "mlp",
     "cnn", "a.b:C", "hidden", "doubling", "conv", "task", "binary", "class_weights", "train", "phases", "epochs", "lr",
     "best", "metric", "scale", "workers", "min", "int", "UserFunctionConfig", "base", "on", "mnist", "", "²",
     "${PATH}", "x"]
)  # fmt: skip
job_leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | job_words
    | st.text(max_size=4)
    | st.integers(-(10**400))
)
job_trees = st.recursive(
    job_leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(job_words | st.integers(0, 2), inner, max_size=4),
    max_leaves=12,
)


@given(
    tree=job_trees, overrides=st.lists(st.tuples(st.lists(job_words, min_size=1, max_size=3), job_trees), max_size=2)
)
@settings(deadline=None, max_examples=150)
def test_any_tree_is_a_job_or_a_job_error(
    tmp_path_factory: pytest.TempPathFactory, tree: Any, overrides: list[tuple[list[str], Any]]
) -> None:
    text = yaml.safe_dump({"name": "a", **tree} if isinstance(tree, dict) else tree, allow_unicode=True)
    sets = [f"{'.'.join(path)}={yaml.safe_dump(value, default_flow_style=True)}" for path, value in overrides]
    try:
        read = load_text(text, tmp_path_factory.getbasetemp(), *sets)
    except JobError as caught:
        error = caught
    else:
        assert read.name
        return
    assert error.where
    assert "[" not in error.what.split(":")[0], "pydantic's name of a union member"


@given(text=st.text(max_size=60))
def test_any_text_is_yaml_or_a_job_error(text: str) -> None:
    with contextlib.suppress(JobError):
        parse_yaml(text, "here")


plain_text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)
some_words = st.sampled_from(
    ["yes", "1e3", "0o7", "010", "~", "null", "1:30", "2026-01-01", ".inf", "true", "-", "a: b"]
)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | plain_text | some_words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain_text | some_words, inner, max_size=3),
    max_leaves=6,
)
positive = st.integers(1, 10**6)
finite = st.floats(1e-12, 1e12)
phases = st.builds(
    lambda length, lr, schedule, warmup, state: {
        **length, "lr": lr, "schedule": schedule, "warmup_steps": warmup, "optimizer_state": state
    },
    st.builds(lambda n: {"epochs": n}, positive) | st.builds(lambda n: {"steps": n}, positive),
    finite,
    st.sampled_from(["constant", "step", "cosine", "one_cycle"]),
    st.integers(0, 100),
    st.sampled_from(["keep", "reset"]),
)  # fmt: skip
models = st.one_of(
    st.fixed_dictionaries({"hidden": st.lists(positive, max_size=3), "activation": st.sampled_from(["relu", "elu"])}),
    st.fixed_dictionaries({"hidden": st.just("doubling"), "layers": st.integers(1, 64)}),
    st.fixed_dictionaries({"kind": st.just("cnn"), "hidden": st.lists(positive), "batch_norm": st.booleans()}),
    st.fixed_dictionaries({"kind": st.just("a.b:C"), "args": st.dictionaries(plain_text | some_words, plain_values)}),
)
tasks = st.sampled_from(["multiclass", "binary", "regression"]) | st.fixed_dictionaries(
    {"class_weights": st.just("balanced") | st.dictionaries(st.integers(0, 9), finite)}
)
jobs = st.fixed_dictionaries(
    {"name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,9}", fullmatch=True) | st.sampled_from(["1e3", "010", "null"])},
    optional={
        "seed": st.integers(0) | st.fixed_dictionaries({"all": st.integers(0), "split": st.integers(0)}),
        "model": models,
        "task": tasks,
        "train": st.fixed_dictionaries({"phases": st.lists(phases, min_size=1, max_size=3), "clip_norm": finite}),
        "storage": plain_text | some_words,
        "scale": st.sampled_from([{"workers": 2}, {"workers": {"min": 1, "max": 4}}]),
        "data": st.sampled_from([
            {"splits": {"by": "range", "train": [0, 5], "val": [5, 9]}},
            {"splits": {"val": 0}},
            {"splits": {"val": 1, "test": 200}},
            {"splits": {"by": "group", "column": "g", "val": 1}},
        ]),
    },
)  # fmt: skip


@given(tree=jobs)
@example(tree={"name": "arguments", "model": {"kind": "a.b:C", "args": {"most": float("inf")}}})
@settings(deadline=None)
def test_dumped_job_loads_as_the_same_job(tree: dict[str, Any]) -> None:
    first = build_job(tree, "here")
    again = parse_job(dump_job(first), "there")
    assert again == first
    assert dump_job(again) == dump_job(first)
    assert yaml.safe_load(dump_job(first))["name"] == first.name, "other YAML readers read the same"
