"""Fit one of the other libraries' models on one split and write its predictions: a process of its own for each fit.

    python -m tests.bench.tables.baselines METHOD TASK LABEL SEED TRAIN TEST OUT

Each method has its package's defaults and the preprocessing that its documentation asks for; what differs is said at
the method. Only what a method needs is imported, since the imports count towards its CPU seconds.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

MOST_LEVELS = 255
"""HistGradientBoosting takes no column with more categories; rarer ones are missing values to it."""


def main() -> None:
    method, task, label, seed, train_path, test_path, out = sys.argv[1:]
    warnings.simplefilter("ignore")  # such as an MLP that has not converged after the default number of iterations
    train, test = read_rows(train_path), read_rows(test_path)
    labels = train.pop(label).to_numpy()
    begun = time.process_time()
    model, train, test = METHODS[method](task, int(seed), train, test)
    if task == "regression":
        model.fit(train, labels.astype(float))
        scores, classes = np.asarray(model.predict(test), dtype=float).reshape(len(test), 1), []
    else:
        classes = sorted(set(labels.tolist()))
        model.fit(train, np.array([classes.index(value) for value in labels.tolist()]))
        scores = np.asarray(model.predict_proba(test), dtype=float)
    seconds = time.process_time() - begun
    names = [str(name) for name in classes]
    np.savez(out, scores=scores, classes=np.array(names, dtype=str))
    print(json.dumps({"fit_cpu_s": round(seconds, 3)}))


def read_rows(path: str) -> pd.DataFrame:
    """Return the rows with text as objects and NaN where it is missing, which all packages understand."""
    rows = pd.read_parquet(path)
    for name in text_columns(rows):
        rows[name] = rows[name].astype(object).where(rows[name].notna(), np.nan)
    return rows


Prepared = tuple[Any, pd.DataFrame, pd.DataFrame]
"""An unfitted estimator, and the rows as it takes them."""


def make_linear(task: str, seed: int, train: pd.DataFrame, test: pd.DataFrame) -> Prepared:
    """Ridge, or logistic regression with more iterations than the default 100, so that it converges."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline

    model = Ridge(random_state=seed) if task == "regression" else LogisticRegression(max_iter=2000, random_state=seed)
    return make_pipeline(encode_columns(train), model), train, test


def make_mlp(task: str, seed: int, train: pd.DataFrame, test: pd.DataFrame) -> Prepared:
    """scikit-learn's MLP, for a regression on the standardized target, without which it often diverges."""
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if task == "regression":
        scaled = TransformedTargetRegressor(MLPRegressor(random_state=seed), transformer=StandardScaler())
        return make_pipeline(encode_columns(train), scaled), train, test
    return make_pipeline(encode_columns(train), MLPClassifier(random_state=seed)), train, test


def encode_columns(train: pd.DataFrame) -> Any:
    """Median and standard scale for numbers; one-hot for text, where a missing value is a level of its own."""
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    text = text_columns(train)
    return make_column_transformer(
        (
            make_pipeline(SimpleImputer(strategy="median"), StandardScaler()),
            [name for name in train if name not in text],
        ),
        (
            make_pipeline(
                SimpleImputer(strategy="constant", fill_value="(missing)"), OneHotEncoder(handle_unknown="ignore")
            ),
            text,
        ),
        sparse_threshold=0.0,
    )


def make_hist_gradient_boosting(task: str, seed: int, train: pd.DataFrame, test: pd.DataFrame) -> Prepared:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    kind = HistGradientBoostingRegressor if task == "regression" else HistGradientBoostingClassifier
    train, test = to_categories(train, test, most=MOST_LEVELS)
    return kind(categorical_features="from_dtype", random_state=seed), train, test


def make_lightgbm(task: str, seed: int, train: pd.DataFrame, test: pd.DataFrame) -> Prepared:
    from lightgbm import LGBMClassifier, LGBMRegressor

    kind = LGBMRegressor if task == "regression" else LGBMClassifier
    train, test = to_categories(train, test)
    return kind(random_state=seed, n_jobs=1, verbosity=-1), train, test


def make_realmlp(task: str, seed: int, train: pd.DataFrame, test: pd.DataFrame) -> Prepared:
    from pytabkit import RealMLP_TD_Classifier, RealMLP_TD_Regressor

    kind = RealMLP_TD_Regressor if task == "regression" else RealMLP_TD_Classifier
    return prepare_pytabkit(kind, seed, train, test)


def make_tabm(task: str, seed: int, train: pd.DataFrame, test: pd.DataFrame) -> Prepared:
    from pytabkit import TabM_D_Classifier, TabM_D_Regressor

    kind = TabM_D_Regressor if task == "regression" else TabM_D_Classifier
    return prepare_pytabkit(kind, seed, train, test)


def prepare_pytabkit(kind: Any, seed: int, train: pd.DataFrame, test: pd.DataFrame) -> Prepared:
    """pytabkit validates on a fifth of the rows by itself, and takes no missing numbers: they become the median."""
    import torch

    torch.set_num_threads(1)
    medians = train.median(numeric_only=True).to_dict()
    train, test = to_categories(train.fillna(medians), test.fillna(medians))
    return kind(device="cpu", n_cv=1, random_state=seed, n_threads=1), train, test


def to_categories(
    train: pd.DataFrame, test: pd.DataFrame, most: int | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return both with text as pandas' categories: those of the training rows (the `most` frequent ones); others are
    missing."""
    train, test = train.copy(), test.copy()
    for name in text_columns(train):
        levels = sorted(train[name].value_counts().index[:most])
        for rows in (train, test):
            rows[name] = pd.Categorical(rows[name].where(rows[name].isin(levels)), categories=levels)
    return train, test


def text_columns(rows: pd.DataFrame) -> list[str]:
    """Return the names of all columns that are not numbers."""
    return [str(name) for name in rows if not pd.api.types.is_numeric_dtype(rows[name])]


METHODS: dict[str, Callable[[str, int, pd.DataFrame, pd.DataFrame], Prepared]] = {
    "linear": make_linear,
    "sklearn-mlp": make_mlp,
    "hist-gradient-boosting": make_hist_gradient_boosting,
    "lightgbm": make_lightgbm,
    "realmlp": make_realmlp,
    "tabm": make_tabm,
}

PACKAGES = {
    "linear": ["scikit-learn"],
    "sklearn-mlp": ["scikit-learn"],
    "hist-gradient-boosting": ["scikit-learn"],
    "lightgbm": ["lightgbm", "scikit-learn"],
    "realmlp": ["pytabkit", "torch"],
    "tabm": ["pytabkit", "torch"],
}
"""Whose versions are stored with a result."""


if __name__ == "__main__":
    main()
