"""Joining a cluster that is there: with the token of whoever joins, and in words of ours where that fails."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.cluster.jobs.tokens import find_token
from pipeline.cluster.ray_internals import reload_settings
from pipeline.errors import InputError

TOKEN_REFUSED = "InvalidAuthToken"
"""What Ray's own lines say where a cluster wants a token, or another one; its exception only says that it failed."""


@contextmanager
def ray_auth(address: str, *, verbose: bool) -> Iterator[None]:
    """While `ray.init` joins a cluster: a token that the user has is shown to it, and Ray's native lines are kept back.

    Ray itself starts clusters that ask for a token wherever there is one, but shows it to none unless told to.

    Raises
    ------
    InputError: the cluster refuses the token, or wants one.
    """
    token = find_token(None)
    if token is not None and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        reload_settings()
    with tempfile.TemporaryFile() as captured_stderr:
        try:
            with _redirect_stderr(captured_stderr.fileno()):
                yield
        except (ConnectionError, RuntimeError, ValueError):
            captured_stderr.seek(0)
            if TOKEN_REFUSED.encode() in captured_stderr.read():
                what = (
                    f"the cluster refuses the token of {token.source}"
                    if token is not None
                    else "the cluster wants a token"
                )
                fix = (
                    "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to its file; on the head `ray get-auth-token` tells it"
                )
                raise InputError(what, where=address, fix=fix) from None
            raise
        finally:
            if verbose:
                captured_stderr.seek(0)
                print(captured_stderr.read().decode(errors="replace"), end="", file=sys.stderr)


@contextmanager
def _redirect_stderr(file: int) -> Iterator[None]:
    """Standard error of this whole process into a file: Ray's native part writes there past Python."""
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(file, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
