"""Tools for tests of what must survive bad storage: a file system that fails on purpose.

`faulty://s3/bucket/folder`, `faulty://memory/folder` and `faulty://file/absolute/folder` are the stores beneath, with
the faults that the environment variable TRAINYARD_FAULTS asks for; see `Faults`. Any process reaches them by URL, the
workers of a cluster too.
"""

from pipeline.testing.faults import FaultSettings, inject_faults
from pipeline.testing.filesystem import FaultyFileSystem

__all__ = ["FaultSettings", "FaultyFileSystem", "inject_faults"]
