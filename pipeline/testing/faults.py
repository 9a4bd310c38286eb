"""What goes wrong with which request: settings, and the dice."""

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

VARIABLE = "TRAINYARD_FAULTS"
Kind = Literal["error", "lost", "slow_down", "truncated", "stale", "expired"]
Group = Literal["read", "write", "list", "delete"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GROUPS: tuple[Group, ...] = get_args(Group)
_HELP = (
    f"words such as error=0.05 (a rate) or error@3 (the third request), of {', '.join(KINDS)}; and seed=1, on=write, "
    "delay_s=0.1, bytes_per_s=1e6, expires_after=100, renewals=1, log=FILE"
)


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Which requests fail, and how: the n-th request of a process meets what the seed and n say.

    error: the connection breaks, and nothing was done.
    lost: the request was done, and its reply is lost.
    slow_down: the store answers 503 SlowDown, and nothing was done.
    truncated: a write (never an exclusive one) leaves half of the content behind, as in a store that is not atomic.
    stale: a listing is answered as at the last look of this process at that folder.
    expired: the credentials are refused, and nothing was done.
    """

    seed: int = 0
    rates: Mapping[Kind, float] = field(default_factory=dict)
    """Share of all requests, by kind; 1 in all at the most."""
    at: Mapping[int, Kind] = field(default_factory=dict)
    """Requests by number, counted from 1 in each process."""
    on: frozenset[Group] = frozenset(GROUPS)
    """The groups of requests that count and that faults happen to: read, write, list, delete."""
    delay_s: float = 0.0
    """A slow link: how long each request waits."""
    bytes_per_s: float = float("inf")
    """A slow link: how fast content goes through it."""
    expires_after: int = 0
    """Credentials are good for so many requests, counted from their renewal; 0: for ever."""
    renewals: int = 1_000_000_000
    """So often they can be renewed."""
    log: str = ""
    """A file to which every process adds a line for each fault: process, number and group of the request, kind."""

    def __post_init__(self) -> None:
        if any(not 0 <= rate <= 1 for rate in self.rates.values()) or sum(self.rates.values()) > 1:
            raise InputError("the rates of faults must be from 0 to 1, and 1 in all at the most", where=VARIABLE)
        if self.delay_s < 0 or self.bytes_per_s <= 0 or min(self.expires_after, self.renewals) < 0:
            raise InputError("a number of TRAINYARD_FAULTS is out of range", where=VARIABLE, fix=_HELP)

    @classmethod
    def parse(cls, text: str) -> Faults:
        """Faults in words: "seed=1 error=0.05 lost@3 on=write,list delay_s=0.1".

        Raises
        ------
        InputError: a word that is none of these.
        """
        rates: dict[Kind, float] = {}
        at: dict[int, Kind] = {}
        rest: dict[str, str] = {}
        for word in text.split():
            kind = next((kind for kind in KINDS if word.startswith((f"{kind}=", f"{kind}@"))), None)
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
                elif (name == "log" and value) or (name == "on" and set(value.split(",")) <= set(GROUPS)):
                    rest[name] = value
                else:
                    raise ValueError
            except ValueError:
                raise InputError(f"{word!r} is no fault", where=VARIABLE, fix=_HELP) from None
        return cls(
            seed=int(rest.get("seed", 0)),
            rates=rates,
            at=at,
            on=frozenset(group for group in GROUPS if group in rest.get("on", ",".join(GROUPS)).split(",")),
            delay_s=float(rest.get("delay_s", 0)),
            bytes_per_s=float(rest.get("bytes_per_s", "inf")),
            expires_after=int(rest.get("expires_after", 0)),
            renewals=int(rest.get("renewals", cls.renewals)),
            log=rest.get("log", ""),
        )


class Dice:
    """Counts the requests of this process and says what each of them meets. Safe in several threads."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.requests = 0
        self.met: Counter[str] = Counter()
        """What happened so far, by kind."""
        self._good_for = faults.expires_after
        self._renewals = faults.renewals
        self._lock = threading.Lock()

    def throw(self, group: Group) -> Kind | None:
        """The fault that the next request of a group meets."""
        if group not in self.faults.on:
            return None
        with self._lock:
            self.requests += 1
            self._good_for -= 1
            has_expired = self.faults.expires_after > 0 and self._good_for < 0
            kind = "expired" if has_expired else self.faults.at.get(self.requests) or self._drawn(self.requests)
            if kind is not None:
                self.met[kind] += 1
                self._write_down(group, kind)
            return kind

    def renew(self) -> None:
        """New credentials, where there are any left."""
        with self._lock:
            if self._renewals > 0:
                self._renewals -= 1
                self._good_for = self.faults.expires_after

    def _write_down(self, group: Group, kind: Kind) -> None:
        if self.faults.log:
            with open(self.faults.log, "a") as file:
                file.write(f"{os.getpid()} {self.requests} {group} {kind}\n")

    def _drawn(self, number: int) -> Kind | None:
        draw = random.Random(f"{self.faults.seed}/{number}").random()
        for kind, rate in self.faults.rates.items():
            draw -= rate
            if draw < 0:
                return kind
        return None


_DICE: dict[str, Dice] = {}
"""One for each setting: fsspec makes a file system a thread, and all of them count together."""


def dice_of(text: str) -> Dice:
    """This process' dice for settings in words. InputError: settings that cannot be read."""
    if text not in _DICE:
        _DICE[text] = Dice(Faults.parse(text))
    return _DICE[text]


@contextmanager
def faults(text: str) -> Iterator[Dice]:
    """Set TRAINYARD_FAULTS while entered, for this process and those that it starts, and count from 1.

    Raises
    ------
    InputError: a word that cannot be read.
    """
    before = os.environ.get(VARIABLE)
    _DICE.pop(text, None)
    dice = dice_of(text)
    os.environ[VARIABLE] = text
    try:
        yield dice
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
