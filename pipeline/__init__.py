"""Trainyard: batch training of small and medium neural networks with one job file.

`from pipeline import load, train` is the Python API. Their dependencies are imported at the first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.version import __version__

if TYPE_CHECKING:
    from pipeline.commands.train import train
    from pipeline.inference.load import load

__all__ = ["__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from pipeline.commands.train import train

        return train
    if name == "load":
        from pipeline.inference.load import load

        return load
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
