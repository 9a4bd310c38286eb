"""The user's own code: which files it is, how it is imported and called, and how it is stored with a run."""

from pipeline.own_code.calling import called, failed, imported
from pipeline.own_code.importing import NO_CODE, UserCode, changed, collect, named_in, stored

__all__ = ["NO_CODE", "UserCode", "called", "changed", "collect", "failed", "imported", "named_in", "stored"]
