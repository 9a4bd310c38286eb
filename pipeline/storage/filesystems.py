"""Opening a file system of fsspec by URL, so that it repeats no fault and caches no listing of its own."""

from __future__ import annotations

from typing import Any

from pipeline.errors import StorageError, TrainyardError
from pipeline.storage.retry import redact, request_timeout_s, summarize_error

PROTOCOL_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
"""Protocols of object stores, and the extra of this package that brings each."""
MAX_CONNECTIONS = 32
"""To an S3 server, at the most: the libraries' usual ten would be less than what is asked for at once."""


def open_filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Nothing is contacted yet.

    Parameters
    ----------
    url: a local path, or any URL or chain of URLs of fsspec's.

    Raises
    ------
    StorageError: a protocol that is unknown or whose library is not installed, or a URL that cannot be read.
    """
    import fsspec  # only where it is needed: it costs a tenth of a second

    protocol = url.partition("://")[0] if "://" in url else "file"
    options: dict[str, object] = {}
    if protocol in PROTOCOL_EXTRAS:
        options["use_listings_cache"] = False
    if protocol in ("s3", "s3a"):  # faults are repeated in one place only, see `faults`
        silent_s = request_timeout_s()
        options["config_kwargs"] = {
            "connect_timeout": 5,
            "read_timeout": silent_s,
            "retries": {"max_attempts": 0},
            "max_pool_connections": MAX_CONNECTIONS,
        }
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = PROTOCOL_EXTRAS.get(protocol)
        fix = f"pip install 'trainyard[{extra}]'" if extra else summarize_error(error)
        raise StorageError(f"{protocol}:// needs a library that is not installed", where=redact(url), fix=fix) from None
    except TrainyardError:
        raise
    except Exception as error:  # whatever a file system makes of a URL that it cannot read
        raise StorageError(
            f"cannot be opened ({summarize_error(error)})", where=redact(url), fix="check the URL"
        ) from None
    if protocol in ("s3", "s3a"):
        fs.retries = 1
    return fs, path
