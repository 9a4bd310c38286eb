"""What `submit` refuses before anything of the user's is sent: one message each, exit code 2, and no job there."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cluster.jobs import preflight
from pipeline.cluster.jobs.client import Cluster, connect
from pipeline.cluster.jobs.discretion import be_discreet
from pipeline.cluster.jobs.environment import environment_of
from pipeline.cluster.jobs.identity import key_of, numbered
from pipeline.cluster.jobs.letter import take_out
from pipeline.cluster.jobs.places import must_be_here, storage_for
from pipeline.cluster.jobs.records import last, lines_for_people, record_line
from pipeline.cluster.jobs.shipping import staged
from pipeline.errors import ClusterError, InputError, WorkError
from pipeline.job_file import build_job, load_job
from pipeline.redaction import hide
from tests.cli.cli_calls import write_job
from tests.cli.conftest import Ended, trainyard
from tests.cluster.jobs_cluster import TOKEN, JobsCluster, free_port

__all__ = ["trainyard"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, and those of what it imports

Call = Callable[..., Ended]


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2, ended.err
    assert ended.err.count("error: ") == 1
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err


def test_a_token_is_asked_for_by_its_three_ways_and_never_shown(
    trainyard: Call, jobs_cluster: JobsCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ("--address", jobs_cluster.url)
    refused(trainyard("status", *there), "asks for a token", "--token-file", "RAY_AUTH_TOKEN", "~/.ray/auth_token")
    refused(trainyard("submit", write_job(tmp_path), *there), "asks for a token")
    refused(trainyard("logs", "a-job", *there), "asks for a token")
    refused(trainyard("stop", "a-job", *there), "asks for a token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-wrong-token-of-the-environment")
    wrong = trainyard("status", *there)
    refused(wrong, "refuses the token of RAY_AUTH_TOKEN")
    assert "a-wrong-token" not in wrong.err
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert trainyard("status", *there, "--token-file", str(tmp_path / "token")).code == 0, "the flag comes first"
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert trainyard("status", *there).code == 0
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert trainyard("status", *there).code == 0
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    (tmp_path / "home/.ray").mkdir(parents=True)
    (tmp_path / "home/.ray/auth_token").write_text(TOKEN)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", jobs_cluster.url)
    assert trainyard("status").code == 0
    refused(trainyard("status", *there, "--token-file", str(tmp_path / "none")), "cannot be read", "--token-file")
    refused(trainyard("stop", "nobody"), "no job and no run 'nobody'", "trainyard status")


def test_an_address_where_no_cluster_is(trainyard: Call, tmp_path: Path) -> None:
    job = write_job(tmp_path)
    refused(trainyard("submit", job), "no cluster is named", "RAY_API_SERVER_ADDRESS")
    refused(trainyard("submit", job, "--address", "ray://head:10001"), "Ray Client", "http://HEAD:8265")
    refused(trainyard("submit", job, "--address", f"http://127.0.0.1:{free_port()}"), "no Ray cluster answers")
    refused(trainyard("train", job, "--workers", "1", "--address", "ray://head:10001"), "trainyard submit JOB")


def test_a_job_file_is_checked_first(trainyard: Call, tmp_path: Path) -> None:
    refused(trainyard("submit", write_job(tmp_path, modle={}), "--address", "http://127.0.0.1:1"), "modle", "model")
    job = write_job(tmp_path)
    refused(trainyard("submit", job, "--env", "NOT_SET_HERE"), "no NOT_SET_HERE")
    typed = trainyard("submit", job, "--env", "KEY=a-secret")
    refused(typed, "--env takes a name")
    assert "a-secret" not in typed.err
    refused(trainyard("submit", job, "--name", "../up"), "'../up' is no name")


def test_what_the_cluster_could_never_do_is_refused_by_the_cluster_itself(
    trainyard: Call, jobs_cluster: JobsCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # the flag comes first
    job, there = write_job(tmp_path), ("--address", jobs_cluster.url)
    before = trainyard("status", *there, "--json").json["jobs"]
    refused(trainyard("submit", job, *there, "--workers", "9"), "9 workers of 1 CPU each do not fit", "2 CPU on 1 node")
    refused(trainyard("submit", job, *there, "--storage", f"{job}/runs"), f"{job}/runs", "check")
    assert trainyard("status", *there, "--json").json["jobs"] == before, "nothing was started"


def test_storage_that_several_machines_cannot_share() -> None:
    loopback, remote = "http://127.0.0.1:8265", "http://head.example:8265"
    for url in ("./runs", "/data/runs", "runs"):
        with pytest.raises(InputError, match="the cluster has 3 nodes") as raised:
            storage_for(url, remote, 3)
        assert "s3://" in raised.value.fix
        assert "file:///" in raised.value.fix
    with pytest.raises(InputError, match="on another machine"):
        storage_for("./runs", remote, 1)
    with pytest.raises(InputError, match="lives in one process"):
        storage_for("memory://runs", loopback, 1)
    assert storage_for("/data/runs", remote, 1) == "/data/runs"
    assert storage_for("./runs", loopback, 1) == str(Path.cwd() / "runs")
    assert storage_for("s3://bucket/runs", remote, 3) == "s3://bucket/runs"
    assert storage_for("file:///shared/runs", remote, 3) == "file:///shared/runs"
    assert must_be_here("runs", loopback)
    assert not must_be_here("file:///runs", loopback)
    assert not must_be_here("/runs", remote)


def test_versions_that_do_not_go_together() -> None:
    cluster: Any = SimpleNamespace(ray_version="2.9.3", url="http://head:8265")
    with pytest.raises(ClusterError, match=r"the cluster runs Ray 2\.9\.3, and here is Ray"):
        preflight._same_ray(cluster)
    installed = {one.name.lower(): "9999.0" for one in preflight.requirements()}
    with pytest.raises(ClusterError, match=r"Python 3\.8\.10"):
        preflight._go_together(cluster, {"python": "3.8.10", "installed": installed})
    python = platform.python_version()
    preflight._go_together(cluster, {"python": python, "installed": installed})
    there = {name: version for name, version in installed.items() if name != "torch"} | {"pyarrow": "3.0"}
    with pytest.raises(ClusterError, match=r"lacks torch>=\S+ \(not there\), .*pyarrow>=17 \(3.0\)"):
        preflight._go_together(cluster, {"python": python, "installed": there})


def test_the_cargo_is_the_package_and_the_jobs_own_code_alone(tmp_path: Path) -> None:
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
    from pipeline.own_code import collect

    job = load_job(write_job(tmp_path, code=".", model={"kind": "nets:Net"}))
    with staged(collect(job).files) as cargo:
        files = set(cargo.files())
        words = cargo.words()
        modes = {path: path.stat().st_mode & 0o777 for path in cargo.folder.parent.rglob("*")}
    own = {name for name in files if not name.startswith("pipeline/")}
    assert own == {"trainyard_code/nets.py", "trainyard_code/deep/more.py"}
    assert "pipeline/cli/on_cluster.py" in files
    assert all(name.endswith(".py") for name in files)
    assert "kB: the package, the job, 2 files of its code" in words
    assert modes
    assert not cargo.folder.exists()


def test_the_same_submission_has_the_same_key() -> None:
    job = build_job({"name": "j"}, "test")
    key = key_of(job, storage="/a", name=None, max_steps=None, code={})
    assert key.startswith("j-")
    faster = build_job({"name": "j", "scale": {"workers": 2}}, "test")
    assert key_of(faster, storage="/a", name=None, max_steps=None, code={}) == key
    others = {
        key_of(build_job({"name": "j", "seed": 2}, "test"), storage="/a", name=None, max_steps=None, code={}),
        key_of(job, storage="/a", name=None, max_steps=None, code={"nets.py": "abc"}),
        key_of(job, storage="/b", name=None, max_steps=None, code={}),
        key_of(job, storage="/a", name="n", max_steps=None, code={}),
        key_of(job, storage="/a", name=None, max_steps=3, code={}),
    }
    assert len(others | {key}) == 6
    ids = [f"{key}-1", f"{key}-12", f"{key}-0", f"{key}-x", f"x{key}-2", "raysubmit_a"]
    assert numbered(key, ids) == {1: f"{key}-1", 12: f"{key}-12"}


def test_environment_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secrets.env"
    file.write_text("# a comment\n\nexport A=1=2\nB='two words'\nC=\"\"\n D = x \n")
    monkeypatch.setenv("A", "from here")
    assert environment_of([], [str(file)]) == {"A": "1=2", "B": "two words", "C": "", "D": "x"}
    assert environment_of(["A"], [str(file)])["A"] == "from here"


def test_environment_files_have_quotes_escapes_and_comments_but_no_interpolation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secrets.env"
    file.write_text(
        'A=1 # a comment\nB=1#2\nC=\'1 # 2 \\n\'\nD="a\\nb"\nE=${A}-$A\nF="${A}"\nG=\n\'H\'=8\nI="1\n2"\nJ=${HOME:-x}\n'
    )
    monkeypatch.setenv("A", "from here")
    assert environment_of([], [str(file)]) == {
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
def test_a_line_of_an_environment_file_that_cannot_be_read_is_named_but_not_quoted(
    trainyard: Call, tmp_path: Path, text: str, line: int
) -> None:
    (tmp_path / "secrets.env").write_text(text)
    submit = ("submit", write_job(tmp_path), "--address", "http://127.0.0.1:1", "--env-file", "secrets.env")
    ended = trainyard(*submit)
    refused(ended, f"--env-file secrets.env, line {line}: a line that is no KEY=VALUE")
    assert "some-secret" not in ended.out + ended.err


def test_records_stand_apart_from_what_people_read() -> None:
    log = f"Running entrypoint for job x: y\nhello\n{record_line('run', {'run': 'a'})}\n\x1enot one\nbye"
    assert list(lines_for_people(log)) == ["hello", "bye"]
    assert last(log, "run") == {"kind": "run", "run": "a"}
    assert last(log, "end") is None


def test_a_secret_that_is_a_word_of_json_breaks_no_record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKER_FLAG", "true")
    hide(["TRACKER_FLAG"])
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    be_discreet()
    print("it is true")
    print(record_line("end", {"end": True, "text": "it is true"}))
    printed = capsys.readouterr().out
    assert last(printed, "end") == {"kind": "end", "end": True, "text": "it is ***"}
    assert printed.startswith("it is ***\n")


def test_a_cluster_that_goes_away_is_an_error_of_one_message(jobs_cluster: JobsCluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    cluster = connect(jobs_cluster.url, str(tmp_path / "token"))
    assert cluster.info("nobody") is None
    gone = Cluster(cluster._client, cluster.url)
    gone._client._address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        gone.infos()
    with pytest.raises(WorkError, match="no letter"):
        take_out("../../etc/passwd")
