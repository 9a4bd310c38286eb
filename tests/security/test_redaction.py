"""Secrets are neither written nor printed. The tests plant secrets and search for them."""

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
from pydantic import BaseModel

from pipeline import redaction, train
from pipeline.config import JobConfig
from pipeline.config.files import build_job, dump_job, load_job
from pipeline.config.files.validation_errors import _find_models
from pipeline.errors import JobError
from pipeline.redaction import find_secrets, has_secret, is_secret_name, redact
from tests.cli.command_line import RunCommand, write_job
from tests.security.corruption import quick_and_slow
from tests.security.listening_sockets import list_command_lines

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalr/XUtn+FEMI==planted",
    "HF_TOKEN": "hf_planted&token",
    "SERVICE_PASSWORD": "planted pass'word\"!",
    "PRIVATE_KEY": "-----BEGIN-----\nplantedplantedplantedplanted\n-----END-----",
}
URL_SECRETS = ["urlplantedpassword", "urlplantedsignature"]

USER_MODULE = """
import os
import numpy as np

def rows(token):
    assert token == os.environ["HF_TOKEN"], "env: is resolved where it is used"
    if os.environ.get("FAIL") == "source":
        password, signature = "urlplanted" + "password", "urlplanted" + "signature"  # the code is stored too
        raise RuntimeError(f"no answer for {token} from s3://key:{password}@host/x?sig={signature}")
    rng = np.random.default_rng(0)
    return rng.normal(size=(200, 2)).astype(np.float32), rng.integers(0, 2, 200)

def gauge(outputs, targets):
    if os.environ.get("FAIL") == "metric":
        raise RuntimeError("signed with " + os.environ["AWS_SECRET_ACCESS_KEY"] + os.environ["PRIVATE_KEY"])
    return 1.0
"""
USER_CODE_JOB = {
    "data": {"source": {"call": "planted_code:rows", "args": {"token": "env:HF_TOKEN"}}, "splits": {"val": 0.2}},
    "task": {"kind": "multiclass"},
    "metrics": ["planted_code:gauge"],
}


@pytest.fixture(autouse=True)
def _planted_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def secrets_in(text: str | bytes) -> list[str]:
    """Return the planted secrets that a text contains, plain, quoted for URLs or escaped for JSON."""
    decoded = text.decode(errors="replace") if isinstance(text, bytes) else text
    forms = {form for value in SECRETS.values() for form in (value, quote(value, safe=""), json.dumps(value)[1:-1])}
    forms |= {"plantedplanted", *URL_SECRETS}
    return sorted(form for form in forms if form in decoded)


def check_no_secrets(folder: Path, *excluded: str) -> None:
    """Check that no file below a folder contains a secret."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in excluded]
    assert files
    for path in files:
        assert not secrets_in(path.read_bytes()), path
        if path.suffix == ".parquet":
            assert not secrets_in(str(pq.read_table(path).to_pylist())), path


def test_run_does_not_write_secrets(trainyard: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "planted_code.py").write_text(USER_MODULE)
    job = write_job(tmp_path, **USER_CODE_JOB)
    trained = trainyard("train", job, "--json", "--verbose")
    assert trained.exit_code == 0, trained.stderr
    shown, evaluated = (
        trainyard("show", trained.json["run"], "--json"),
        trainyard("evaluate", trained.json["run"], "--trust"),
    )
    assert "env:HF_TOKEN" in (Path(trained.json["url"]) / "job.yaml").read_text()
    for result in (trained, shown, evaluated):
        assert result.exit_code == 0, result.stderr
        assert not secrets_in(result.stdout + result.stderr)
    check_no_secrets(tmp_path, "planted_code.py")


@pytest.mark.parametrize(
    "case",
    quick_and_slow(
        ["source --json", "source --verbose", "metric --json", "metric --verbose"], "source --json", "metric --verbose"
    ),
)
def test_user_code_errors_are_redacted(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    (tmp_path / "planted_code.py").write_text(USER_MODULE)
    where, flag = case.split()
    monkeypatch.setenv("FAIL", where)
    sys.modules.pop("planted_code", None)
    result = trainyard("train", write_job(tmp_path, **USER_CODE_JOB), flag)
    assert result.exit_code in (1, 2), result.stderr
    assert "***" in result.stderr
    assert not secrets_in(result.stdout + result.stderr)
    check_no_secrets(tmp_path, "planted_code.py")
    runs = trainyard("runs", "--json")
    assert not secrets_in(runs.stdout + runs.stderr)


@pytest.fixture
def table_url(tmp_path: Path) -> Iterator[str]:
    """The URL, with a password and a signature, of a table on a local server."""
    folder = tmp_path / "served"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pq.write_table(pa.table({"x": rng.normal(size=100), "y": rng.integers(0, 2, 100)}), folder / "t.parquet")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://user:{URL_SECRETS[0]}@127.0.0.1:{server.server_port}/t.parquet?token={URL_SECRETS[1]}"
    server.shutdown()
    server.server_close()


def test_data_url_with_a_secret_is_read_and_not_written(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table_url: str
) -> None:
    data = {"source": "parquet", "url": "env:DATA_PLACE", "label": "y", "splits": {"val": 0.2}}
    job = write_job(tmp_path, data=data, task={"kind": "binary"})
    result = trainyard("train", job)
    assert (result.exit_code, "DATA_PLACE" in result.stderr) == (2, True), "the variable is not set yet"
    monkeypatch.setenv("DATA_PLACE", table_url)
    trained = trainyard("train", job, "--json")
    assert trained.exit_code == 0, trained.stderr
    evaluated = trainyard("evaluate", trained.json["run"])
    assert evaluated.exit_code == 0, evaluated.stderr
    monkeypatch.setenv("DATA_PLACE", table_url.replace("t.parquet", "none.parquet"))
    missing = trainyard("evaluate", trained.json["run"], "--verbose")
    assert missing.exit_code == 2
    for completed in (trained, evaluated, missing):
        assert not secrets_in(completed.stdout + completed.stderr)
    check_no_secrets(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"storage": f"s3://key:{URL_SECRETS[0]}@bucket/runs"},
        {"storage": f"sftp://me:{URL_SECRETS[0]}/x@host/runs"},
        {
            "data": {
                "source": "parquet",
                "label": "y",
                "url": f"https://host/t.parquet?x=1&X-Amz-Signature={URL_SECRETS[1]}",
            }
        },
        {"data": {"source": "parquet", "label": "y", "url": f"abfs://c/t.parquet?sv=1&sig={URL_SECRETS[1]}"}},
        {"model": {"kind": "mlp", "init_from": f"https://me:{URL_SECRETS[0]}@host/runs/a@best"}},
        {"data": {"source": {"call": "planted_code:rows", "args": {"token": SECRETS["HF_TOKEN"]}}}},
        {"data": {"source": {"call": "planted_code:rows", "args": {"deep": [{"x": "${HF_TOKEN}"}]}}}},
        {"storage": "s3://${SERVICE_PASSWORD}/x"},
        {"storage": "${PLACE}"},
        {"storage": f"https://{URL_SECRETS[0]}@host/runs"},
        {"data": {"source": {"call": "planted_code:rows", "args": {"deep": [{"x": "${AZURE_STORAGE_KEY}"}]}}}},
        {"model": {"kind": "planted_code:Net", "args": {"password": URL_SECRETS[0]}}},
        {"model": {"kind": "planted_code:Net", "args": {"logins": [{"api_keys": ["env:HF_TOKEN", URL_SECRETS[0]]}]}}},
        {"model": {"kind": "planted_code:Net", "args": {"dsn": f"host=db password={URL_SECRETS[0]} user=me"}}},
    ],
    ids=[
        *("password", "slash", "Amazon", "Azure", "init_from", "literal", "deep", "environment", "a URL there"),
        *("token", "key", "argument", "list", "connection string"),
    ],
)
def test_job_with_a_secret_is_rejected_before_writing(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object]
) -> None:
    monkeypatch.setenv("PLACE", f"s3://key:{URL_SECRETS[0]}@bucket/runs")
    monkeypatch.setenv("AZURE_STORAGE_KEY", URL_SECRETS[0])
    job = write_job(tmp_path, **change)
    for arguments in (["train", job, "--json"], ["check", job]):
        result = trainyard(*arguments)
        assert (result.exit_code, result.stderr.count("error:")) == (2, 1), result.stderr
        assert "env:" in result.stderr
        assert not secrets_in(result.stdout + result.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"small.yaml"}


def test_overrides_and_python_jobs_with_secrets_are_rejected(trainyard: RunCommand, tmp_path: Path) -> None:
    url = f"s3://key:{URL_SECRETS[0]}@bucket/x"
    result = trainyard("train", write_job(tmp_path), "--set", f"storage={url}")
    assert result.exit_code == 2
    assert not secrets_in(result.stdout + result.stderr)
    for override in (
        f"model.args.token=[{URL_SECRETS[0]}",
        f"model={{kind: 'm:N', args: {{user_pass: {URL_SECRETS[0]}}}}}",
    ):
        result = trainyard("train", write_job(tmp_path), "--set", override)
        assert (result.exit_code, secrets_in(result.stderr)) == (2, []), result.stderr
    (tmp_path / "below.yaml").write_text(
        f"data: {{source: parquet, label: y, url: 'https://{URL_SECRETS[0]}@h/t.parquet'}}"
    )
    (tmp_path / "above.yaml").write_text("base: below.yaml\nname: above")
    result = trainyard("check", "above.yaml", "--json")
    assert (result.exit_code, secrets_in(result.stdout + result.stderr)) == (2, [])
    assert "data.url: holds a secret" in result.json["error"]["message"]
    with pytest.raises(JobError, match="storage: holds a secret") as caught:
        train(build_job({"name": "x", "storage": url}, "test"))
    assert not secrets_in(str(caught.value))


def test_storage_url_password_is_used_and_never_shown(
    trainyard: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("RUNS", f"memory://me:{URL_SECRETS[0]}@host/runs")
    trained = trainyard("train", write_job(tmp_path, storage="env:RUNS"), "--json")
    assert trained.exit_code == 0, trained.stderr
    assert trained.json["url"].startswith("memory://me:***@host/runs/small-")
    monkeypatch.setenv("TRAINYARD_STORAGE", "env:RUNS")
    shown = trainyard("show", trained.json["run"])
    assert shown.exit_code == 0, shown.stderr
    for completed in (trained, shown):
        assert not secrets_in(completed.stdout + completed.stderr)
    store = fsspec.filesystem("memory").store
    files = {name: file.getvalue() for name, file in store.items() if "me:" in name}
    assert len(files) > 10
    assert not [name for name, content in files.items() if secrets_in(content)]
    for name in files:
        del store[name]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=8, max_size=30),
    st.text(max_size=9),
    st.sampled_from([str, lambda text: quote(text, safe=""), lambda text: json.dumps(text)[1:-1]]),
)
def test_secret_values_are_redacted_in_each_form(secret: str, surrounding: str, form: object) -> None:
    assert callable(form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_API_KEY", secret)
        shown = redact(f"{surrounding} {form(secret)} {surrounding}")
        assert form(secret) not in shown.replace("***", "") or form(secret) in surrounding + " " + surrounding


RANDOM_SECRET = "9f86d081884c7d659a2feaa0c55ad015"
"""Formatted like the generated key of a service."""


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/runs",
        "http://127.0.0.1:8265/runs/a@best",
        "http://[::1]:8265/runs/a@best",
        "sftp://me@host:22/x",
        "hdfs://me@namenode/x",
        f"abfs://{RANDOM_SECRET}@account.dfs.core.windows.net/x",
        "hf://datasets/me/set@main/t.parquet",
        "s3://bucket/x?versionId=7",
        "data/part-?.parquet",
        "https://host/x?author=me&passenger=7&design=flat&keyspace=k&monkey=1&tokenizer=bpe&sort_key=day&max_tokens=9",
        "https://host/x?country_code=de&token=",
        "code: folder",
        "Basic statistics of Bearer bonds",
        "sk-random-forest-baseline-of-the-year",
        "git+ssh://git@host/me/repo",
        "secret=env:NAME",
    ],
)
def test_ordinary_text_has_no_secret(text: str) -> None:
    assert not has_secret(text)


QUERY_PARAMETERS = (
    "pwd",
    "pass",
    "code",
    "key",
    "sig",
    "apikey",
    "api-key",
    "auth",
    "X-Amz-Security-Token",
    "X-Amz-Credential",
)


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("ftp://me:12345@host/x", "12345"),
        ("redis://:12345@host/0", "12345"),
        ("https://sometoken@host/x", "sometoken"),
        ("git+https://sometoken@host/me/repo", "sometoken"),
        ("simplecache::HTTPS://sometoken@host/x", "sometoken"),
        (f"sftp://{RANDOM_SECRET}@host/x", RANDOM_SECRET),
        ("https://host/x?access_token=7531", "7531"),
        *((f"https://host/x?a=1&{name}=7531", "7531") for name in QUERY_PARAMETERS),
        ("https://host/x#access_token=7531", "7531"),
        ("https://host/x;token=7531", "7531"),
        ("abfs://box@account/x?sv=2022-11-02&sig=abc%3D", "abc%3D"),
        ("DefaultEndpointsProtocol=https;AccountName=me;AccountKey=c2VjcmV0c2VjcmV0;", "c2VjcmV0c2VjcmV0"),
        ("host=db user=me password=1234", "1234"),
        ("Authorization: Basic bWU6c2VjcmV0", "bWU6c2VjcmV0"),
        ("see ghp_0123456789abcdefghijklmnopqrstuvwxyz", "0123456789"),
        ("hf_abcdefghijklmnopqrstuvwxyzabcdefgh", "abcdefgh"),
        ("sk-proj-0123456789abcdefABCDEF0123", "0123456789"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N", "dozjgNryP4J3"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "MIIE"),
    ],
)
def test_text_with_a_secret_is_neither_stored_nor_shown(text: str, secret: str) -> None:
    assert has_secret(text)
    shown = redact(f"cannot read {text} now")
    assert (secret in shown, "***" in shown) == (False, True)
    assert shown.startswith("cannot read")


@pytest.mark.parametrize("piece", ["a", "a-", "A1b2", "x=1&", "?a", "password", "sk-", "eyJ"])
def test_redaction_time_is_linear(piece: str) -> None:
    """An algorithm with quadratic time would take minutes."""
    assert not has_secret(piece * (100_000 // len(piece)))
    assert redact(piece * (100_000 // len(piece)))


SECRET_NAMES = """
    AZURE_STORAGE_KEY KAGGLE_KEY OPENAI_KEY DB_PASS MYSQL_PWD AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN HF_TOKEN
    PGPASSWORD GITHUB_PAT AZURE_STORAGE_SAS_TOKEN WANDB_API_KEY apiKey api-key APIKEY DB_PASS_PROD SSHPASS client_secret
    API_KEYS AZURE_STORAGE_CONNECTION_STRING STRIPE_KEY_LIVE OPENAI_KEY_2 NPM_AUTH PRIVATE_KEY TOKEN PASS
    GOOGLE_CREDENTIALS ENCRYPTIONKEY REDIS_PASSWORD ROOT_PW X-Amz-Signature ACCOUNT_KEY_1
"""
HARMLESS_NAMES = """
    key_column keys passenger code author tokenizer monkey TOKENIZERS_PARALLELISM PWD OLDPWD SORT_KEY label_key
    image_key KEYBOARD COMPASS BYPASS MAX_TOKENS pad_token eos_token token_type AWS_ACCESS_KEY_ID SSH_AUTH_SOCK signal
    design secretary RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH AWSAccessKeyId X-Amz-SignedHeaders primary_key keyspace turkey
    signature KEY PATH
"""


def test_secret_names_and_lookalikes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_registered_names", set())  # without the names that other tests registered
    assert [name for name in SECRET_NAMES.split() if not is_secret_name(name)] == []
    assert [name for name in HARMLESS_NAMES.split() if is_secret_name(name)] == []


def field_names(kind: type[BaseModel]) -> set[str]:
    """Return the names of all fields of the job file."""
    names, pending, seen = set[str](), [kind], set[type[BaseModel]]()
    while pending:
        model_type = pending.pop()
        seen.add(model_type)
        for name, field in model_type.model_fields.items():
            names.add(field.alias or name)
            pending += [inner for inner in _find_models(field.annotation) if inner not in seen]
    return names


def test_no_job_field_is_named_like_a_secret() -> None:
    names = field_names(JobConfig)
    assert len(names) > 80
    assert [name for name in names if list(find_secrets({name: RANDOM_SECRET})) and name != "code"] == []
    assert (
        list(find_secrets({"code": "own_model", "token": "[CLS]", "pad_token": "<pad>", "label_key": RANDOM_SECRET}))
        == []
    )


@pytest.mark.parametrize("name", ["AZURE_STORAGE_KEY", "KAGGLE_KEY", "OPENAI_KEY", "DB_PASS", "MYSQL_PWD"])
def test_secret_named_variable_is_not_substituted_and_the_fix_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "correct horse")
    monkeypatch.setenv("SORT_KEY", "correct horse")
    args = {"nested": {"list": [f"${{{name}}}"]}}
    path = write_job(tmp_path, data={"source": {"call": "m:f", "args": args}, "splits": {"val": 0.2}})
    with pytest.raises(JobError, match=f"env:{name}") as caught:
        load_job(path)
    assert "horse" not in str(caught.value)
    monkeypatch.delenv(name)
    path = write_job(tmp_path, data={"source": {"call": "m:f", "args": {"by": "${SORT_KEY}"}}, "splits": {"val": 0.2}})
    assert "correct horse" in dump_job(load_job(path))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("where", ["", "metric"])
def test_ray_workers_logs_and_command_lines_have_no_secrets(tmp_path: Path, where: str) -> None:
    (tmp_path / "planted_code.py").write_text(USER_MODULE)
    ray_files = Path(tempfile.mkdtemp(prefix="ty", dir="/tmp"))  # it holds sockets, whose paths must be short
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
                    write_job(tmp_path, **USER_CODE_JOB),
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
                seen |= set(list_command_lines(process.pid))
                time.sleep(0.2)
        output = (tmp_path / "out.txt").read_text()
        assert (process.returncode == 0) == (where == ""), output
        assert "***" in output or not where
        assert len(seen) > 5
        assert not [line for line in seen if secrets_in(line)]
        check_no_secrets(tmp_path, "planted_code.py")
        check_no_secrets(ray_files)
    finally:
        shutil.rmtree(ray_files, ignore_errors=True)
