"""TensorBoard's event files, one for each cell: no store but a local disk can append to a file."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from pipeline.followers.log import TRAIN_STEPS, MetricLog, Row
from pipeline.job.following import Follower
from pipeline.record.standing import Status

FOLDER = "tensorboard"


class ToTensorBoard:
    """Writes `<run>/tensorboard/<split>/events.out.tfevents.<cell>`.

    A file is a function of its cell and never changes, and TensorBoard reads the files of a folder by name, so in the
    order of their steps. Each split is a run of its own in TensorBoard: their curves share a chart. The file of the
    training steps is written last: what is there tells what was done.
    """

    name: Follower = "tensorboard"

    def __init__(self, log: MetricLog) -> None:
        self._storage = log.run.storage.at(FOLDER)
        self.where = self._storage.url

    def catch_up(self, log: MetricLog, status: Status) -> int:
        """See `Follower`."""
        done = set(self._storage.list(TRAIN_STEPS))
        missing = [cell for cell in log.cells() if _file(cell) not in done]
        for cell in missing:
            rows = log.rows(cell)
            for split in [*sorted({row.split for row in rows} - {TRAIN_STEPS}), TRAIN_STEPS]:
                data = events(row for row in rows if row.split == split)
                self._storage.replace(f"{split}/{_file(cell)}", data)
        return len(missing)


def _file(cell: int) -> str:
    return f"events.out.tfevents.{cell:06d}"


def events(rows: Iterable[Row]) -> bytes:
    """An event file: its version, then one event a row with all of the row's values. About 6 us a value."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import masked_crc32c

    def record(event: Event) -> bytes:
        """A TFRecord: length and content, each with its checksum."""
        data: bytes = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        return b"".join((length, _u32(masked_crc32c(length)), data, _u32(masked_crc32c(data))))

    given = list(rows)
    records = [record(Event(wall_time=given[0].time if given else 0.0, file_version="brain.Event:2"))]
    for row in given:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.values.items()]
        records.append(record(Event(wall_time=row.time, step=row.step, summary=Summary(value=values))))
    return b"".join(records)


def _u32(number: int) -> bytes:
    return struct.pack("<I", number)
