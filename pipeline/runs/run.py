"""The directory of a run: its creation, its files, and the log of reads of the test split."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from copy import copy
from io import BytesIO
from typing import TYPE_CHECKING, Any

from pipeline.config import validate_name
from pipeline.errors import InputError, StorageError
from pipeline.runs.journal.journal import Journal
from pipeline.runs.serialization import check_timestamp, compute_digest, from_json, to_json, utc_now
from pipeline.storage import Storage

if TYPE_CHECKING:
    import pyarrow as pa


JOB_FILE = "job.yaml"
SUMMARY_FILE = "run.json"
RESULT_FILE = "result.json"
CODE_FILE = "code.zip"
SPLITS_FILE = "splits.parquet"
TEST_READS_FOLDER = "reads"
STACKS_FOLDER = "stacks"
STACKS_LIMIT_S = 10.0
"""Seconds that storage may be unavailable when stacks are saved."""
HEADER_PREFIX = "# trainyard: "
MAX_JOURNAL_HINT = 10**9
"""Largest number in `run.json` that is used as a hint for the length of the journal."""


class Run:
    """A run directory.

    Parameters
    ----------
    storage: the folder that contains all runs.
    name: name of this run's folder in it.

    Raises
    ------
    StorageError: the name is not valid for a run.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        try:
            validate_name(name)
        except ValueError as error:
            raise StorageError(str(error), where=storage.url) from None
        self.name = name
        self.storage = storage.subfolder(name, own_temporary_folder=True)
        self.root_url = storage.url
        """URL of the folder of all runs, printable."""
        self.open_url = storage.open_url
        """The same for `Storage.open`; it may contain a password, so it is never printed."""
        self.journal = Journal(self.storage, self._journal_hint)
        self._job_text: str | None = None
        self._header: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"Run({self.url!r})"

    @property
    def url(self) -> str:
        """URL of the run, printable."""
        return self.storage.url

    def with_timeout(self, limit_s: float) -> Run:
        """Return the same run with a shorter time limit for unavailable storage."""
        run = copy(self)
        run.storage = self.storage.with_timeout(limit_s)
        run.journal = self.journal.with_storage(run.storage)
        return run

    def create(self, job_yaml: str, metadata: dict[str, Any]) -> bool:
        """Create the run exclusively, by writing its job below a comment line that contains `metadata` (plain values).

        Returns
        -------
        True if this call created it; False if it existed.
        """
        header = {"nonce": secrets.token_hex(16), "time": utc_now(), "facts": metadata}
        digest = compute_digest({**header, "job": job_yaml})
        return self.storage.create(
            JOB_FILE, f"{HEADER_PREFIX}{to_json({**header, 'sha256': digest})}\n{job_yaml}".encode()
        )

    def exists(self) -> bool:
        """Whether the run was created."""
        return self._job_text is not None or self.storage.exists(JOB_FILE)

    def read_job_yaml(self) -> str:
        """Return the job file as stored, with the metadata as a comment.

        Raises
        ------
        FileNotFoundError: the run does not exist.
        StorageError: the file was altered.
        """
        self._read_header()
        assert self._job_text is not None
        return self._job_text

    def read_metadata(self) -> dict[str, Any]:
        """Return the metadata that `create` was given.

        Raises
        ------
        FileNotFoundError: the run does not exist.
        StorageError: `job.yaml` was altered; also raised later, by access to a missing key.
        """
        return RunMetadata(self._read_header()["facts"], f"{self.url}/{JOB_FILE}")

    def created_at(self) -> str:
        """Return the UTC time of the creation, as ISO 8601. FileNotFoundError if the run does not exist."""
        return str(self._read_header()["time"])

    def read_summary(self) -> dict[str, Any]:
        """Return `run.json` as last written; empty if there is none, because it can be rebuilt from the other files."""
        try:
            summary = from_json(self.storage.read(SUMMARY_FILE))
        except (FileNotFoundError, ValueError):
            return {}
        return summary if isinstance(summary, dict) else {}

    def _journal_hint(self) -> int:
        """Return the number of the last journal entry according to `run.json`; 0 if it has none."""
        try:
            number = self.read_summary().get("journal")
        except StorageError:  # such as a symbolic link; readers of the summary itself get the error
            return 0
        return number if type(number) is int and 0 < number < MAX_JOURNAL_HINT else 0

    def has_result(self) -> bool:
        """Whether all files that follow from the final commit exist; `run.json`, with the status, is written last."""
        return self.read_summary().get("status") == "finished" and self.storage.exists(RESULT_FILE)

    def has_splits(self, table: pa.Table) -> bool:
        """Whether `write_splits` stored this table, and the file is unchanged."""
        try:
            return self.storage.read(SPLITS_FILE) == _to_parquet(table)
        except FileNotFoundError:
            return False

    def has_original_splits(self) -> bool:
        """Whether `splits.parquet` is unchanged since the run was created, by its digest. Also False for a run of an
        earlier version, which recorded no digest."""
        try:
            return bool(digest_splits(self.storage.read(SPLITS_FILE)) == self.read_metadata().get("splits"))
        except FileNotFoundError:
            return False

    def write_splits(self, table: pa.Table) -> None:
        """Store the assignment of samples to splits, as `splits.parquet`."""
        self.storage.replace(SPLITS_FILE, _to_parquet(table), sync=True)

    def write_code(self, archive: bytes) -> None:
        """Store the user's code, as `code.zip`. A different archive is kept as `code-<its digest>.zip`."""
        before = self.read_code()
        if before == archive:
            return
        if before is not None:
            name = f"code-{hashlib.sha256(before).hexdigest()[:8]}.zip"
            self.storage.replace(name, before, sync=True)
        self.storage.replace(CODE_FILE, archive, sync=True)

    def read_code(self) -> bytes | None:
        """Return `code.zip`, or None for a run without user code (or whose creation was interrupted)."""
        try:
            return self.storage.read(CODE_FILE)
        except FileNotFoundError:
            return None

    def has_code(self) -> bool:
        """Whether `code.zip` exists."""
        return self.storage.exists(CODE_FILE)

    def write_stack_dump(self, name: str, text: bytes) -> str:
        """Store the stacks of a process that hangs, in `stacks/`, and return their URL."""
        path = f"{STACKS_FOLDER}/{name}"
        self.storage.with_timeout(STACKS_LIMIT_S).replace(path, text)
        return f"{self.url}/{path}"

    def _read_header(self) -> dict[str, Any]:
        if self._header is None:  # the file never changes
            data = self.storage.read(JOB_FILE)
            try:
                self._job_text = data.decode()
                self._header = _parse_header(self._job_text)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise StorageError(
                    f"not as Trainyard stored it ({str(error)[:200]})",
                    where=f"{self.url}/{JOB_FILE}",
                    fix="a run's job.yaml must stay as it was stored; restore it or use another --name",
                ) from None
        return self._header


def digest_splits(splits: pa.Table | bytes) -> str:
    """Return the SHA-256 of `splits.parquet`, in hex, as stored in the run's metadata."""
    return hashlib.sha256(splits if isinstance(splits, bytes) else _to_parquet(splits)).hexdigest()


def _to_parquet(table: pa.Table) -> bytes:
    import pyarrow.parquet as pq

    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


class RunMetadata(dict[str, Any]):
    """The metadata of a run. A missing key raises a StorageError, because the values come from storage."""

    def __init__(self, metadata: dict[str, Any], where: str) -> None:
        super().__init__(metadata)
        self._where = where

    def __missing__(self, name: str) -> Any:
        raise StorageError(
            f"it does not contain {name}, so it is not a run of this version",
            where=self._where,
            fix="use another --name",
        )


_METADATA_TYPES: dict[str, tuple[type, ...]] = {
    "identity": (str,),
    "fingerprint": (str,),
    "start": (str, type(None)),
    "max_steps": (int, type(None)),
    "total_steps": (int, type(None)),
    "steps_per_epoch": (int,),
    "cell_steps": (int,),
    "first_cell_steps": (int,),
    "columns": (dict,),
}
"""Types of the metadata that every run has; there may be other keys."""


def _parse_header(text: str) -> dict[str, Any]:
    """Parse the first line of a `job.yaml`; ValueError, TypeError or KeyError if it or the rest was altered."""
    line, _, job = text.partition("\n")
    if not line.startswith(HEADER_PREFIX):
        raise ValueError("its first line is not a header")
    header = from_json(line.removeprefix(HEADER_PREFIX))
    fields = {name: value for name, value in header.items() if name != "sha256"} if isinstance(header, dict) else {}
    if not fields or header.get("sha256") != compute_digest({**fields, "job": job}):
        raise ValueError("it was altered")
    check_timestamp(fields["time"])
    for name, value in dict(fields["facts"]).items():
        if name in _METADATA_TYPES and (
            not isinstance(value, _METADATA_TYPES[name]) or (isinstance(value, int) and value < 1)
        ):
            raise ValueError(f"{name} cannot be {value!r}")
    return fields


def parse_run_ref(run_ref: str) -> tuple[str, str]:
    """Split `RUN[@best|@last|@STEP]` into the run's name or URL and the checkpoint, "best" if not given."""
    root, slash, name = run_ref.rstrip("/").rpartition("/")
    name, _, checkpoint = name.partition("@")  # a URL may contain another @ before the name
    return f"{root}{slash}{name}", checkpoint or "best"


def open_run(run: str, storage_url: str) -> Run:
    """Open a run by its URL, or by its name in the storage.

    Raises
    ------
    InputError: there is no such run.
    """
    root, _, name = run.rstrip("/").rpartition("/")
    try:
        opened_run = Run(Storage.open(root or storage_url), validate_name(name))
    except ValueError as error:
        raise InputError(str(error), where=run) from None
    if not opened_run.exists():
        raise InputError("no such run", where=opened_run.url, fix="`trainyard runs` lists the existing runs")
    return opened_run


def log_test_access(run: Run, metadata: Mapping[str, Any]) -> int:
    """Log a read of the test split before it happens, so that every use of the split is recorded.

    Parameters
    ----------
    metadata: plain values: which checkpoint, by whom, where.

    Returns
    -------
    The number of the new entry.
    """
    text = to_json({"time": utc_now(), "nonce": secrets.token_hex(16), **metadata}, indent=1) + "\n"
    number = 1 + len(run.storage.list(TEST_READS_FOLDER))
    while not run.storage.create(f"{TEST_READS_FOLDER}/{number:08d}.json", text.encode()):
        number += 1
    return number


def list_run_names(storage: Storage) -> list[str]:
    """Return the valid run names in a folder, sorted. Not all of them need to be runs."""
    return [name for name in storage.list() if _is_valid_name(name)]


def _is_valid_name(name: str) -> bool:
    try:
        validate_name(name)
    except ValueError:
        return False
    return True
