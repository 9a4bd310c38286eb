"""Import the user's code of one job or run as a package with a unique name.

Python keeps a module for the whole process, one for each name. So each set of files is a package named by their digest:
an edited file makes another package, and so does the code of another run. Within the package, the imports of its files
resolve to its files first, under the names that they use. Modules are created from the content that was read, digested
and stored, never from a file that has changed since.
"""

from __future__ import annotations

import atexit
import builtins
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import CodeType, ModuleType
from typing import Any

from pipeline.config import CustomModelConfig, JobConfig, UserFunctionDataConfig
from pipeline.errors import InputError, JobError
from pipeline.user_code.archive import from_zip, to_zip
from pipeline.user_code.dependencies import PACKAGE_FOLDER, CodeDependencies, find_installed_file, is_installed

PREFIX = "trainyard_code_"
"""Prefix of the package names."""
ARCHIVE = "code.zip"


class UserCode:
    """The files of the user's code that a job imports, with the content that they had when they were read.

    Picklable, and so are objects of its modules: a process that unpickles the code first can import them.

    Parameters
    ----------
    files: content by path below an import path.
    paths: the file on this machine, by the same path.
    roots: folders at the end of the import path while the code is active, for imports without an import statement in
        its files.
    modules: the modules that the job names.
    name: of the package; default: from the digest of all of these.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        paths: Mapping[str, str],
        roots: Sequence[str],
        modules: Sequence[str] = (),
        name: str = "",
    ) -> None:
        self.files = dict(sorted(files.items()))
        self.digests = {path: hashlib.sha256(content).hexdigest() for path, content in self.files.items()}
        """SHA-256 of each file, by its path."""
        self.archive = to_zip(self.files)
        """`code.zip`."""
        file_paths = [paths[path] for path in self.files]  # a module may read files beside it
        self.name = name or PREFIX + _digest(self.archive, *file_paths, *roots, *modules)
        self._paths, self._roots, self._modules = dict(paths), tuple(roots), tuple(modules)
        self._folders = {parent.as_posix() for path in self.files for parent in PurePosixPath(path).parents} - {"."}

    def __repr__(self) -> str:
        return f"UserCode({self.name!r}, {len(self.files)} files)"

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_user_code, (self.files, self._paths, self._roots, self._modules, self.name)

    @contextmanager
    def activated(self) -> Iterator[None]:
        """While entered, the modules that a job of this thread names are imported from this code. On exit the import
        path is restored, and other modules that were imported from the roots are removed, so that the next import reads
        their files again."""
        current = _active.get()
        if current is not None and current.code is self:
            yield
            return
        active = _ActiveCode(self, frozenset(sys.modules))
        added = [root for root in self._roots if root not in sys.path]
        sys.path.extend(added)
        token = _active.set(active)
        try:
            yield
        finally:
            _active.reset(token)
            for name in self._find_other_imports(active):
                sys.modules.pop(name, None)
            for root in added:
                if root in sys.path:
                    sys.path.remove(root)

    def import_module(self, name: str, package: str | None = None) -> ModuleType:
        """`importlib.import_module` for the modules of this code."""
        return importlib.import_module(f"{self.name}.{name}" if self.contains(name) else name, package)

    def contains(self, module: str) -> bool:
        """Return whether `module` is imported from this code."""
        path, top = module.replace(".", "/"), module.partition(".")[0]
        if f"{top}.py" in self.files or f"{top}/__init__.py" in self.files:
            return True
        return f"{path}.py" in self.files or path in self._folders

    def installed_module_digests(self) -> dict[str, str]:
        """Return the SHA-256 of the modules of installed packages that the job names. Imports their packages."""
        names = [module for module in self._modules if not self.contains(module)]
        files = {name: file for name in names if (file := find_installed_file(name)) is not None}
        return {name: _digest_file(file) for name, file in files.items()}

    def find_unstored_files(self) -> dict[str, str]:
        """Return the SHA-256, by path, of files that were imported from the roots since this code became active and do
        not belong to it: those imported without a statement, and those that are not Python files."""
        active = _active.get()
        files = self._find_other_imports(active).values() if active is not None and active.code is self else ()
        digests = {self._below_root(file): _digest_file(file) for file in files if file.is_file()}
        return {path: digest for path, digest in digests.items() if self.digests.get(path) != digest}

    def find_edited_files(self, digests: Mapping[str, str]) -> list[str]:
        """Return the files of an earlier `find_unstored_files` that exist with another content."""
        edited_paths = []
        for path, digest in digests.items():
            files = [file for root in self._roots if (file := Path(root, path)).is_file()]
            if files and _digest_file(files[0]) != digest:
                edited_paths.append(path)
        return edited_paths

    def _find_other_imports(self, since: _ActiveCode) -> dict[str, Path]:
        """Return the files below a root of new modules, by module name, except modules of any `UserCode`."""
        new_modules = {}
        for name in [name for name in list(sys.modules) if name not in since.modules_before]:
            module = sys.modules.get(name)
            file = getattr(module, "__file__", None)
            if not isinstance(file, str) or isinstance(getattr(module, "__loader__", None), _UserModuleLoader):
                continue
            path = Path(file).absolute()
            if not is_installed(path) and not path.is_relative_to(PACKAGE_FOLDER) and self._below_root(path):
                new_modules[name] = path
        return new_modules

    def _below_root(self, file: Path) -> str:
        """Return the path of a file below the first root that contains it; empty if none does."""
        root = next((root for root in self._roots if file.is_relative_to(root)), None)
        return file.relative_to(root).as_posix() if root is not None else ""

    def make_module_spec(self, fullname: str) -> importlib.machinery.ModuleSpec | None:
        """Return the import specification of one of its modules; None for any other name."""
        path = fullname.removeprefix(self.name).removeprefix(".").replace(".", "/")
        for file in (f"{path}/__init__.py", f"{path}.py"):
            if file in self.files:
                loader = _UserModuleLoader(fullname, self._paths[file], self, self.files[file])
                return importlib.util.spec_from_file_location(fullname, self._paths[file], loader=loader)
        if path == "" or path in self._folders:
            folder = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
            folder.submodule_search_locations = [os.path.join(root, path) for root in self._roots] if path else []
            return folder
        return None

    def import_statement(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,  # noqa: A002 - as __import__ calls them
        locals: Mapping[str, object] | None = None,  # noqa: A002
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        """`__import__` for the modules of this code."""
        if level == 0 and self.contains(name):
            module = builtins.__import__(f"{self.name}.{name}", globals, locals, fromlist or (), 0)
            return module if fromlist else sys.modules[f"{self.name}.{name.partition('.')[0]}"]
        module = builtins.__import__(name, globals, locals, fromlist or (), level)
        return self._make_importlib() if module is importlib else module

    def _make_importlib(self) -> ModuleType:
        """Return a copy of `importlib` with `import_module` of this code."""
        module = ModuleType("importlib", importlib.__doc__)
        module.__dict__.update(vars(importlib))
        module.__dict__.update(import_module=self.import_module, __getattr__=lambda name: getattr(importlib, name))
        return module


@dataclass(frozen=True)
class _ActiveCode:
    code: UserCode
    modules_before: frozenset[str]
    """Names of the modules that were imported before."""


_active: ContextVar[_ActiveCode | None] = ContextVar("trainyard_user_code", default=None)
_registered: dict[str, UserCode] = {}


class _UserModuleFinder(importlib.abc.MetaPathFinder):
    """Finds the packages of user code, and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        code = _registered.get(fullname.partition(".")[0])
        return code.make_module_spec(fullname) if code is not None else None


_finder = _UserModuleFinder()


class _UserModuleLoader(importlib.machinery.SourceFileLoader):
    """Creates a module from the content that was read, with the import functions of its code."""

    def __init__(self, fullname: str, path: str, code: UserCode, content: bytes) -> None:
        super().__init__(fullname, path)
        self._user_code = code
        self._content = content

    def get_data(self, path: str) -> bytes:
        return self._content if path == self.path else super().get_data(path)

    def get_code(self, fullname: str) -> CodeType | None:
        """Compile the content. Never use a compiled file, whose source may have been another one."""
        return self.source_to_code(self._content, self.path)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._user_code.import_statement}
        super().exec_module(module)


def list_user_references(job: JobConfig) -> list[str]:
    """Return every `module:name` that a job imports, sorted."""
    names = [job.model.kind] if isinstance(job.model, CustomModelConfig) else []
    names += [job.data.source.call] if isinstance(job.data, UserFunctionDataConfig) else []
    names += [job.task.loss] if job.task.loss is not None and ":" in job.task.loss else []
    return sorted({*names, *job.metrics})


def collect_user_code(job: JobConfig) -> UserCode:
    """Collect the user's code that a job imports, without running it: from its `code` folder, then the working
    directory; modules that the job names also from the rest of the import path, except installed packages.

    Raises
    ------
    JobError: a module of the user has the name of this package; it is `__main__`, which cannot be imported again; or
        the files are too many or too large to be stored.
    """
    if job.code is not None:
        folder = Path(job.code).absolute()
        for hidden in (folder / f"{PACKAGE_FOLDER.name}.py", folder / PACKAGE_FOLDER.name):
            if hidden.is_file() or (
                hidden.is_dir() and any(hidden.glob("*.py")) and hidden.resolve() != PACKAGE_FOLDER
            ):
                raise name_conflict_error(str(hidden))
    return collect_code_of(list_user_references(job), job.code)


def collect_code_of(names: Sequence[str], code_folder: str | None = None) -> UserCode:
    """Collect the user's code that some `module:name` import, as `collect_user_code` does."""
    modules = sorted({name.partition(":")[0] for name in names})
    if not modules:
        return NO_CODE
    for name in names:
        top = name.partition(":")[0].partition(".")[0]
        if top == PACKAGE_FOLDER.name:
            raise name_conflict_error(name)
        if top == "__main__":
            raise JobError(
                "code of the running program or notebook can neither be stored with a run nor loaded again",
                where=name,
                fix="write it to a file beside it, such as nets.py, and name that: nets:Net",
            )
    roots = [*([Path(code_folder).absolute()] if code_folder is not None else []), Path.cwd()]
    where = f"code: {code_folder}" if code_folder is not None else str(Path.cwd())
    dependencies = CodeDependencies.collect(modules, roots, where)
    paths = {path: str(file) for path, file in dependencies.paths.items()}
    return _register(UserCode(dependencies.files, paths, [str(root) for root in dependencies.roots], modules))


def load_stored_code(archive: bytes) -> UserCode:
    """Return the code that was stored with a run.

    Raises
    ------
    StorageError: not a zip archive, or one with a file that Trainyard does not store.
    """
    name = PREFIX + _digest(archive)
    return _registered.get(name) or _write_to_temporary_folder(from_zip(archive), (), name)


def active_code() -> UserCode | None:
    """Return the active code of this thread, or None."""
    active = _active.get()
    return active.code if active is not None else None


def find_changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the files and modules whose digests differ, sorted."""
    # Earlier versions recorded every Python file of the folder, imported or not, and the archive of them all.
    names = {*now} if ARCHIVE in before else {*before, *now}
    return sorted(name for name in names if before.get(name) != now.get(name))


def name_conflict_error(what: str, error: type[InputError] = JobError, where: str = "code") -> InputError:
    """Return the error for a module with the name of this package: each would hide the other."""
    return error(
        f"{what}: {PACKAGE_FOLDER.name!r} is the name of Trainyard's own package, and Python can import only one of "
        "that name",
        where=where,
        fix="rename yours",
    )


def _write_to_temporary_folder(files: Mapping[str, bytes], modules: Sequence[str], name: str) -> UserCode:
    """Write code whose files are not on this machine to a temporary folder, which is removed at exit."""
    folder = Path(tempfile.mkdtemp(prefix="trainyard-code-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return _register(UserCode(files, {path: str(folder / path) for path in files}, [str(folder)], modules, name))


def _unpickle_user_code(
    files: Mapping[str, bytes], paths: Mapping[str, str], roots: Sequence[str], modules: Sequence[str], name: str
) -> UserCode:
    """Return the code that another process pickled, possibly on another machine."""
    if name == NO_CODE.name:
        return NO_CODE
    if name in _registered:
        return _registered[name]
    if all(Path(paths[path]).is_file() and Path(paths[path]).read_bytes() == files[path] for path in files):
        return _register(UserCode(files, paths, roots, modules, name))
    return _write_to_temporary_folder(files, modules, name)


def _register(code: UserCode) -> UserCode:
    """Make code importable in this process; return the one registered first under its name."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    return _registered.setdefault(code.name, code)


def _digest(*parts: bytes | str) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(hashlib.sha256(part if isinstance(part, bytes) else part.encode()).digest())
    return sha.hexdigest()[:16]


def _digest_file(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


NO_CODE = UserCode({}, {}, [])
"""The code of a job that names no modules."""
