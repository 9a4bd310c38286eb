"""Which storage errors pass, which are a person's to solve, and how long to wait."""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from pipeline.errors import StorageError, StorageLostError
from pipeline.redaction import redact as redact

T = TypeVar("T")

DEFAULT_LIMIT_S = 300.0
"""How long storage may stay away; `TRAINYARD_STORAGE_LIMIT_S` sets another number of seconds."""
FIRST_CONTACT_LIMIT_S = 15.0
"""The same before anything has ever worked: then a wrong URL is likelier than a passing fault."""
INITIAL_BACKOFF_S = 0.1
MAX_BACKOFF_S = 10.0
REQUEST_TIMEOUT_S = 60.0
BYTES_PER_REQUEST_TIMEOUT = 8 * 2**20
"""A request that stays without an answer for so many seconds is given up and sent again; it gets as many more for each
so many bytes that it carries."""
SLOW_DOWN_BACKOFF_S = 1.0
"""The first pause after a store said that it gets too many requests."""
_jitter_rng = random.Random()
"""Of our own: the module's belongs to whoever calls us."""

_STORAGE_LIBRARIES = (
    "botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "adlfs", "azure", "requests", "urllib3", "asyncssh",
    "paramiko", "fsspec",
)  # fmt: skip
"""Packages whose own exceptions, other than OSError, tell of a store."""
_PERMANENT_ERRNOS = frozenset({errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES})
"""Wrong at any time."""
_PERMANENT_AT_FIRST_ERRNOS = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.EPERM, getattr(errno, "EREMCHG", errno.EINVAL)}
)
"""What stores answer to a bad bucket name, region or endpoint, and now and then to a garbled upload."""
_CREDENTIALS_ERROR = re.compile(r"Credential|Profile|Token|SSO|Auth")
_EXPIRED_CODES = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidAccessKeyId"})
"""What S3 answers to credentials that were good once: they may be renewed or exchanged while a run goes on."""
_POSSIBLY_EXPIRED_CODES = frozenset({"400"})
"""What it answers to them where a reply has no text (HEAD)."""
_SLOW_DOWN_CODES = frozenset({"SlowDown", "503", "ServiceUnavailable", "429", "TooManyRequests"})


class RetryPolicy:
    """Repeats an action while its faults pass, for one storage URL.

    Parameters
    ----------
    where: printable URL, for messages.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.limit_s = get_limit_s()
        self.has_responded = False
        self.response_count = 0
        """Calls that ended well under the usual limit."""

    def call(
        self,
        action: Callable[[], T],
        limit_s: float | None = None,
        renew_credentials: Callable[[], None] = lambda: None,
    ) -> T:
        """The action's result, after as many tries as its faults and the limit allow.

        Credentials that expire in mid-run are a fault like others: `renew` looks for new ones before the next try.

        Raises
        ------
        StorageError: an error that waiting does not cure, such as a missing permission.
        StorageLostError: storage stayed away for longer than the limit.
        FileNotFoundError, FileExistsError: as the action raises them; these are answers, not faults.
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
            time.sleep(
                min(pause * _jitter_rng.uniform(0.5, 1.0), remaining_s)
            )  # at random: who failed together should part
            pause = min(2 * pause, MAX_BACKOFF_S)

    def _raise_if_permanent(self, error: Exception) -> None:
        """Raise what no waiting cures: a StorageError, or the error itself where it does not tell of storage."""
        library = type(error).__module__.partition(".")[0]
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(error, PermissionError) or (
            not self.has_responded and library in _STORAGE_LIBRARIES and _CREDENTIALS_ERROR.search(type(error).__name__)
        ):
            raise StorageError(
                f"no permission ({summarize_error(error)})",
                where=self.where,
                fix="check the credentials and their rights; reading a name that may be absent needs the right to list",
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
                f"the credentials are no longer good, and were not renewed within {limit_s:.0f} s "
                f"({summarize_error(error)})",
                where=self.where,
                fix="renew the credentials where they come from, and run the same command again",
            )
        return StorageLostError(
            f"storage stayed away for {limit_s:.0f} s ({summarize_error(error)})",
            where=self.where,
            fix="run the same command again when it is back",
        )


def _error_code(error: BaseException) -> str:
    """S3's own code of an error, such as "SlowDown"; s3fs keeps it in the cause. Empty where there is none."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, Mapping) and isinstance(response.get("Error"), Mapping):
            return str(response["Error"].get("Code", ""))
    return ""


def summarize_error(error: BaseException) -> str:
    """Kind and first line of an error, without secrets."""
    text = redact(str(error)).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def request_timeout_s(num_bytes: int = 0) -> float:
    """How long a single request may stay without an answer, in seconds, when it carries so many bytes."""
    return min(REQUEST_TIMEOUT_S, get_limit_s()) * (1 + num_bytes / BYTES_PER_REQUEST_TIMEOUT)


def get_limit_s() -> float:
    """How long storage may stay away, in seconds.

    Raises
    ------
    StorageError: TRAINYARD_STORAGE_LIMIT_S is no number.
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
