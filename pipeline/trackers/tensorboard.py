"""Write TensorBoard event files, one per segment: object stores cannot append to a file."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from time import monotonic

from pipeline.config.job import TrackerName
from pipeline.trackers.metric_reader import (
    TRAIN_STEPS_SPLIT,
    LiveRows,
    MetricLogReader,
    MetricLogView,
    MetricRow,
    group_by_split,
)

TENSORBOARD_FOLDER = "tensorboard"
LIVE_FOLDER_PREFIX = "live-"
"""Prefix of folders with live rows."""
LIVE_INTERVAL_DIVISOR = 100
"""Live rows of one segment are written again after a hundredth of the time since the first, so that there are few
files."""


class TensorBoardTracker:
    """Writes `<run>/tensorboard/<split>/events.out.tfevents.<segment>`.

    A file is a function of its segment and never changes. TensorBoard reads the files of a folder in the order of their
    names, which is the order of their steps. Each split is a separate run in TensorBoard, so their curves share a
    chart. The file of the training steps is written last: where it exists, its segment is done.

    Live rows are separate runs too, `<run>/tensorboard/live-<segment>/<split>`, until that segment exists; then the
    folder is removed. TensorBoard never reads a file again, and stops at a file that is removed while it reads, so each
    file of the folder holds only new rows, and none is removed alone.
    """

    name: TrackerName = "tensorboard"
    location_hint = "tensorboard --logdir"

    def __init__(self, log: MetricLogReader) -> None:
        self._storage = log.run.storage.subfolder(TENSORBOARD_FOLDER)
        self.location = self._storage.url
        self._live_folder: str | None = ""
        self._live_attempt = self._live_files = 0
        self._live_shown: dict[str, int] = {}
        """Last step by split."""
        self._live_since = self._live_due = 0.0

    def catch_up(self, log: MetricLogReader, view: MetricLogView) -> int:
        """See `Tracker`."""
        existing = set(self._storage.list(TRAIN_STEPS_SPLIT))
        missing = [segment for segment in view.segments if _event_file_name(segment) not in existing]
        for segment in missing:
            for split, rows in group_by_split(log.read_rows(segment)).items():
                self._storage.replace(f"{split}/{_event_file_name(segment)}", encode_events(rows))
        self._write_live(view.live, is_over=view.status == "finished", is_running=view.status == "running")
        return len(missing)

    def _write_live(self, live: LiveRows, *, is_over: bool, is_running: bool) -> None:
        folder, now = None if is_over else f"{LIVE_FOLDER_PREFIX}{live.segment:06d}", monotonic()
        if folder != self._live_folder:
            for name in self._storage.list():
                if name.startswith(LIVE_FOLDER_PREFIX) and name != folder:
                    self._storage.delete_folder(name)
            existing = (
                [self._storage.list(f"{folder}/{split}") for split in self._storage.list(folder)] if folder else []
            )
            self._live_files = max(map(len, existing), default=0)
            self._live_folder, self._live_attempt = folder, 0
            self._live_since = self._live_due = now
        if not live.rows or (is_running and live.attempt == self._live_attempt and now < self._live_due):
            return
        is_new_attempt = live.attempt != self._live_attempt
        if is_new_attempt:
            self._live_shown = {}
        for split, rows in group_by_split(live.rows).items():
            new = [row for row in rows if row.step > self._live_shown.get(split, -1)]
            if new:
                data = encode_events(new, purge_step=live.first_step if is_new_attempt else None)
                self._storage.replace(f"{folder}/{split}/{_event_file_name(self._live_files)}", data)
                self._live_shown[split] = new[-1].step
        self._live_files += 1
        self._live_attempt = live.attempt
        self._live_due = now + (now - self._live_since) / LIVE_INTERVAL_DIVISOR


def _event_file_name(number: int) -> str:
    return f"events.out.tfevents.{number:06d}"


def encode_events(rows: Iterable[MetricRow], *, purge_step: int | None = None) -> bytes:
    """Encode an event file: its version, then one event per row with all of the row's values. About 6 us per value.

    purge_step: if given, discard the events of earlier files from this step on.
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import masked_crc32c

    def record(event: Event) -> bytes:
        """Encode a TFRecord: length and content, each with its checksum."""
        data: bytes = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        return b"".join((length, _u32(masked_crc32c(length)), data, _u32(masked_crc32c(data))))

    row_list = list(rows)
    records = [record(Event(wall_time=row_list[0].time if row_list else 0.0, file_version="brain.Event:2"))]
    if purge_step is not None:
        session = SessionLog(status=SessionLog.START)
        records.append(record(Event(wall_time=row_list[0].time, step=purge_step, session_log=session)))
    for row in row_list:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.values.items()]
        records.append(record(Event(wall_time=row.time, step=row.step, summary=Summary(value=values))))
    return b"".join(records)


def _u32(number: int) -> bytes:
    return struct.pack("<I", number)
