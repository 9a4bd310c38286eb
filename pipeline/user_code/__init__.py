"""The user's code: which files belong to it, and how it is imported, called and stored with a run."""

from pipeline.user_code.calling import call_user_function, import_user_function, wrap_user_error
from pipeline.user_code.importing import (
    NO_CODE,
    UserCode,
    collect_user_code,
    find_changed_files,
    list_user_references,
    load_stored_code,
)

__all__ = [
    "NO_CODE",
    "UserCode",
    "call_user_function",
    "find_changed_files",
    "collect_user_code",
    "wrap_user_error",
    "import_user_function",
    "list_user_references",
    "load_stored_code",
]
