"""Retries of storage requests: which errors are transient, which the user must solve, and how long to wait."""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from pipeline.errors import StorageError, StorageLostError
from pipeline.redaction import redact

T = TypeVar("T")

DEFAULT_LIMIT_S = 300.0
"""How long storage may be unavailable, in seconds; `TRAINYARD_STORAGE_LIMIT_S` overrides it."""
FIRST_CONTACT_LIMIT_S = 15.0
"""The same before the first response, when a wrong URL is more likely than a transient fault."""
INITIAL_BACKOFF_S = 0.1
MAX_BACKOFF_S = 10.0
REQUEST_TIMEOUT_S = 60.0
BYTES_PER_REQUEST_TIMEOUT = 8 * 2**20
"""A request without an answer for `REQUEST_TIMEOUT_S` seconds is given up and sent again. It gets as many seconds more
for each `BYTES_PER_REQUEST_TIMEOUT` bytes that it sends."""
SLOW_DOWN_BACKOFF_S = 1.0
"""The first pause after a store reported too many requests."""
_jitter_rng = random.Random()
"""Separate from the global generator of `random`, which belongs to the user's code."""

_STORAGE_LIBRARIES = (
    "botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "adlfs", "azure", "requests", "urllib3", "asyncssh",
    "paramiko", "fsspec",
)  # fmt: skip
"""Packages whose exceptions, other than OSError, are storage errors."""
_PERMANENT_ERRNOS = frozenset({errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES})
"""Errors that are permanent at any time."""
_PERMANENT_AT_FIRST_ERRNOS = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.EPERM, getattr(errno, "EREMCHG", errno.EINVAL)}
)
"""Errors that are permanent before the first response: stores return them for a wrong bucket name, region or endpoint,
but occasionally also for a garbled upload."""
_CREDENTIALS_ERROR = re.compile(r"Credential|Profile|Token|SSO|Auth")
_EXPIRED_CODES = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidAccessKeyId"})
"""Codes of S3 for credentials that have expired. They may be renewed or replaced during a run."""
_POSSIBLY_EXPIRED_CODES = frozenset({"400"})
"""The code in replies without a body (to HEAD)."""
_SLOW_DOWN_CODES = frozenset({"SlowDown", "503", "ServiceUnavailable", "429", "TooManyRequests"})


class RetryPolicy:
    """Retries actions on one storage URL while their errors are transient.

    Parameters
    ----------
    where: printable URL, for messages.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.limit_s = get_limit_s()
        self.has_responded = False
        self.response_count = 0
        """Number of successful calls, without those that had a shorter limit."""

    def call(
        self,
        action: Callable[[], T],
        limit_s: float | None = None,
        renew_credentials: Callable[[], None] = lambda: None,
    ) -> T:
        """Run the action, retry it while its errors are transient, and return its result.

        Credentials that expire during a run are a transient error: `renew_credentials` is called before the next try.

        Parameters
        ----------
        limit_s: how long to retry, if shorter than the usual limit.

        Raises
        ------
        StorageError: a permanent error, such as a missing permission.
        StorageLostError: storage was unavailable for longer than the limit.
        FileNotFoundError, FileExistsError: as the action raises them; they are never retried.
        """
        began = time.monotonic()
        pause = INITIAL_BACKOFF_S
        expired = False
        while True:
            try:
                if expired:
                    renew_credentials()
                result = action()
            except (FileNotFoundError, FileExistsError):
                self.has_responded = True
                raise
            except Exception as error:
                code = _error_code(error)
                if code not in _EXPIRED_CODES or not self.has_responded:
                    self._raise_if_permanent(error)
                expired = code in _EXPIRED_CODES | _POSSIBLY_EXPIRED_CODES
                if code in _SLOW_DOWN_CODES:
                    pause = max(pause, SLOW_DOWN_BACKOFF_S)
                limit = self.limit_s if self.has_responded else min(self.limit_s, FIRST_CONTACT_LIMIT_S)
                if limit_s is not None:
                    limit = min(limit, limit_s)
                remaining_s = began + limit - time.monotonic()
                if remaining_s <= 0:
                    raise self._timeout_error(error, limit) from None
            else:
                self.has_responded = True
                self.response_count += limit_s is None
                return result
            jittered_pause = pause * _jitter_rng.uniform(0.5, 1.0)  # so that processes that failed together spread out
            time.sleep(min(jittered_pause, remaining_s))
            pause = min(2 * pause, MAX_BACKOFF_S)

    def _raise_if_permanent(self, error: Exception) -> None:
        """Raise StorageError for a permanent storage error, and the error itself if it is no storage error."""
        library = type(error).__module__.partition(".")[0]
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(error, PermissionError) or (
            not self.has_responded and library in _STORAGE_LIBRARIES and _CREDENTIALS_ERROR.search(type(error).__name__)
        ):
            raise StorageError(
                f"no permission ({summarize_error(error)})",
                where=self.where,
                fix="check the credentials and their rights; reading a file that may be absent needs the right to list",
            ) from None
        if (
            isinstance(error, (ValueError, NotImplementedError))
            or number in _PERMANENT_ERRNOS
            or (not self.has_responded and number in _PERMANENT_AT_FIRST_ERRNOS)
        ):
            raise StorageError(
                f"cannot be used ({summarize_error(error)})", where=self.where, fix="check the URL"
            ) from None
        if not isinstance(error, OSError) and library not in _STORAGE_LIBRARIES:
            raise error

    def _timeout_error(self, error: Exception, limit_s: float) -> StorageLostError | StorageError:
        if not self.has_responded:
            return StorageError(
                f"no answer within {limit_s:.0f} s ({summarize_error(error)})",
                where=self.where,
                fix="check the URL, the endpoint and the network",
            )
        if _error_code(error) in _EXPIRED_CODES or _CREDENTIALS_ERROR.search(type(error).__name__):
            return StorageLostError(
                f"the credentials have expired, and were not renewed within {limit_s:.0f} s ({summarize_error(error)})",
                where=self.where,
                fix="renew the credentials at their source, and run the same command again",
            )
        return StorageLostError(
            f"storage was unavailable for {limit_s:.0f} s ({summarize_error(error)})",
            where=self.where,
            fix="run the same command again when it is available",
        )


def _error_code(error: BaseException) -> str:
    """Return the S3 code of an error, such as "SlowDown", which s3fs keeps in the cause; empty if there is none."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, Mapping) and isinstance(response.get("Error"), Mapping):
            return str(response["Error"].get("Code", ""))
    return ""


def summarize_error(error: BaseException) -> str:
    """Return the type and first line of an error, without secrets."""
    text = redact(str(error)).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def request_timeout_s(num_bytes: int = 0) -> float:
    """Return the timeout in seconds of a single request that sends `num_bytes` bytes."""
    return min(REQUEST_TIMEOUT_S, get_limit_s()) * (1 + num_bytes / BYTES_PER_REQUEST_TIMEOUT)


def get_limit_s() -> float:
    """Return how long storage may be unavailable, in seconds.

    Raises
    ------
    StorageError: TRAINYARD_STORAGE_LIMIT_S is not a number.
    """
    text = os.environ.get("TRAINYARD_STORAGE_LIMIT_S")
    if not text:
        return DEFAULT_LIMIT_S
    try:
        return float(text)
    except ValueError:
        raise StorageError(
            f"{text!r} is not a number of seconds", where="TRAINYARD_STORAGE_LIMIT_S", fix="unset it, or use 300"
        ) from None
