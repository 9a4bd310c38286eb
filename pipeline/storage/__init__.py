"""Storage: a folder of any fsspec file system, with atomic replace and exclusive create."""

from pipeline.storage.storage import Storage

__all__ = ["Storage"]
