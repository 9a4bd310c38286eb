"""Open fsspec file systems by URL, with their own retries and listing caches turned off."""

from __future__ import annotations

from typing import Any

from pipeline.errors import StorageError, TrainyardError
from pipeline.redaction import redact
from pipeline.storage.retry import request_timeout_s, summarize_error

PROTOCOL_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
"""Protocols of object stores, each with the extra of this package that installs its library."""
MAX_CONNECTIONS = 32
"""Size of the connection pool to an S3 server. The libraries' default of 10 is below the number of concurrent
requests."""


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it. No server is contacted yet.

    Parameters
    ----------
    url: a local path, or any URL or URL chain of fsspec.

    Raises
    ------
    StorageError: a protocol that is unknown or whose library is not installed, or an invalid URL.
    """
    import fsspec  # imported here because it takes a tenth of a second

    protocol = url.partition("://")[0] if "://" in url else "file"
    options: dict[str, object] = {}
    if protocol in PROTOCOL_EXTRAS:
        options["use_listings_cache"] = False
    if protocol in ("s3", "s3a"):  # only `pipeline.storage.retry` retries
        options["config_kwargs"] = {
            "connect_timeout": 5,
            "read_timeout": request_timeout_s(),
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
    except Exception as error:  # file systems raise all kinds of errors for an invalid URL
        raise StorageError(
            f"cannot be opened ({summarize_error(error)})", where=redact(url), fix="check the URL"
        ) from None
    if protocol in ("s3", "s3a"):
        fs.retries = 1
    return fs, path
