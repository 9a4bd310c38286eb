"""Storage in any fsspec file system, above all in object stores."""

from __future__ import annotations

import errno
import re
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

from pipeline.storage.retry import request_timeout_s

_MEMORY_LOCK = threading.RLock()
"""fsspec's memory file system is a plain dictionary, so threads of one process need a lock."""
_HAS_CONDITIONAL_WRITES: dict[tuple[str, str], bool] = {}
"""Results of the probes of this process, by protocol and bucket."""
S3_PROTOCOLS = ("s3", "s3a")
LOCAL_PROTOCOLS = ("file", "local")
PART_BYTES = 16 * 2**20
"""Size of a part of a multipart upload. Files of up to two parts are sent in one request."""
FIRST_READ_BYTES = 8 * 2**20
"""Size of the first read of a file. Most files are shorter: journal entries, heartbeats, metric segments."""
_MISSING_BUCKET = re.compile(r"NoSuchBucket|bucket does not exist|ContainerNotFound")


@contextmanager
def _translate_missing_bucket() -> Iterator[None]:
    """Tell a missing bucket, which the user must create, from a missing file.

    Raises
    ------
    ValueError: there is no such bucket.
    """
    try:
        yield
    except FileNotFoundError as error:
        if _MISSING_BUCKET.search(f"{error} {error.__cause__}"):
            raise ValueError("there is no such bucket") from None
        raise


def _timeout_options(fs: Any, data: bytes) -> dict[str, float]:
    """Return the timeout option of a request that sends `data`. The libraries' own timeouts start after the last byte
    is sent. They never start if a server accepts a connection and does not answer (S3's `Expect: 100-continue`)."""
    return {"timeout": request_timeout_s(len(data))} if getattr(fs, "async_impl", False) else {}


class S3Upload:
    """A multipart upload to S3. That of s3fs fails as a whole when one part fails."""

    part_bytes = PART_BYTES

    def __init__(self, fs: Any, path: str) -> None:
        self._fs = fs
        bucket, key, _ = fs.split_path(path)
        self._target = {"Bucket": bucket, "Key": key}
        self._target["UploadId"] = fs.call_s3("create_multipart_upload", **self._target)["UploadId"]

    def put(self, number: int, data: bytes) -> str:
        with _translate_missing_bucket():
            part = {**self._target, "PartNumber": number, "Body": data}
            return str(self._fs.call_s3("upload_part", **part, **_timeout_options(self._fs, data))["ETag"])

    def complete(self, tags: Sequence[str]) -> None:
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, start=1)]
        with _translate_missing_bucket():
            self._fs.call_s3("complete_multipart_upload", **self._target, MultipartUpload={"Parts": parts})

    def abort(self) -> None:
        self._fs.call_s3("abort_multipart_upload", **self._target)


class RemoteBackend:
    """A backend on one fsspec file system.

    Parameters
    ----------
    fs: the file system, without a listing cache.
    protocol: such as "s3".
    """

    def __init__(self, fs: Any, protocol: str) -> None:
        self.fs = fs
        self.protocol = protocol
        self.is_remote = protocol not in ("memory", *LOCAL_PROTOCOLS)

    @contextmanager
    def _request(self) -> Iterator[None]:
        lock: AbstractContextManager[Any] = _MEMORY_LOCK if self.protocol == "memory" else nullcontext()
        with lock, _translate_missing_bucket():
            yield

    def read(self, path: str) -> bytes:
        with self._request():
            content = self._read_small_file(path) if self.protocol in S3_PROTOCOLS else None
            return content if content is not None else bytes(self.fs.cat_file(path))

    def _read_small_file(self, path: str) -> bytes | None:
        """Return the content of an S3 file that is shorter than `FIRST_READ_BYTES`, else None. This takes one request;
        s3fs makes two, the first for the size, so as to read large files in parallel."""
        try:
            data = bytes(self.fs.cat_file(path, start=0, end=FIRST_READ_BYTES))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return None  # an empty file has no such range; for any other reason, reading the whole file fails too
        return data if len(data) < FIRST_READ_BYTES else None

    def replace(self, path: str, data: bytes, temporary: str, sync: bool) -> None:
        with self._request():
            self._put(path, data)

    def upload(self, path: str, size: int) -> S3Upload | None:
        if self.protocol not in S3_PROTOCOLS or size <= 2 * PART_BYTES:
            return None
        with self._request():
            return S3Upload(self.fs, path)

    def create(self, path: str, data: bytes, temporary: str) -> None:
        with self._request():
            self._put(path, data, mode="create")

    def list(self, path: str) -> list[str]:
        with self._request():
            self.fs.invalidate_cache()
            children = self.fs.ls(path, detail=False)
        prefix = f"{path.strip('/')}/".lstrip("/")
        names = (str(child).strip("/") for child in children)
        return [name[len(prefix) :] for name in names if name.startswith(prefix)]

    def exists(self, path: str) -> bool:
        with self._request():
            self.fs.invalidate_cache()
            try:
                self.fs.info(path)
            except FileNotFoundError as error:
                if _MISSING_BUCKET.search(f"{error} {error.__cause__}"):
                    raise
                return False
        return True

    def delete(self, path: str) -> None:
        with self._request():
            self.fs.rm_file(path)

    def delete_folder(self, path: str) -> None:
        with self._request():
            self.fs.invalidate_cache()
            for file in self.fs.find(path):
                with suppress(FileNotFoundError):
                    self.fs.rm_file(file)
            if not self.is_remote:  # object stores have no folders to remove
                with suppress(FileNotFoundError):
                    self.fs.rm(path, recursive=True)

    def remove_temporary(self, temporary: str) -> None:
        return

    def has_conditional_writes(self, folder: str) -> bool:
        store = (self.protocol, folder.strip("/").partition("/")[0])
        if store not in _HAS_CONDITIONAL_WRITES:
            _HAS_CONDITIONAL_WRITES[store] = self._probe_exclusive_create(
                f"{folder.rstrip('/')}/.probe-{secrets.token_hex(8)}"
            )
        return _HAS_CONDITIONAL_WRITES[store]

    def renew_credentials(self) -> None:
        if self.protocol in S3_PROTOCOLS:  # other libraries renew by themselves
            self.fs.connect(refresh=True)

    def _probe_exclusive_create(self, path: str) -> bool:
        """Create a random key twice, and return whether the second create is refused.

        A refusal of the first create counts as well: no one else creates this key, so its reply was lost and the HTTP
        library sent it again (aiohttp does so with any PUT on a connection that was used before).
        """
        try:
            with self._request():
                for content in (b"first", b"second"):
                    try:
                        self._put(path, content, mode="create")
                    except FileExistsError:
                        return True
                return False
        except (NotImplementedError, TypeError):  # the library has no exclusive create
            return False
        finally:
            with suppress(FileNotFoundError):
                self.fs.rm_file(path)

    def _put(self, path: str, data: bytes, **mode: str) -> None:
        try:
            self.fs.pipe_file(path, data, **mode, **_timeout_options(self.fs, data))
        except FileNotFoundError as error:
            if _MISSING_BUCKET.search(f"{error} {error.__cause__}"):
                raise
            # File systems with real folders (sftp, smb) need the folder first.
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            try:
                self.fs.pipe_file(path, data, **mode, **_timeout_options(self.fs, data))
            except FileNotFoundError as second_error:  # callers do not expect it from a write
                raise ValueError(f"nothing can be written there ({second_error})") from second_error
