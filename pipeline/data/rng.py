"""Random numbers without state: every draw is a function of a seed, the name of its stream, and counters.

Only the raw 64-bit output of Philox is used, never NumPy's distributions: NumPy guarantees that the former is the same
in every release, but not the latter (NEP 19).
"""

from __future__ import annotations

import hashlib

import numpy as np


def make_generator(seed: int, stream: str, *counters: int) -> np.random.Generator:
    """Return the generator of a named stream at a position in it.

    Parameters
    ----------
    seed: the job's seed for the stream.
    stream: its name, such as "shuffle"; two streams of one seed are independent.
    counters: the position, such as an epoch or a step; each position has a separate generator.

    Returns
    -------
    A generator over Philox4x64, keyed by the BLAKE2b digest of (seed, stream, counters).
    """
    key = int.from_bytes(_digest(b"generator", 16, seed, stream, counters), "little")
    return np.random.Generator(np.random.Philox(key=key))


def derive_torch_seed(seed: int, stream: str, *counters: int) -> int:
    """Return a seed of 63 bits for a torch generator; arguments as for `make_generator`."""
    return int.from_bytes(_digest(b"torch", 8, seed, stream, counters), "little") >> 1


def random_uint64(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return the next raw outputs of a generator: uint64 (count,), uniform over all 64 bits."""
    raw: np.ndarray = rng.bit_generator.random_raw(count)
    return raw


def random_permutation(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return a random permutation of the integers below `count`: int64 (count,).

    The integers are sorted by random keys. Each key holds its integer in the low bits, so that no two are equal and the
    order does not depend on how the sort treats ties; above them are 64 - log2(count) random bits.
    """
    bits = max(count - 1, 0).bit_length()
    low = np.uint64((1 << bits) - 1)
    keys = random_uint64(rng, count)
    keys &= ~low
    keys |= np.arange(count, dtype=np.uint64)
    keys.sort()
    keys &= low
    return keys.view(np.int64)


def _digest(kind: bytes, size: int, seed: int, stream: str, counters: tuple[int, ...]) -> bytes:
    text = "\0".join([stream, str(int(seed)), *(str(int(counter)) for counter in counters)])
    return hashlib.blake2b(text.encode(), digest_size=size, person=kind).digest()
