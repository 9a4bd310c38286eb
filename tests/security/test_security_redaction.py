"""Planted secrets are found in nothing that is written or printed."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings

from pipeline import train
from pipeline.errors import JobError
from pipeline.job_file import build_job
from pipeline.redaction import holds_secret, scrub
from tests.cli.cli_calls import Trainyard, write_job
from tests.security.listening import command_lines
from tests.security.spoiling import some

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalr/XUtn+FEMI==planted",
    "HF_TOKEN": "hf_planted&token",
    "SERVICE_PASSWORD": "planted pass'word\"!",
    "PRIVATE_KEY": "-----BEGIN-----\nplantedplantedplantedplanted\n-----END-----",
}
IN_URLS = ["urlplantedpassword", "urlplantedsignature"]

OWN = """
import os
import numpy as np

def rows(token):
    assert token == os.environ["HF_TOKEN"], "it is looked up where it is used"
    if os.environ.get("FAIL") == "source":
        password, signature = "urlplanted" + "password", "urlplanted" + "signature"  # the code itself is stored
        raise RuntimeError(f"no answer for {token} from s3://key:{password}@host/x?sig={signature}")
    draw = np.random.default_rng(0)
    return draw.normal(size=(200, 2)).astype(np.float32), draw.integers(0, 2, 200)

def gauge(outputs, targets):
    if os.environ.get("FAIL") == "metric":
        raise RuntimeError("signed with " + os.environ["AWS_SECRET_ACCESS_KEY"] + os.environ["PRIVATE_KEY"])
    return 1.0
"""
OWN_JOB = {
    "data": {"source": {"call": "planted_code:rows", "args": {"token": "env:HF_TOKEN"}}, "splits": {"val": 0.2}},
    "task": {"kind": "multiclass"},
    "metrics": ["planted_code:gauge"],
}


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def found_in(text: str | bytes) -> list[str]:
    """The planted secrets in a text, as they are, in a URL or in JSON."""
    words = text.decode(errors="replace") if isinstance(text, bytes) else text
    forms = {form for value in SECRETS.values() for form in (value, quote(value, safe=""), json.dumps(value)[1:-1])}
    forms |= {"plantedplanted", *IN_URLS}
    return sorted(form for form in forms if form in words)


def check_files(folder: Path, *but: str) -> None:
    """No file below a folder holds any."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in but]
    assert files
    for path in files:
        assert not found_in(path.read_bytes()), path
        if path.suffix == ".parquet":
            assert not found_in(str(pq.read_table(path).to_pylist())), path


def test_a_run_that_uses_them_writes_none(trainyard: Trainyard, tmp_path: Path) -> None:
    (tmp_path / "planted_code.py").write_text(OWN)
    job = write_job(tmp_path, **OWN_JOB)
    trained = trainyard("train", job, "--json", "--verbose")
    assert trained.code == 0, trained.err
    shown, evaluated = (
        trainyard("show", trained.json["run"], "--json"),
        trainyard("evaluate", trained.json["run"], "--trust"),
    )
    assert "env:HF_TOKEN" in (Path(trained.json["url"]) / "job.yaml").read_text()
    for ended in (trained, shown, evaluated):
        assert ended.code == 0, ended.err
        assert not found_in(ended.out + ended.err)
    check_files(tmp_path, "planted_code.py")


@pytest.mark.parametrize(
    "case",
    some(
        ["source --json", "source --verbose", "metric --json", "metric --verbose"], "source --json", "metric --verbose"
    ),
)
def test_errors_of_the_users_own_code(
    trainyard: Trainyard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    (tmp_path / "planted_code.py").write_text(OWN)
    where, flag = case.split()
    monkeypatch.setenv("FAIL", where)
    sys.modules.pop("planted_code", None)
    ended = trainyard("train", write_job(tmp_path, **OWN_JOB), flag)
    assert ended.code in (1, 2), ended.err
    assert "***" in ended.err
    assert not found_in(ended.out + ended.err)
    check_files(tmp_path, "planted_code.py")
    runs = trainyard("runs", "--json")
    assert not found_in(runs.out + runs.err)


@pytest.fixture
def table_url(tmp_path: Path) -> Iterator[str]:
    """A table behind a URL with a password and a signature."""
    folder = tmp_path / "served"
    folder.mkdir()
    draw = np.random.default_rng(0)
    pq.write_table(pa.table({"x": draw.normal(size=100), "y": draw.integers(0, 2, 100)}), folder / "t.parquet")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://user:{IN_URLS[0]}@127.0.0.1:{server.server_port}/t.parquet?token={IN_URLS[1]}"
    server.shutdown()
    server.server_close()


def test_data_behind_a_secret_url(
    trainyard: Trainyard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table_url: str
) -> None:
    data = {"source": "parquet", "url": "env:DATA_PLACE", "label": "y", "splits": {"val": 0.2}}
    job = write_job(tmp_path, data=data, task={"kind": "binary"})
    ended = trainyard("train", job)
    assert (ended.code, "DATA_PLACE" in ended.err) == (2, True), "it is not there yet"
    monkeypatch.setenv("DATA_PLACE", table_url)
    trained = trainyard("train", job, "--json")
    assert trained.code == 0, trained.err
    evaluated = trainyard("evaluate", trained.json["run"])
    assert evaluated.code == 0, evaluated.err
    monkeypatch.setenv("DATA_PLACE", table_url.replace("t.parquet", "none.parquet"))
    missing = trainyard("evaluate", trained.json["run"], "--verbose")
    assert missing.code == 2
    for one in (trained, evaluated, missing):
        assert not found_in(one.out + one.err)
    check_files(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"storage": f"s3://key:{IN_URLS[0]}@bucket/runs"},
        {"storage": f"sftp://me:{IN_URLS[0]}/x@host/runs"},
        {
            "data": {
                "source": "parquet",
                "label": "y",
                "url": f"https://host/t.parquet?x=1&X-Amz-Signature={IN_URLS[1]}",
            }
        },
        {"data": {"source": "parquet", "label": "y", "url": f"abfs://c/t.parquet?sv=1&sig={IN_URLS[1]}"}},
        {"model": {"kind": "mlp", "init_from": f"https://me:{IN_URLS[0]}@host/runs/a@best"}},
        {"data": {"source": {"call": "planted_code:rows", "args": {"token": SECRETS["HF_TOKEN"]}}}},
        {"data": {"source": {"call": "planted_code:rows", "args": {"deep": [{"x": "${HF_TOKEN}"}]}}}},
        {"storage": "s3://${SERVICE_PASSWORD}/x"},
        {"storage": "${PLACE}"},
    ],
    ids=["password", "slash", "Amazon", "Azure", "init_from", "literal", "deep", "environment", "a URL there"],
)
def test_a_job_that_holds_one_is_refused_before_anything_is_written(
    trainyard: Trainyard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object]
) -> None:
    monkeypatch.setenv("PLACE", f"s3://key:{IN_URLS[0]}@bucket/runs")
    job = write_job(tmp_path, **change)
    for words in (["train", job, "--json"], ["check", job]):
        ended = trainyard(*words)
        assert (ended.code, ended.err.count("error:")) == (2, 1), ended.err
        assert "env:" in ended.err
        assert not found_in(ended.out + ended.err)
    assert {path.name for path in tmp_path.iterdir()} == {"small.yaml"}


def test_an_override_and_a_job_in_python_too(trainyard: Trainyard, tmp_path: Path) -> None:
    url = f"s3://key:{IN_URLS[0]}@bucket/x"
    ended = trainyard("train", write_job(tmp_path), "--set", f"storage={url}")
    assert ended.code == 2
    assert not found_in(ended.out + ended.err)
    with pytest.raises(JobError, match="storage: holds a secret") as caught:
        train(build_job({"name": "x", "storage": url}, "test"))
    assert not found_in(str(caught.value))


def test_a_storage_url_with_a_password_works_and_is_never_shown(
    trainyard: Trainyard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("RUNS", f"memory://me:{IN_URLS[0]}@host/runs")
    trained = trainyard("train", write_job(tmp_path, storage="env:RUNS"), "--json")
    assert trained.code == 0, trained.err
    assert trained.json["url"].startswith("memory://me:***@host/runs/small-")
    monkeypatch.setenv("TRAINYARD_STORAGE", "env:RUNS")
    shown = trainyard("show", trained.json["run"])
    assert shown.code == 0, shown.err
    for one in (trained, shown):
        assert not found_in(one.out + one.err)
    store = fsspec.filesystem("memory").store
    files = {name: file.getvalue() for name, file in store.items() if "me:" in name}
    assert len(files) > 10
    assert not [name for name, content in files.items() if found_in(content)]
    for name in files:
        del store[name]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=8, max_size=30),
    st.text(max_size=9),
    st.sampled_from([str, lambda text: quote(text, safe=""), lambda text: json.dumps(text)[1:-1]]),
)
def test_scrubbing(secret: str, around: str, form: object) -> None:
    assert callable(form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_API_KEY", secret)
        shown = scrub(f"{around} {form(secret)} {around}")
        assert form(secret) not in shown.replace("***", "") or form(secret) in around + " " + around


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("s3://bucket/runs", False),
        ("http://127.0.0.1:8265/runs/a@best", False),
        ("sftp://me@host:22/x", False),
        ("s3://bucket/x?versionId=7", False),
        ("data/part-?.parquet", False),
        ("ftp://me:12345@host/x", True),
        ("https://host/x?access_token=7", True),
    ],
)
def test_what_counts_as_a_secret_in_a_url(text: str, is_one: bool) -> None:
    assert holds_secret(text) == is_one


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("where", ["", "metric"])
def test_ray_workers_logs_and_command_lines(tmp_path: Path, where: str) -> None:
    (tmp_path / "planted_code.py").write_text(OWN)
    ray_files = Path(tempfile.mkdtemp(prefix="ty", dir="/tmp"))  # sockets lie there: their paths must be short
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "RAY_TMPDIR": str(ray_files), "FAIL": where}
    seen: set[str] = set()
    try:
        with (tmp_path / "out.txt").open("w") as out:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "pipeline",
                    "train",
                    write_job(tmp_path, **OWN_JOB),
                    "--workers",
                    "2",
                    "--verbose",
                ],
                cwd=tmp_path,
                env=environment,
                stdout=out,
                stderr=out,
            )
            while process.poll() is None:
                seen |= set(command_lines(process.pid))
                time.sleep(0.2)
        said = (tmp_path / "out.txt").read_text()
        assert (process.returncode == 0) == (where == ""), said
        assert "***" in said or not where
        assert len(seen) > 5
        assert not [line for line in seen if found_in(line)]
        check_files(tmp_path, "planted_code.py")
        check_files(ray_files)
    finally:
        shutil.rmtree(ray_files, ignore_errors=True)
