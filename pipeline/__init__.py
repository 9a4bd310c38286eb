"""Trainyard: batch training of small and medium neural networks with one job file.

`from pipeline import train` is the command line's `train`; what it needs is imported at the first use.
"""

from __future__ import annotations

from typing import Any

__all__ = ["train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "train":
        from pipeline.verbs.train import train

        return train
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
