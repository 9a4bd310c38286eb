"""A run's directory and its birth."""

from __future__ import annotations

import json
import secrets
from copy import copy
from io import BytesIO
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError, StorageError
from pipeline.job import plain_name
from pipeline.record.journal import Journal
from pipeline.record.values import from_json, now, to_json
from pipeline.storage import Storage

if TYPE_CHECKING:
    import pyarrow as pa

JOB = "job.yaml"
VIEW = "run.json"
RESULT = "result.json"
CODE = "code.zip"
HEADER = "# trainyard: "


class Run:
    """A run directory.

    Parameters
    ----------
    storage: the folder that holds all runs.
    name: name of this run's folder in it.

    Raises
    ------
    StorageError: a name that cannot be a folder of runs.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        try:
            plain_name(name)
        except ValueError as error:
            raise StorageError(str(error), where=storage.url) from None
        self.name = name
        self.storage = storage.at(name, own_temporaries=True)
        self.root_url = storage.url
        """Where all the runs lie, printable."""
        self.journal = Journal(self.storage)
        self._text: str | None = None

    def __repr__(self) -> str:
        return f"Run({self.url!r})"

    @property
    def url(self) -> str:
        """Where the run lies, printable."""
        return self.storage.url

    def within(self, limit_s: float) -> Run:
        """The same run, with a shorter limit for storage that is away."""
        run = copy(self)
        run.storage = self.storage.within(limit_s)
        run.journal = Journal(run.storage)
        return run

    def birth(self, job_yaml: str, facts: dict[str, Any]) -> bool:
        """Bring the run into being, exclusively: its job, below one comment line that holds `facts` (plain values).

        Returns
        -------
        True if this call made it; False if it was there.
        """
        header = to_json({"nonce": secrets.token_hex(16), "time": now(), "facts": facts})
        return self.storage.create(JOB, f"{HEADER}{header}\n{job_yaml}".encode())

    def exists(self) -> bool:
        """Whether the run was born."""
        return self._text is not None or self.storage.exists(JOB)

    def job_yaml(self) -> str:
        """The job file as stored, facts included as a comment. FileNotFoundError if the run was never born."""
        if self._text is None:  # never changed once it is there
            self._text = self.storage.read(JOB).decode()
        return self._text

    def facts(self) -> dict[str, Any]:
        """What `birth` was given. FileNotFoundError if the run was never born."""
        facts: dict[str, Any] = self._header()["facts"]
        return facts

    def born(self) -> str:
        """UTC time of the birth, as ISO 8601. FileNotFoundError if the run was never born."""
        return str(self._header()["time"])

    def view(self) -> dict[str, Any]:
        """`run.json` as last written; empty where there is none, for it can be made from the rest."""
        try:
            view = from_json(self.storage.read(VIEW))
        except (FileNotFoundError, ValueError):
            return {}
        return view if isinstance(view, dict) else {}

    def has_result(self) -> bool:
        """Whether all that follows from the end is there: `run.json` says finished, which is written last."""
        return self.view().get("status") == "finished" and self.storage.exists(RESULT)

    def has_splits(self) -> bool:
        """Whether `write_splits` was done."""
        return self.storage.exists("splits.parquet")

    def write_splits(self, table: pa.Table) -> None:
        """Store which rows are in which split, as `splits.parquet`."""
        import pyarrow.parquet as pq

        buffer = BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self.storage.replace("splits.parquet", buffer.getvalue(), sync=True)

    def write_code(self, archive: bytes) -> None:
        """Store the user's own code, as `code.zip`."""
        self.storage.replace(CODE, archive, sync=True)

    def code(self) -> bytes | None:
        """`code.zip`, or None for a run without code of its own (or whose birth was interrupted)."""
        try:
            return self.storage.read(CODE)
        except FileNotFoundError:
            return None

    def has_code(self) -> bool:
        """Whether `write_code` was done."""
        return self.storage.exists(CODE)

    def _header(self) -> dict[str, Any]:
        line = self.job_yaml().partition("\n")[0]
        try:
            header = from_json(line.removeprefix(HEADER))
        except json.JSONDecodeError:
            header = None
        if not isinstance(header, dict) or not {"facts", "time"} <= header.keys():
            raise StorageError(
                "its first line is not the one that Trainyard wrote",
                where=f"{self.url}/{JOB}",
                fix="a run's job.yaml must stay as it was stored; restore it or use another --name",
            )
        return header


def run_and_checkpoint(spec: str) -> tuple[str, str]:
    """`RUN[@best|@last|@STEP]` as the run's name or URL and the checkpoint's, best if not given."""
    root, slash, name = spec.rstrip("/").rpartition("/")
    name, _, checkpoint = name.partition("@")  # a URL may hold an @ of its own, before the name
    return f"{root}{slash}{name}", checkpoint or "best"


def open_run(run: str, storage_url: str) -> Run:
    """The run that a URL, or a name under a storage, means.

    Raises
    ------
    InputError: there is no such run.
    """
    root, _, name = run.rstrip("/").rpartition("/")
    try:
        found = Run(Storage.open(root or storage_url), plain_name(name))
    except ValueError as error:
        raise InputError(str(error), where=run) from None
    if not found.exists():
        raise InputError("no such run", where=found.url, fix="`trainyard runs` lists those that are there")
    return found


def list_runs(storage: Storage) -> list[str]:
    """Names of the runs in a folder, sorted."""
    names = [name for name in storage.list() if _is_plain(name)]
    born = storage.each(lambda name: storage.exists(f"{name}/{JOB}"), names)
    return [name for name, there in zip(names, born, strict=True) if there]


def _is_plain(name: str) -> bool:
    try:
        plain_name(name)
    except ValueError:
        return False
    return True
