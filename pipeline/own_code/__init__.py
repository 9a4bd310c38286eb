"""The user's own code: what a job names of it, how it is found and called, and what it was."""

from pipeline.own_code.calling import at_home, called, failed, imported, look_in, make_importable, named_in
from pipeline.own_code.storing import changed, digests, packed, sources, unpacked

__all__ = [
    "at_home",
    "called",
    "changed",
    "digests",
    "failed",
    "imported",
    "look_in",
    "make_importable",
    "named_in",
    "packed",
    "sources",
    "unpacked",
]
