"""What `submit` rejects before anything of the user's is sent: one message each, exit code 2, and no job started."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cluster.submission import preflight
from pipeline.cluster.submission.client import ClusterClient, connect
from pipeline.cluster.submission.job_status import LogCursor
from pipeline.cluster.submission.log_records import (
    find_last_record,
    format_record,
    human_lines,
    redact_stdout_and_stderr,
)
from pipeline.cluster.submission.packaging import stage_package
from pipeline.cluster.submission.payload import collect_env_vars, fetch_payload, find_numbered_ids, submission_key
from pipeline.cluster.submission.storage_url import is_folder_of_this_machine, resolve_cluster_storage
from pipeline.config.files import build_job, load_job
from pipeline.errors import ClusterError, InputError, WorkError
from pipeline.redaction import register_secrets
from tests.cli.command_line import write_job
from tests.cli.conftest import CompletedCommand, trainyard
from tests.cluster.submission_cluster import TOKEN, JobsCluster, find_free_port

__all__ = ["trainyard"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray and of what it imports

RunCommand = Callable[..., CompletedCommand]


@pytest.fixture(autouse=True)
def _without_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def check_refused(completed: CompletedCommand, *texts: str) -> None:
    assert completed.exit_code == 2, completed.stderr
    assert completed.stderr.count("error: ") == 1
    assert "Traceback" not in completed.stderr
    for text in texts:
        assert text in completed.stderr


def test_token_sources_are_named_and_the_token_is_never_shown(
    trainyard: RunCommand, jobs_cluster: JobsCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ("--address", jobs_cluster.url)
    check_refused(
        trainyard("status", *address), "requires a token", "--token-file", "RAY_AUTH_TOKEN", "~/.ray/auth_token"
    )
    check_refused(trainyard("submit", write_job(tmp_path), *address), "requires a token")
    check_refused(trainyard("logs", "a-job", *address), "requires a token")
    check_refused(trainyard("stop", "a-job", *address), "requires a token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-wrong-token-of-the-environment")
    wrong = trainyard("status", *address)
    check_refused(wrong, "refuses the token of RAY_AUTH_TOKEN")
    assert "a-wrong-token" not in wrong.stderr
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert trainyard("status", *address, "--token-file", str(tmp_path / "token")).exit_code == 0, (
        "the option takes precedence"
    )
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert trainyard("status", *address).exit_code == 0
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert trainyard("status", *address).exit_code == 0
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    (tmp_path / "home/.ray").mkdir(parents=True)
    (tmp_path / "home/.ray/auth_token").write_text(TOKEN)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", jobs_cluster.url)
    assert trainyard("status").exit_code == 0
    check_refused(
        trainyard("status", *address, "--token-file", str(tmp_path / "none")), "cannot be read", "--token-file"
    )
    check_refused(trainyard("stop", "nobody"), "no job and no run 'nobody'", "trainyard status")


def test_address_without_a_cluster(trainyard: RunCommand, tmp_path: Path) -> None:
    job = write_job(tmp_path)
    check_refused(trainyard("submit", job), "no cluster is given", "RAY_API_SERVER_ADDRESS")
    check_refused(trainyard("submit", job, "--address", "ray://head:10001"), "Ray Client", "http://HEAD:8265")
    check_refused(
        trainyard("submit", job, "--address", f"http://127.0.0.1:{find_free_port()}"), "no Ray cluster answers"
    )
    check_refused(trainyard("train", job, "--workers", "1", "--address", "ray://head:10001"), "trainyard submit JOB")


def test_job_file_is_validated_first(trainyard: RunCommand, tmp_path: Path) -> None:
    check_refused(
        trainyard("submit", write_job(tmp_path, modle={}), "--address", "http://127.0.0.1:1"), "modle", "model"
    )
    job = write_job(tmp_path)
    check_refused(trainyard("submit", job, "--env", "NOT_SET_HERE"), "no NOT_SET_HERE")
    completed = trainyard("submit", job, "--env", "KEY=a-secret")
    check_refused(completed, "--env takes a name")
    assert "a-secret" not in completed.stderr
    check_refused(trainyard("submit", job, "--name", "../up"), "'../up' is not a valid name")


def test_infeasible_job_is_rejected_on_the_cluster(
    trainyard: RunCommand, jobs_cluster: JobsCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # the option takes precedence
    job, address = write_job(tmp_path), ("--address", jobs_cluster.url)
    before = trainyard("status", *address, "--json").json["jobs"]
    check_refused(
        trainyard("submit", job, *address, "--workers", "9"), "9 workers of 1 CPU each do not fit", "2 CPU on 1 node"
    )
    check_refused(trainyard("submit", job, *address, "--storage", f"{job}/runs"), f"{job}/runs", "check")
    assert trainyard("status", *address, "--json").json["jobs"] == before, "nothing was started"


def test_unshared_storage_is_rejected() -> None:
    loopback, remote = "http://127.0.0.1:8265", "http://head.example:8265"
    for url in ("./runs", "/data/runs", "runs"):
        with pytest.raises(InputError, match="the cluster has 3 nodes") as raised:
            resolve_cluster_storage(url, remote, 3)
        assert "s3://" in raised.value.fix
        assert "file:///" in raised.value.fix
    with pytest.raises(InputError, match="on another machine"):
        resolve_cluster_storage("./runs", remote, 1)
    with pytest.raises(InputError, match="in the memory of one process"):
        resolve_cluster_storage("memory://runs", loopback, 1)
    assert resolve_cluster_storage("/data/runs", remote, 1) == "/data/runs"
    assert resolve_cluster_storage("./runs", loopback, 1) == str(Path.cwd() / "runs")
    assert resolve_cluster_storage("s3://bucket/runs", remote, 3) == "s3://bucket/runs"
    assert resolve_cluster_storage("file:///shared/runs", remote, 3) == "file:///shared/runs"
    assert is_folder_of_this_machine("runs", loopback)
    assert not is_folder_of_this_machine("file:///runs", loopback)
    assert not is_folder_of_this_machine("/runs", remote)


def test_incompatible_versions_are_rejected() -> None:
    cluster: Any = SimpleNamespace(ray_version="2.9.3", url="http://head:8265")
    with pytest.raises(ClusterError, match=r"the cluster runs Ray 2\.9\.3, and this environment has Ray"):
        preflight._check_ray_version(cluster)
    installed = {requirement.name.lower(): version(requirement.name) for requirement in preflight.list_requirements()}
    with pytest.raises(ClusterError, match=r"Python 3\.8\.10"):
        preflight._check_versions(cluster, {"python": "3.8.10", "installed": installed})
    python = platform.python_version()
    preflight._check_versions(cluster, {"python": python, "installed": installed})
    outdated = {name: version for name, version in installed.items() if name != "torch"} | {"pyarrow": "3.0"}
    with pytest.raises(ClusterError, match=r"lacks torch>=\S+ \(not installed\), .*pyarrow>=17 \(3.0\)"):
        preflight._check_versions(cluster, {"python": python, "installed": outdated})


def test_package_has_the_sources_and_the_imported_user_code_only(tmp_path: Path) -> None:
    for name in (
        "nets.py",
        "deep/more.py",
        "unused.py",
        "data.csv",
        ".env",
        "__pycache__/nets.pyc",
        ".hidden/secret.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "nets.py").write_text("from deep import more\n")
    from pipeline.user_code import collect_user_code

    job = load_job(write_job(tmp_path, code=".", model={"kind": "nets:Net"}))
    with stage_package(collect_user_code(job).files) as package:
        files = set(package.list_files())
        description = package.describe()
        modes = {path: path.stat().st_mode & 0o777 for path in package.folder.parent.rglob("*")}
    user_files = {name for name in files if not name.startswith("pipeline/")}
    assert user_files == {"trainyard_code/nets.py", "trainyard_code/deep/more.py"}
    assert "pipeline/cli/entrypoint.py" in files
    assert all(name.endswith(".py") for name in files)
    assert "kB: the package, the job, 2 files of its code" in description
    assert modes
    assert not package.folder.exists()


def test_key_is_the_digest_of_what_determines_the_run() -> None:
    job = build_job({"name": "j"}, "test")
    key = submission_key(job, storage="/a", name=None, max_steps=None, code={})
    assert key.startswith("j-")
    on_workers = build_job({"name": "j", "scale": {"workers": 2}}, "test")
    assert submission_key(on_workers, storage="/a", name=None, max_steps=None, code={}) == key
    others = {
        submission_key(build_job({"name": "j", "seed": 2}, "test"), storage="/a", name=None, max_steps=None, code={}),
        submission_key(job, storage="/a", name=None, max_steps=None, code={"nets.py": "abc"}),
        submission_key(job, storage="/b", name=None, max_steps=None, code={}),
        submission_key(job, storage="/a", name="n", max_steps=None, code={}),
        submission_key(job, storage="/a", name=None, max_steps=3, code={}),
    }
    assert len(others | {key}) == 6
    ids = [f"{key}-1", f"{key}-12", f"{key}-0", f"{key}-x", f"x{key}-2", "raysubmit_a"]
    assert find_numbered_ids(key, ids) == {1: f"{key}-1", 12: f"{key}-12"}


def test_environment_variables_override_those_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secrets.env"
    file.write_text("# a comment\n\nexport A=1=2\nB='two words'\nC=\"\"\n D = x \n")
    monkeypatch.setenv("A", "from here")
    assert collect_env_vars([], [str(file)]) == {"A": "1=2", "B": "two words", "C": "", "D": "x"}
    assert collect_env_vars(["A"], [str(file)])["A"] == "from here"


def test_environment_files_have_quotes_escapes_and_comments_but_no_interpolation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secrets.env"
    file.write_text(
        'A=1 # a comment\nB=1#2\nC=\'1 # 2 \\n\'\nD="a\\nb"\nE=${A}-$A\nF="${A}"\nG=\n\'H\'=8\nI="1\n2"\nJ=${HOME:-x}\n'
    )
    monkeypatch.setenv("A", "from here")
    assert collect_env_vars([], [str(file)]) == {
        "A": "1", "B": "1#2", "C": "1 # 2 \\n", "D": "a\nb", "E": "${A}-$A", "F": "${A}", "G": "", "H": "8",
        "I": "1\n2", "J": "${HOME:-x}",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A=1\nsome-secret\n", 2),
        ("A=1\n\n# a comment\n\n  some-secret\n", 5),
        ("A=1\n\nB='some-secret\nC=2\n", 3),
        ('A=1\nB="some-secret" more\n', 2),
        ("A=1\nmy-name=some-secret\n", 2),
        ("A some-secret\n", 1),
    ],
)
def test_invalid_line_of_an_environment_file_is_named_but_not_quoted(
    trainyard: RunCommand, tmp_path: Path, text: str, line: int
) -> None:
    (tmp_path / "secrets.env").write_text(text)
    submit = ("submit", write_job(tmp_path), "--address", "http://127.0.0.1:1", "--env-file", "secrets.env")
    completed = trainyard(*submit)
    check_refused(completed, f"--env-file secrets.env, line {line}: not of the form KEY=VALUE")
    assert "some-secret" not in completed.stdout + completed.stderr


def test_log_records_are_separate_from_human_output() -> None:
    log = f"Running entrypoint for job x: y\nhello\n{format_record('run', {'run': 'a'})}\n\x1enot one\nbye"
    assert list(human_lines(log)) == ["hello", "bye"]
    assert find_last_record(log, "run") == {"kind": "run", "run": "a"}
    assert find_last_record(log, "end") is None


def test_paragraph_on_a_lost_process_is_hidden_however_the_log_is_cut() -> None:
    paragraph = (
        "Unexpected error occurred: The actor died unexpectedly before finishing this task.\n"
        "\tclass_name: JobSupervisor\nThe actor is dead because its worker process has died. End of file. Some common "
        "causes include: (1) the process was killed by the OOM killer due to high memory usage.\n"
    )
    log = f"hello\nbye\n{paragraph}"
    for cut in range(len(log)):
        lines: list[str] = []
        cursor = LogCursor(lines.append)
        cursor.feed(log[:cut])
        cursor.feed(log[cut:])
        cursor.finish(log)
        assert lines == ["hello", "bye"], f"cut after {cut} characters"


def test_secret_that_is_a_json_word_keeps_records_valid(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKER_FLAG", "true")
    register_secrets(["TRACKER_FLAG"])
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    redact_stdout_and_stderr()
    print("it is true")
    print(format_record("end", {"end": True, "text": "it is true"}))
    printed = capsys.readouterr().out
    assert find_last_record(printed, "end") == {"kind": "end", "end": True, "text": "it is ***"}
    assert printed.startswith("it is ***\n")


def test_unreachable_cluster_is_one_error_message(jobs_cluster: JobsCluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    cluster = connect(jobs_cluster.url, str(tmp_path / "token"))
    assert cluster.get_job_info("nobody") is None
    unreachable = ClusterClient(cluster._client, cluster.url)
    unreachable._client._address = f"http://127.0.0.1:{find_free_port()}"
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        unreachable.list_jobs()
    with pytest.raises(WorkError, match="not the name of a payload"):
        fetch_payload("../../etc/passwd")
