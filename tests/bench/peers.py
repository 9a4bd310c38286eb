"""Accuracy and R2 compared with scikit-learn's MLP: same rows, layers, optimizer, learning rate, batch size and epochs,
on three data sets of scikit-learn.

    python tests/bench/peers.py [--seeds 5]

Both are scored on the same held-out fifth with scikit-learn's metrics; Trainyard's predictions are those of
`load(run).predict`.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline import load, train
from pipeline.config.files import build_job

DATASETS = {
    "breast_cancer": (load_breast_cancer, "binary", [32], 40),
    "digits": (load_digits, "multiclass", [64], 40),
    "diabetes": (load_diabetes, "regression", [16], 60),
}
"""Per data set: loader, task, hidden layers, epochs."""

BATCH, LEARNING_RATE = 32, 0.001


def train_pipeline(kind: str, hidden: list[int], epochs: int, seed: int, fit: Path, folder: Path) -> Any:
    """Train on all rows of a Parquet file and return the last model."""
    tree = {
        "name": f"{fit.stem}-{seed}",
        "seed": seed,
        "data": {"source": "parquet", "url": str(fit), "label": "label", "splits": {"val": 0}},
        "model": {"kind": "mlp", "hidden": hidden},
        "task": kind,
        "train": {
            "batch_size": BATCH,
            "optimizer": {"kind": "adam", "weight_decay": 0.0},
            "phases": [{"epochs": epochs, "lr": LEARNING_RATE}],
        },
        "evaluate": {"every_epochs": epochs},
    }
    run = train(build_job(tree, "peers"), storage=str(folder / "runs"))
    return load(f"{run.url}@last")


def train_sklearn(kind: str, hidden: list[int], epochs: int, seed: int, inputs: np.ndarray, targets: np.ndarray) -> Any:
    """Train scikit-learn's MLP."""
    settings = {
        "hidden_layer_sizes": hidden,
        "batch_size": BATCH,
        "learning_rate_init": LEARNING_RATE,
        "max_iter": epochs,
        "alpha": 0.0,
        "n_iter_no_change": epochs,
        "random_state": seed,
    }
    net = MLPRegressor(**settings) if kind == "regression" else MLPClassifier(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return make_pipeline(StandardScaler(), net).fit(inputs, targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(1, parser.parse_args().seeds + 1)
    print(f"{'dataset':14s} {'score':9s} {'Trainyard':>11s} {'sd':>6s} {'scikit-learn':>13s} {'sd':>6s}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dataset, (loader, kind, hidden, epochs) in DATASETS.items():
            inputs, targets = loader(return_X_y=True)
            scores: dict[str, list[float]] = {"trainyard": [], "sklearn": []}
            for seed in seeds:
                stratify = None if kind == "regression" else targets
                x, held_x, y, held_y = train_test_split(
                    inputs, targets, test_size=0.2, random_state=seed, stratify=stratify
                )
                columns = {f"x{number:02d}": x[:, number] for number in range(x.shape[1])}
                fit = folder / f"{dataset}-{seed}.parquet"
                pq.write_table(pa.table({**columns, "label": y}), fit)
                held = {f"x{number:02d}": held_x[:, number] for number in range(x.shape[1])}
                score = r2_score if kind == "regression" else accuracy_score
                predictions = train_pipeline(kind, hidden, epochs, seed, fit, folder).predict(pa.table(held))
                scores["trainyard"].append(score(held_y, predictions))
                if kind == "regression":
                    mean, deviation = y.mean(), y.std()
                    model = train_sklearn(kind, hidden, epochs, seed, x, (y - mean) / deviation)
                    scores["sklearn"].append(score(held_y, model.predict(held_x) * deviation + mean))
                else:
                    scores["sklearn"].append(
                        score(held_y, train_sklearn(kind, hidden, epochs, seed, x, y).predict(held_x))
                    )
            trainyard, sklearn = scores["trainyard"], scores["sklearn"]
            print(
                f"{dataset:14s} {'R2' if kind == 'regression' else 'accuracy':9s} {np.mean(trainyard):11.4f} "
                f"{np.std(trainyard):6.4f} {np.mean(sklearn):13.4f} {np.std(sklearn):6.4f}"
            )


if __name__ == "__main__":
    main()
