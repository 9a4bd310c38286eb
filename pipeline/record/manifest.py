"""`manifest.json`: what a checkpoint is, and which bytes belong to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.job import validate_name
from pipeline.record.entries import BestCheckpoint, parse_best, to_floats, validate_as
from pipeline.record.saving import MANIFEST_FORMAT
from pipeline.record.values import from_json, verify_digest


@dataclass(frozen=True)
class ManifestFile:
    """What a file of a checkpoint must be, byte for byte."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`; see `Checkpoint` for the meaning of each."""

    step: int
    epoch: int
    end: bool
    position: dict[str, Any]
    metrics: dict[str, float]
    best: BestCheckpoint | None
    first_cell: int
    files: dict[str, ManifestFile]
    patience: int | None = None


def parse_manifest(data: bytes) -> Manifest:
    """A manifest from its file.

    Raises
    ------
    ValueError: altered since it was written, or not what a version of Trainyard known here would write.
    """
    try:
        tree = verify_digest(from_json(data))
        if tree.get("format") != MANIFEST_FORMAT:
            raise ValueError(f"its format {tree.get('format')!r} is not known to this version")
        tree["metrics"], tree["best"] = to_floats(tree["metrics"]), parse_best(tree["best"])
        manifest = validate_as(Manifest, tree)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if min(manifest.step, manifest.epoch, manifest.first_cell) < 0:
        raise ValueError("a number below 0")
    for name in manifest.files:
        validate_name(name)
    return manifest
