"""Storage with hostile content: every command ignores it or ends with one message, none of it is executed, and small
files stay small in memory. All digests are valid, since an attacker with write access can compute them too.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from pipeline import load
from pipeline.errors import InputError
from pipeline.runs.metric_log.schema import MetricSchema
from tests.cli.command_line import RunCommand
from tests.runs.earlier_checkpoints import put_state
from tests.security.corruption import (
    ExampleRuns,
    checkpoints,
    edit_with_digest,
    newest_commit,
    quick_and_slow,
    replace_file,
    replace_job,
    rewrite_job,
)

CopyRun = Callable[[str], Path]
ChangeTree = Callable[[dict[str, Any]], Any]

MEMORY_BYTES = 1 << 30
"""Memory that a command may use beyond that of this process: too little for any decompression bomb."""
TIME_LIMIT_S = 60


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A path that must not exist after the test: hostile content creates it."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "stored content was executed"


@contextmanager
def limited_resources() -> Iterator[None]:
    """Limit memory and time; raise MemoryError or TimeoutError beyond them."""

    def raise_timeout(*_: Any) -> None:
        raise TimeoutError

    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, raise_timeout)
    signal.alarm(TIME_LIMIT_S)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def read_commands(run: Path, example_runs: ExampleRuns) -> dict[str, list[str]]:
    """Return the commands that read a run."""
    return {
        "show": ["show", run.name],
        "evaluate": ["evaluate", run.name],
        "predict": ["predict", run.name, "--input", "x.parquet", "--output", "y.parquet"],
        "resume": ["train", str(example_runs.job), "--storage", "runs"],
        "init_from": ["train", str(example_runs.job), "--storage", "other", "--set", f"model.init_from={run}"],
    }


def check_commands(trainyard: RunCommand, example_runs: ExampleRuns, run: Path, *names: str) -> dict[str, str]:
    """Check that each command (or those named) succeeds or ends with one message; return the messages by command."""
    error_messages = {}
    for name, arguments in read_commands(run, example_runs).items():
        if names and name not in names:
            continue
        with limited_resources():
            result = trainyard(*arguments)
        assert result.exit_code in (0, 2), f"{name}: {result.exit_code}: {result.stderr}"
        assert "Traceback" not in result.stderr, f"{name}: {result.stderr}"
        assert result.stderr.count("error:") == (result.exit_code == 2), f"{name}: {result.stderr}"
        if result.exit_code == 2:
            error_messages[name] = result.stderr
    return error_messages


# --------------------------------------------------------------------------------------------------- safetensors


def safetensors_bytes(tree: Any, body: bytes = b"") -> bytes:
    text = json.dumps(tree).encode()
    return struct.pack("<Q", len(text)) + text + body


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def broken(name: str) -> dict[str, bytes]:
    """Return invalid safetensors files, some with a header whose tensor `name` does not fit the file."""
    valid = save({name: torch.zeros(4)})
    return {
        "empty": b"",
        "header": struct.pack("<Q", 2**62) + b"{}",
        "header cut": struct.pack("<Q", 10**8) + b"{" * 1000,
        "cut": valid[:-1],
        "longer": valid + b"x",
        "shape": safetensors_bytes({name: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, bytes(4)),
        "size": safetensors_bytes(
            {name: {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}, bytes(4)
        ),
        "type": safetensors_bytes({name: {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "overlapping": safetensors_bytes(
            {key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for key in (name, "another")}, bytes(4)
        ),
        "list": safetensors_bytes([]),
        "deep": b"[" * 100_000,
        "zip": pickled({name: torch.zeros(4)}),
    }


HOSTILE_WEIGHTS = {
    **broken("0.weight"),
    "a tensor of it": save({"0.weight": torch.zeros(6, 2)}),
    "no numbers": save({"0.weight": torch.zeros(0, 2**30)}),
}
STATES = {
    **broken("optimizer.momentum"),
    "no state": save({}),
    "other names": save({"momentum": torch.zeros(4)}),
    "other shape": save({"optimizer.momentum": torch.zeros(1, 7)}),
    "no numbers": save({"optimizer.momentum": torch.zeros(0, 2**30)}),
}


@pytest.mark.parametrize("kind", quick_and_slow(HOSTILE_WEIGHTS, "header", "shape", "a tensor of it"))
def test_hostile_weight_files_are_rejected(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun, kind: str
) -> None:
    run = copy_run("interrupted")
    replace_file(run, "model.safetensors", HOSTILE_WEIGHTS[kind])
    messages = check_commands(trainyard, example_runs, run)
    assert messages.keys() == {"evaluate", "predict", "resume", "init_from"}


@pytest.mark.parametrize("kind", quick_and_slow(STATES, "header", "size", "zip", "other shape"))
def test_hostile_state_files_are_rejected(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun, kind: str
) -> None:
    run = copy_run("interrupted")
    replace_file(run, "state.safetensors", STATES[kind])
    messages = check_commands(trainyard, example_runs, run, "show", "resume")
    assert messages.keys() == {"resume"}
    if kind in broken(""):
        assert "state.safetensors is not a valid tensor file" in messages["resume"]
    else:
        assert "belongs to another optimizer" in messages["resume"]


# ------------------------------------------------------------------------------------------------------- pickles


class Canary:
    """An object whose unpickling creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_no_pickle_is_read(
    trainyard: RunCommand,
    example_runs: ExampleRuns,
    copy_run: CopyRun,
    canary: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Neither in place of the state, nor as the state of an earlier version, nor beside the files of the manifest."""
    content = {"pickle": pickle.dumps(Canary(canary), 2), "zip": pickled({"optimizer.momentum": Canary(canary)})}[kind]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(torch, "load", refuse)
    run = copy_run("interrupted")
    replace_file(run, "state.safetensors", content)
    assert (
        "state.safetensors is not a valid tensor file"
        in check_commands(trainyard, example_runs, run, "show", "resume")["resume"]
    )
    shutil.rmtree(run)
    run = copy_run("interrupted")
    for folder in checkpoints(run):
        if (folder / "state.safetensors").exists():
            put_state(folder, content)
    messages = check_commands(trainyard, example_runs, run)
    assert messages.keys() == {"predict", "resume"}, "predict has no table"
    assert "started by an earlier version" in messages["resume"]
    shutil.rmtree(run)
    run = copy_run("interrupted")
    for folder in checkpoints(run):
        (folder / "state.pt").write_bytes(content)
    assert check_commands(trainyard, example_runs, run).keys() == {"predict"}


# ------------------------------------------------------------------------------------------------------- Parquet


def encode_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def read_rows_schema() -> pa.Schema:
    both = pa.unify_schemas([MetricSchema().step_schema(), MetricSchema().evaluation_schema()])
    return both.append(pa.field("table", pa.string()))


def encode_many_rows() -> bytes:
    """Return twelve million empty rows in a few kilobytes."""
    schema, buffer = read_rows_schema(), io.BytesIO()
    group = pa.table([pa.nulls(4_000_000, field.type) for field in schema], schema=schema)
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        for _ in range(3):
            writer.write_table(group)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind",
    quick_and_slow(
        ["empty", "no Parquet", "other columns", "many rows", "other types", "metadata", "cut"], "many rows", "cut"
    ),
)
def test_hostile_row_files_are_rejected(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun, kind: str
) -> None:
    run = copy_run("interrupted")
    valid = next(
        folder / "rows.parquet" for folder in checkpoints(run) if (folder / "rows.parquet").exists()
    ).read_bytes()
    makers: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "no Parquet": lambda: b"PAR1" + b"\xff" * 100 + struct.pack("<I", 2**31 - 1) + b"PAR1",
        "other columns": lambda: encode_parquet(pa.table({"step": [1]})),
        "many rows": encode_many_rows,
        "other types": lambda: encode_parquet(
            pa.table({field.name: pa.array(["x"]) for field in pq.read_schema(io.BytesIO(valid))})
        ),
        "metadata": lambda: encode_parquet(pa.table({"a": [1]}).replace_schema_metadata({"x": "y" * 10_000_000})),
        "cut": lambda: valid[: len(valid) // 2],
    }
    replace_file(run, "rows.parquet", makers[kind]())
    messages = check_commands(trainyard, example_runs, run, "show", "resume")
    assert messages.keys() == {"resume"}


@pytest.mark.parametrize("kind", quick_and_slow(["empty", "many rows", "cut"], "cut"))
def test_hostile_segment_files_are_named(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun, kind: str
) -> None:
    run = copy_run("finished")
    segment = run / "metrics" / "steps" / "000001.parquet"
    segment.write_bytes({"empty": b"", "many rows": encode_many_rows(), "cut": segment.read_bytes()[:-20]}[kind])
    assert check_commands(trainyard, example_runs, run).keys() == {"predict"}
    shown = trainyard("show", run.name, "--verify")
    assert "damaged   metrics/steps/000001.parquet" in shown.stdout


# ---------------------------------------------------------------------------------------------------------- JSON

DEEPLY_NESTED = "[" * 50_000 + "]" * 50_000
HOSTILE_DOCUMENTS: dict[str, str | bytes] = {
    "deep": DEEPLY_NESTED,
    "deep in a key": '{"number": ' + DEEPLY_NESTED + "}",
    "a long number": '{"number": ' + "9" * 100_000 + "}",
    "NaN": '{"number": NaN}',
    "infinite": '{"number": 1e999, "kind": "claim"}',
    "no UTF-8": b"\xff\xfe{}",
    "a NUL": b"\x00" * 100,
    "cut": '{"kind": "claim", "nonce": "ab',
    "empty": "",
}


DOCUMENT_FILES = ["journal", "heartbeat", "manifest", "run.json", "result.json"]


@pytest.mark.parametrize(
    "case",
    quick_and_slow(
        [f"{bomb} as {where}" for where in DOCUMENT_FILES for bomb in HOSTILE_DOCUMENTS],
        "deep as journal",
        "cut as journal",
        "no UTF-8 as manifest",
        "infinite as heartbeat",
        "deep in a key as run.json",
        "empty as result.json",
    ),
)
def test_invalid_documents_are_ignored_or_rejected(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun, case: str
) -> None:
    bomb, _, where = case.partition(" as ")
    run = copy_run("interrupted" if where == "heartbeat" else "finished")
    text = HOSTILE_DOCUMENTS[bomb]
    path = {
        "journal": newest_commit(run)[0],
        "heartbeat": next((run / "heartbeats").glob("*")),
        "manifest": checkpoints(run)[0] / "manifest.json",
        "run.json": run / "run.json",
        "result.json": run / "result.json",
    }[where]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    messages = check_commands(
        trainyard, example_runs, run, "show", *(["evaluate", "resume"] if where in ("journal", "manifest") else [])
    )
    if where == "journal":
        assert all(path.name in text for text in messages.values())
        assert messages.keys() >= {"show", "resume"}
    else:
        assert "show" not in messages
    listed = trainyard("runs")
    assert (listed.exit_code, run.name in listed.stdout) == (0, True)


HOSTILE_COMMITS: dict[str, ChangeTree] = {
    "traversal": lambda tree: tree.update(checkpoint="../../x"),
    "absolute": lambda tree: tree.update(checkpoint="/etc"),
    "kept": lambda tree: tree.update(kept=[["../../../etc", None]]),
    "kept best": lambda tree: tree.update(kept=[[tree["checkpoint"], "..\\..\\x\u0000"]]),
    "encoded": lambda tree: tree.update(checkpoint="%2e%2e%2fx"),
    "wide": lambda tree: tree.update(checkpoint="\uff0e\uff0e/x"),
    "best": lambda tree: tree["best"].update(checkpoint="../x"),
    "a word for a number": lambda tree: tree.update(step="1"),
    "a number for a name": lambda tree: tree.update(checkpoint=7),
    "below 0": lambda tree: tree.update(step=-1),
    "no best": lambda tree: tree.pop("best"),
    "no step": lambda tree: tree.pop("step"),
    "a list": lambda tree: tree.update(metrics=[1]),
    "kept nothing": lambda tree: tree.update(kept=[[]]),
    "no time": lambda tree: tree.update(time="yesterday"),
    "another kind": lambda tree: tree.update(kind="party"),
    "of no kind": lambda tree: tree.update(kind=["commit"]),
    "number": lambda tree: tree.update(number=10**30),
}


CARRIED_COMMITS = [f"{kind}, carried" for kind in HOSTILE_COMMITS if "kind" not in kind]
"""The same in a commit that a later entry contains, which has no `kind`."""


@pytest.mark.parametrize(
    "case",
    quick_and_slow(
        [*HOSTILE_COMMITS, *CARRIED_COMMITS],
        "traversal",
        "kept best",
        "wide",
        "a word for a number",
        "a list",
        "kept best, carried",
        "a word for a number, carried",
    ),
)
def test_hostile_commits_are_rejected(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun, case: str
) -> None:
    kind = case.removesuffix(", carried")
    run = copy_run("interrupted")
    path, _ = newest_commit(run)
    leave = sorted((run / "journal").glob("*"))[-1]
    assert leave != path
    if kind == case:
        leave.unlink()
        edit_with_digest(path, HOSTILE_COMMITS[kind])
    else:
        path = leave
        edit_with_digest(path, lambda tree: HOSTILE_COMMITS[kind](tree["before"]["commit"]))
    messages = check_commands(trainyard, example_runs, run)
    assert messages.keys() == {"show", "evaluate", "predict", "resume", "init_from"}
    assert all(path.name in text for text in messages.values())


HOSTILE_CLAIMS: dict[str, ChangeTree] = {
    "interval": lambda tree: tree.update(interval_s=1e300),
    "lock": lambda tree: tree.update(lock=5),
    "facts": lambda tree: tree.update(facts=[]),
    "code": lambda tree: tree["facts"].update(code=7),
    "attempt": lambda tree: tree.update(attempt="../../1"),
}


@pytest.mark.parametrize("kind", quick_and_slow(HOSTILE_CLAIMS, "interval", "code"))
def test_hostile_claims_are_ignored_or_rejected(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun, kind: str
) -> None:
    """As the newest entry, and as contained in a later one; the claim itself is then read for display only."""
    run = copy_run("interrupted")
    first = run / "journal" / "00000001.json"
    edit_with_digest(first, HOSTILE_CLAIMS[kind])
    assert check_commands(trainyard, example_runs, run, "show") == {}
    leave = sorted((run / "journal").glob("*"))[-1]
    if kind != "code":  # no later entry contains it
        edit_with_digest(leave, lambda tree: HOSTILE_CLAIMS[kind](tree["before"]["claim"]))
        assert check_commands(trainyard, example_runs, run, "show", "resume").keys() == {"show", "resume"}
    for path in sorted((run / "journal").glob("*"))[1:]:
        path.unlink()
    assert check_commands(trainyard, example_runs, run, "show", "resume").keys() == {"show", "resume"}


HOSTILE_MANIFESTS: dict[str, ChangeTree] = {
    "traversal": lambda tree: tree["files"].update({"../../../job.yaml": {"size": 1, "sha256": "0"}}),
    "absolute": lambda tree: tree["files"].update({"/etc/passwd": {"size": 1, "sha256": "0"}}),
    "size": lambda tree: tree["files"]["model.safetensors"].update(size="x"),
    "files": lambda tree: tree.update(files=[]),
    "no files": lambda tree: tree.update(files={}),
    "no state": lambda tree: tree["files"].pop("state.safetensors", None),
    "position": lambda tree: tree.update(position={"step": 1, "x": 2}),
    "another position": lambda tree: tree["position"].update(step=10**9),
    "cell": lambda tree: tree.update(first_cell=10**12),
    "metrics": lambda tree: tree.update(metrics={"a": {}}),
    "format": lambda tree: tree.update(format=99),
    "step": lambda tree: tree.pop("step"),
    "end": lambda tree: tree.update(end="yes"),
}


@pytest.mark.parametrize("kind", quick_and_slow(HOSTILE_MANIFESTS, "traversal", "no state", "position", "cell"))
def test_hostile_manifests_are_ignored_or_rejected(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun, kind: str
) -> None:
    run = copy_run("interrupted")
    for folder in (run / "checkpoints").iterdir():
        edit_with_digest(folder / "manifest.json", HOSTILE_MANIFESTS[kind])
    messages = check_commands(trainyard, example_runs, run)
    assert "show" not in messages


def test_huge_entry_number_does_not_cause_a_long_scan(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun
) -> None:
    run = copy_run("interrupted")
    for name in ("\u00b2" * 8 + ".json", "\u0660" * 8 + ".json", "99999999999.json"):
        (run / "journal" / name).write_text("{}")
    (run / "reads").mkdir()
    (run / "reads" / ("\u00b2" * 8 + ".json")).write_text("")
    assert check_commands(trainyard, example_runs, run, "show", "resume") == {}
    assert trainyard("evaluate", run.name, "--split", "test").exit_code == 0
    assert "finished" in trainyard("show", run.name).stdout
    (run / "journal" / "99999999.json").write_text("{}")
    assert check_commands(trainyard, example_runs, run, "show", "resume") == {}
    assert "is missing, but later entries exist" in trainyard("show", run.name).stdout


def test_stored_text_cannot_inject_terminal_sequences(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun
) -> None:
    run = copy_run("interrupted")
    leave = sorted((run / "journal").glob("*"))[-1]
    edit_with_digest(
        leave, lambda tree: tree.update(status="failed", error={"type": "x", "message": "\x1b]0;pwned\x07\u202efine"})
    )
    shown = trainyard("show", run.name)
    assert "pwned" in shown.stdout
    assert not set("\x1b\x07\u202e") & set(shown.stdout)


# -------------------------------------------------------------------------------------------------------- job.yaml

BILLION_LAUGHS = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
)
HOSTILE_JOBS: dict[str, str | bytes] = {
    "python": "name: !!python/object/apply:os.mkdir [{canary}]\n",
    "python name": "name: v\nmodel: !!python/name:os.system\n",
    "laughs": BILLION_LAUGHS,
    "laughs in args": "name: v\ndata:\n  source:\n    call: os:mkdir\n    args: {{b: &b [x, x],\n"
    + "".join(
        f"      c{n}: &c{n} [*{'b' if n == 0 else f'c{n - 1}'}, *{'b' if n == 0 else f'c{n - 1}'}],\n"
        for n in range(60)
    )
    + "    }}\n",
    "itself": "name: &a [*a]\n",
    "deep": "name: " + "[" * 20_000 + "]" * 20_000,
    "long": "name: v\n" + "# x\n" * 400_000,
    "a huge number": "name: v\nseed: 0x" + "f" * 100_000 + "\n",
    "no UTF-8": b"name: \xff\xfe",
    "no mapping": "[1, 2]\n",
    "layers": "name: v\nmodel: {{kind: mlp, hidden: doubling, layers: 1000000000}}\n",
    "wide": "name: v\nmodel: {{kind: mlp, hidden: [200000, 200000]}}\n",
    "wider than numbers go": "name: v\nmodel: {{kind: mlp, hidden: [4611686018427387904, 4611686018427387904]}}\n",
    "base": "base: /etc/passwd\nname: v\n",
}


@pytest.mark.parametrize(
    "kind", quick_and_slow(HOSTILE_JOBS, "python", "laughs in args", "wide", "no UTF-8", "a huge number")
)
def test_hostile_stored_jobs_are_rejected(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun, canary: Path, kind: str
) -> None:
    run = copy_run("finished")
    text = HOSTILE_JOBS[kind]
    if isinstance(text, bytes):
        path = run / "job.yaml"
        path.write_bytes(path.read_bytes().partition(b"\n")[0] + b"\n" + text)
    else:
        replace_job(
            run, text.replace("{canary}", str(canary)).replace("{{", "{").replace("}}", "}"), {"identity": "another"}
        )
    messages = check_commands(trainyard, example_runs, run)
    assert messages.keys() >= {"evaluate", "predict", "resume"}


IMPORTING_JOBS: dict[str, ChangeTree] = {
    "data": lambda tree: tree["data"].update(source={"call": "hostile:run", "args": {}}),
    "model": lambda tree: tree.update(model={"kind": "hostile:run"}),
    "loss": lambda tree: tree["task"].update(loss="hostile:run"),
    "metric": lambda tree: tree.update(metrics=["hostile:gauge"]),
    "system": lambda tree: tree["data"].update(source={"call": "os:mkdir", "args": {"path": "canary"}}),
    "Popen": lambda tree: tree.update(model={"kind": "subprocess:Popen", "args": {"args": ["mkdir", "canary"]}}),
}


@pytest.mark.parametrize("kind", quick_and_slow(IMPORTING_JOBS, "system", "model"))
def test_modules_named_by_a_stored_job_are_not_imported(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun, canary: Path, kind: str
) -> None:
    run = copy_run("finished")
    code = f"import os\nos.mkdir({str(canary)!r})\ndef run(**args): pass\ndef gauge(*args): pass\n"
    (run.parent.parent / "hostile.py").write_text(code)  # even if it can be imported
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hostile.py", code)
    (run / "code.zip").write_bytes(buffer.getvalue())
    rewrite_job(run, IMPORTING_JOBS[kind])
    messages = check_commands(trainyard, example_runs, run)
    assert "--trust" in messages["evaluate"]
    assert "hostile" not in sys.modules
    if kind in ("model", "Popen"):
        assert "--trust" in messages["predict"]


def test_stored_code_folder_is_not_imported_from(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun
) -> None:
    """Otherwise it could provide any module that a library tries to import."""
    run = copy_run("finished")
    rewrite_job(run, lambda tree: tree.update(code=str(run)))
    before = list(sys.path)
    assert check_commands(trainyard, example_runs, run).keys() == {"predict"}
    assert str(run) not in {*sys.path} - {*before}


@pytest.mark.parametrize(
    "url",
    quick_and_slow(
        [
            "reference://::file:///tmp/x.json",
            "dask://x",
            "git://x",
            "file://x::simplecache::file:///etc",
            "libarchive://x",
        ],
        "reference://::file:///tmp/x.json",
    ),
)
def test_stored_job_reads_data_only_by_plain_file_systems(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun, url: str
) -> None:
    run = copy_run("finished")
    rewrite_job(run, lambda tree: tree["data"].update(source="parquet", url=url, label="y"))
    messages = check_commands(trainyard, example_runs, run, "evaluate")
    assert "--trust" in messages["evaluate"]


@pytest.mark.parametrize(
    "entry",
    quick_and_slow(
        ["../out.py", "/tmp/out.py", "a/../../out.py", "C:\\out.py", "link.py", "big.py", "sitecustomize.pth"],
        "../out.py",
        "big.py",
    ),
)
def test_stored_code_stays_in_its_folder_even_if_trusted(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun, tmp_path: Path, entry: str
) -> None:
    run = copy_run("finished")
    rewrite_job(run, lambda tree: tree.update(model={"kind": "nowhere:Net"}))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        info = zipfile.ZipInfo(entry)
        if entry == "link.py":
            info.external_attr = 0o120777 << 16
        archive.writestr(info, b"/etc/passwd" if entry == "link.py" else bytes(2 * 10**7 if entry == "big.py" else 10))
    (run / "code.zip").write_bytes(buffer.getvalue())
    with limited_resources(), pytest.raises(InputError):
        load(str(run), trust=True)
    assert not list(tmp_path.glob("out.py"))
    assert not Path("/tmp/out.py").exists()


# ------------------------------------------------------------------------------------------------- preprocess.json


HOSTILE_PREPROCESSING: dict[str, ChangeTree] = {
    "huge": lambda tree: tree["inputs"].update(sample_shape=[10**9, 10**9]),
    "negative": lambda tree: tree["inputs"].update(sample_shape=[-1]),
    "no axis": lambda tree: tree["inputs"].update(sample_shape=[]),
    "text": lambda tree: tree["inputs"].update(sample_shape="xy"),
    "means": lambda tree: tree["inputs"].update(mean=[1e308] * 3),
    "codes": lambda tree: tree["inputs"].update(
        kind="table",
        columns=[{"name": "a", "kind": "category", "levels": [], "missing": 10**12}],
        one_hot_up_to=10**15,
        refused=[],
    ),
    "columns": lambda tree: tree["inputs"].update(kind="table", columns=7),
    "classes": lambda tree: tree["targets"].update(classes=None),
    "kind": lambda tree: tree["targets"].update(kind="other"),
    "counts": lambda tree: tree.update(class_counts="x"),
    "version": lambda tree: tree.update(version=99),
    "none": lambda tree: tree.pop("inputs"),
}


@pytest.mark.parametrize("kind", quick_and_slow(HOSTILE_PREPROCESSING, "huge", "means", "codes"))
def test_hostile_preprocessing_is_ignored_or_rejected(
    trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun, kind: str
) -> None:
    run = copy_run("finished")
    tree = json.loads(next(folder / "preprocess.json" for folder in checkpoints(run)).read_text())
    HOSTILE_PREPROCESSING[kind](tree)
    replace_file(run, "preprocess.json", json.dumps(tree).encode())
    check_commands(trainyard, example_runs, run, "evaluate", "predict")
    with limited_resources(), suppress(InputError):
        load(str(run)).predict(np.zeros((3, 2)))


def test_undamaged_run_is_read(trainyard: RunCommand, example_runs: ExampleRuns, copy_run: CopyRun) -> None:
    """The other tests are meaningful: on an undamaged run these commands succeed (except predict, without a table)."""
    run = copy_run("interrupted")
    assert check_commands(trainyard, example_runs, run).keys() == {"predict"}
    assert load(str(run)).predict(np.zeros((3, 2))).shape == (3,)
