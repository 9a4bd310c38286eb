"""The table of trackers."""

from __future__ import annotations

from typing import get_args

from pipeline.trackers import _TRACKERS, TrackerName


def test_every_tracker_name_of_a_job_has_a_factory() -> None:
    assert tuple(_TRACKERS) == get_args(TrackerName)
