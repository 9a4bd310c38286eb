"""Multipart uploads of large files to S3: only parts that fail are sent again."""

from __future__ import annotations

from typing import Any

import pytest
import s3fs

from pipeline.errors import StorageLostError
from pipeline.storage import Storage, remote
from pipeline.testing import inject_faults

MIB = 2**20


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the smallest part size that S3 allows."""
    monkeypatch.setattr(remote, "PART_BYTES", 5 * MIB)
    monkeypatch.setattr(remote.S3Upload, "part_bytes", 5 * MIB)


@pytest.fixture
def s3_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The direct calls of the S3 API: name of the request, and the number of the part."""
    calls: list[tuple[str, int]] = []
    original = s3fs.S3FileSystem.call_s3

    def call_s3(self: Any, method: str, *args: Any, **options: Any) -> Any:
        calls.append((method, options.get("PartNumber", 0)))
        return original(self, method, *args, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", call_s3)
    return calls


def make_content(size: int) -> bytes:
    return (bytes(range(256)) * (size // 256 + 1))[:size]


def list_open_uploads(s3_url: str) -> list[Any]:
    bucket = s3_url.removeprefix("s3://").partition("/")[0]
    response = s3fs.S3FileSystem().call_s3("list_multipart_uploads", Bucket=bucket)
    return [upload for upload in response.get("Uploads", []) if upload["Key"] in f"{s3_url}/large"]


def test_only_large_files_use_multipart_upload(s3_url: str, s3_calls: list[tuple[str, int]]) -> None:
    storage = Storage.open(s3_url)
    storage.replace("large", make_content(10 * MIB))
    assert s3_calls == []
    data = make_content(11 * MIB)
    storage.replace("large", data)
    assert sorted(s3_calls) == [
        ("complete_multipart_upload", 0),
        ("create_multipart_upload", 0),
        *(("upload_part", number) for number in (1, 2, 3)),
    ]
    assert storage.read("large") == data


def test_failed_part_is_retried_alone(s3_url: str, s3_calls: list[tuple[str, int]]) -> None:
    """Request 1 creates the upload; requests 2 to 4 send the parts, in any order."""
    data = make_content(11 * MIB)
    with inject_faults("error@2 truncated@3 lost@4 on=write") as injector:
        Storage.open(s3_url.replace("s3://", "faulty://s3/")).replace("large", data)
    assert injector.counts == {"error": 1, "truncated": 1, "lost": 1}
    names = [name for name, _ in s3_calls]
    assert names.count("create_multipart_upload") == names.count("complete_multipart_upload") == 1
    assert names.count("upload_part") == 3 + 2, "the truncated part and the part with a lost reply arrived too"
    assert Storage.open(s3_url).read("large") == data


def test_completion_with_a_lost_reply(s3_url: str, s3_calls: list[tuple[str, int]]) -> None:
    data = make_content(11 * MIB)
    with inject_faults("lost@5 on=write") as injector:
        Storage.open(s3_url.replace("s3://", "faulty://s3/")).replace("large", data)
    assert injector.counts == {"lost": 1}
    assert Storage.open(s3_url).read("large") == data
    assert list_open_uploads(s3_url) == []


def test_failed_upload_is_aborted(s3_url: str, s3_calls: list[tuple[str, int]]) -> None:
    old = make_content(1000)
    storage = Storage.open(s3_url)
    storage.replace("large", old)
    with inject_faults("error@4 on=write"):
        remote_storage = Storage.open(s3_url.replace("s3://", "faulty://s3/"))
        remote_storage.list()
        with pytest.raises(StorageLostError):
            remote_storage.with_timeout(0.0).replace("large", make_content(11 * MIB))
    assert ("abort_multipart_upload", 0) in s3_calls
    assert list_open_uploads(s3_url) == []
    assert storage.read("large") == old


def test_small_file_is_read_in_one_request(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is a missing one: most files of a run are small, and the end of a journal is found by a missing file."""
    methods: list[str] = []
    original = s3fs.S3FileSystem._call_s3

    async def call_s3(self: Any, method: str, *args: Any, **options: Any) -> Any:
        methods.append(method)
        return await original(self, method, *args, **options)

    storage = Storage.open(s3_url)
    storage.replace("a", b"1")
    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call_s3)
    assert storage.read("a") == b"1"
    with pytest.raises(FileNotFoundError):
        storage.read("b")
    assert methods == ["get_object", "get_object"]
