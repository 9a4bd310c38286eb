"""Which requests fail and how: the settings, and the injector that applies them."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

from pipeline.errors import InputError

FAULTS_VARIABLE = "TRAINYARD_FAULTS"
FaultKind = Literal["error", "lost", "slow_down", "truncated", "stale", "expired"]
RequestGroup = Literal["read", "write", "list", "delete"]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)
REQUEST_GROUPS: tuple[RequestGroup, ...] = get_args(RequestGroup)
_HELP = (
    f"use words such as error=0.05 (a rate) or error@3 (the third request), of {', '.join(FAULT_KINDS)}; and seed=1, "
    "on=write, delay_s=0.1, bytes_per_s=1e6, expires_after=100, renewals=1, log=FILE"
)


@dataclass(frozen=True, kw_only=True)
class FaultSettings:
    """Which requests fail, and how. The fault of the n-th request of a process depends on the seed and n.

    error: the connection breaks, and nothing was done.
    lost: the request was done, and its reply is lost.
    slow_down: the store answers 503 SlowDown, and nothing was done.
    truncated: a write (never an exclusive one) leaves half of the content, as in a store that is not atomic.
    stale: a listing returns what the last listing of that folder by this process returned.
    expired: the credentials are refused, and nothing was done.
    """

    seed: int = 0
    rates: Mapping[FaultKind, float] = field(default_factory=dict)
    """Fraction of the requests that fail, by kind; at most 1 in total."""
    at: Mapping[int, FaultKind] = field(default_factory=dict)
    """Requests that fail, by number, counted from 1 in each process."""
    on: frozenset[RequestGroup] = frozenset(REQUEST_GROUPS)
    """The groups of requests that are counted and can fail: read, write, list, delete."""
    delay_s: float = 0.0
    """Latency of a slow connection: the delay of each request."""
    bytes_per_s: float = float("inf")
    """Bandwidth of a slow connection."""
    expires_after: int = 0
    """Number of requests after which credentials expire, counted from their renewal; 0 for never."""
    renewals: int = 1_000_000_000
    """How often credentials can be renewed."""
    log: str = ""
    """A file to which every process appends a line for each fault: pid, number and group of the request, kind."""

    def __post_init__(self) -> None:
        if any(not 0 <= rate <= 1 for rate in self.rates.values()) or sum(self.rates.values()) > 1:
            raise InputError("fault rates must be from 0 to 1, and at most 1 in total", where=FAULTS_VARIABLE)
        if self.delay_s < 0 or self.bytes_per_s <= 0 or min(self.expires_after, self.renewals) < 0:
            raise InputError("a number of TRAINYARD_FAULTS is out of range", where=FAULTS_VARIABLE, fix=_HELP)

    @classmethod
    def parse(cls, text: str) -> FaultSettings:
        """Parse settings such as "seed=1 error=0.05 lost@3 on=write,list delay_s=0.1".

        Raises
        ------
        InputError: a word that is no setting.
        """
        rates: dict[FaultKind, float] = {}
        at: dict[int, FaultKind] = {}
        rest: dict[str, str] = {}
        for word in text.split():
            kind = next((kind for kind in FAULT_KINDS if word.startswith((f"{kind}=", f"{kind}@"))), None)
            name, _, value = word.partition("=")
            try:
                if kind is not None and "@" in word:
                    at[_positive(word.removeprefix(f"{kind}@"))] = kind
                elif kind is not None:
                    rates[kind] = float(value)
                elif name in ("seed", "expires_after", "renewals"):
                    rest[name] = str(int(value))
                elif name in ("delay_s", "bytes_per_s"):
                    rest[name] = str(float(value))
                elif (name == "log" and value) or (name == "on" and set(value.split(",")) <= set(REQUEST_GROUPS)):
                    rest[name] = value
                else:
                    raise ValueError
            except ValueError:
                raise InputError(f"{word!r} is not a fault setting", where=FAULTS_VARIABLE, fix=_HELP) from None
        return cls(
            seed=int(rest.get("seed", 0)),
            rates=rates,
            at=at,
            on=frozenset(
                group for group in REQUEST_GROUPS if group in rest.get("on", ",".join(REQUEST_GROUPS)).split(",")
            ),
            delay_s=float(rest.get("delay_s", 0)),
            bytes_per_s=float(rest.get("bytes_per_s", "inf")),
            expires_after=int(rest.get("expires_after", 0)),
            renewals=int(rest.get("renewals", cls.renewals)),
            log=rest.get("log", ""),
        )


class FaultInjector:
    """Counts the requests of this process and decides which of them fail. Thread-safe."""

    def __init__(self, faults: FaultSettings) -> None:
        self.faults = faults
        self.request_count = 0
        self.counts: Counter[str] = Counter()
        """Number of faults so far, by kind."""
        self._requests_until_expiry = faults.expires_after
        self._renewals = faults.renewals
        self._lock = threading.Lock()

    def next_fault(self, group: RequestGroup) -> FaultKind | None:
        """Return the fault of the next request of a group, or None."""
        if group not in self.faults.on:
            return None
        with self._lock:
            self.request_count += 1
            self._requests_until_expiry -= 1
            has_expired = self.faults.expires_after > 0 and self._requests_until_expiry < 0
            kind = (
                "expired"
                if has_expired
                else self.faults.at.get(self.request_count) or self._sample_fault(self.request_count)
            )
            if kind is not None:
                self.counts[kind] += 1
                self._log_fault(group, kind)
            return kind

    def renew_credentials(self) -> None:
        """Renew the credentials, if renewals are left."""
        with self._lock:
            if self._renewals > 0:
                self._renewals -= 1
                self._requests_until_expiry = self.faults.expires_after

    def _log_fault(self, group: RequestGroup, kind: FaultKind) -> None:
        if self.faults.log:
            with open(self.faults.log, "a") as file:
                file.write(f"{os.getpid()} {self.request_count} {group} {kind}\n")

    def _sample_fault(self, number: int) -> FaultKind | None:
        draw = random.Random(f"{self.faults.seed}/{number}").random()
        for kind, rate in self.faults.rates.items():
            draw -= rate
            if draw < 0:
                return kind
        return None


_INJECTORS: dict[str, FaultInjector] = {}
"""One for each settings text: fsspec opens a file system in each thread, and these must share their counts."""


def get_injector(text: str) -> FaultInjector:
    """Return this process's injector for a settings text. InputError: a word that is no setting."""
    if text not in _INJECTORS:
        _INJECTORS[text] = FaultInjector(FaultSettings.parse(text))
    return _INJECTORS[text]


@contextmanager
def inject_faults(text: str) -> Iterator[FaultInjector]:
    """Set TRAINYARD_FAULTS in the context, for this process and its child processes, and count requests from 1.

    Raises
    ------
    InputError: a word that is no setting.
    """
    previous = os.environ.get(FAULTS_VARIABLE)
    _INJECTORS.pop(text, None)
    injector = get_injector(text)
    os.environ[FAULTS_VARIABLE] = text
    try:
        yield injector
    finally:
        os.environ.pop(FAULTS_VARIABLE)
        if previous is not None:
            os.environ[FAULTS_VARIABLE] = previous


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
