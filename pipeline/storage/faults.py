"""Which storage errors pass, which are a person's to solve, and how long to wait."""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import StorageError, StorageLostError

T = TypeVar("T")

LIMIT_S = 300.0
"""How long storage may stay away; `TRAINYARD_STORAGE_LIMIT_S` sets another number of seconds."""
FIRST_CONTACT_S = 15.0
"""The same before anything has ever worked: then a wrong URL is likelier than a passing fault."""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0

_LIBRARIES = (
    "botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "adlfs", "azure", "requests", "urllib3", "asyncssh",
    "paramiko", "fsspec",
)  # fmt: skip
"""Packages whose own exceptions, other than OSError, tell of a store."""
_MISUSE = frozenset({errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES})
"""Wrong at any time."""
_MISUSE_AT_FIRST = frozenset({errno.EINVAL, errno.ENOSYS, errno.EPERM, getattr(errno, "EREMCHG", errno.EINVAL)})
"""What stores answer to a bad bucket name, region or endpoint, and now and then to a garbled upload."""
_CREDENTIALS = re.compile(r"Credential|Profile|Token|SSO|Auth")


class Patience:
    """Repeats an action while its faults pass, for one storage URL.

    Parameters
    ----------
    where: printable URL, for messages.
    limit_s: seconds from the first fault until StorageLostError.
    """

    def __init__(self, where: str, limit_s: float | None = None) -> None:
        self.where = where
        self.limit_s = limit_s if limit_s is not None else _limit_from_environment()
        self.contacted = False

    def call(self, action: Callable[[], T], limit_s: float | None = None) -> T:
        """The action's result, after as many tries as its faults and the limit allow.

        Raises
        ------
        StorageError: an error that waiting does not cure, such as a missing permission.
        StorageLostError: storage stayed away for longer than the limit.
        FileNotFoundError, FileExistsError: as the action raises them; these are answers, not faults.
        """
        began = time.monotonic()
        pause = FIRST_PAUSE_S
        while True:
            try:
                result = action()
            except (FileNotFoundError, FileExistsError):
                self.contacted = True
                raise
            except Exception as error:
                self._raise_if_lasting(error)
                limit = self.limit_s if self.contacted else min(self.limit_s, FIRST_CONTACT_S)
                if limit_s is not None:
                    limit = min(limit, limit_s)
                left = began + limit - time.monotonic()
                if left <= 0:
                    raise self._lost(error, limit) from None
            else:
                self.contacted = True
                return result
            time.sleep(min(pause * random.uniform(0.5, 1.0), left))  # at random: who failed together should part
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _raise_if_lasting(self, error: Exception) -> None:
        """Raise what no waiting cures: a StorageError, or the error itself where it does not tell of storage."""
        library = type(error).__module__.partition(".")[0]
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(error, PermissionError) or (
            not self.contacted and library in _LIBRARIES and _CREDENTIALS.search(type(error).__name__)
        ):
            raise StorageError(
                f"no permission ({explain(error)})",
                where=self.where,
                fix="check the credentials and their rights; reading a name that may be absent needs the right to list",
            ) from None
        if (
            isinstance(error, (ValueError, NotImplementedError))
            or number in _MISUSE
            or (not self.contacted and number in _MISUSE_AT_FIRST)
        ):
            raise StorageError(
                f"cannot be used ({explain(error)})", where=self.where, fix="check the storage URL"
            ) from None
        if not isinstance(error, OSError) and library not in _LIBRARIES:
            raise error

    def _lost(self, error: Exception, limit_s: float) -> StorageLostError | StorageError:
        if not self.contacted:
            return StorageError(
                f"no answer within {limit_s:.0f} s ({explain(error)})",
                where=self.where,
                fix="check the URL, the endpoint and the network",
            )
        return StorageLostError(
            f"storage stayed away for {limit_s:.0f} s ({explain(error)})",
            where=self.where,
            fix="run the same command again when it is back",
        )


def explain(error: BaseException) -> str:
    """Kind and first line of an error, without secrets."""
    text = scrub(str(error)).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def scrub(text: str) -> str:
    """`text` without passwords, query strings of URLs, or the values of secret environment variables."""
    text = re.sub(r"(\w://[^\s/@:]*):[^\s/@]*@", r"\1:***@", text)
    text = re.sub(r"(\w://[^\s?]*)\?[^\s'\")]*", r"\1?***", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search(r"SECRET|TOKEN|PASSWORD|ACCOUNT_KEY", name):
            text = text.replace(value, "***")
    return text


def _limit_from_environment() -> float:
    text = os.environ.get("TRAINYARD_STORAGE_LIMIT_S")
    if not text:
        return LIMIT_S
    try:
        return float(text)
    except ValueError:
        raise StorageError(
            f"{text!r} is not a number of seconds", where="TRAINYARD_STORAGE_LIMIT_S", fix="unset it, or use 300"
        ) from None
