"""Fault injection for tests: a file system that wraps another one and fails on purpose.

`faulty://s3/bucket/folder`, `faulty://memory/folder` and `faulty://file/absolute/folder` are the wrapped stores, with
the faults in the environment variable TRAINYARD_FAULTS; see `FaultSettings`. Any process can open these URLs, including
the workers of a cluster.
"""

from pipeline.testing.faults import FaultSettings, inject_faults
from pipeline.testing.filesystem import FaultyFileSystem

__all__ = ["FaultSettings", "FaultyFileSystem", "inject_faults"]
