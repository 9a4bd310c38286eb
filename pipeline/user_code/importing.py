"""The user's own code of one job or run, imported under a name of its own.

Python keeps a module for as long as a process lives, and knows only one of a name. So each set of files is a package of
its own, called by their digest: an edited file is another package, and so is the code of another run. Within it the
imports of its files lead to its files first, by whatever names they use. What lies beneath is never a file that changed
since: modules are made of the content that was read, digested and stored.
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
"""Of the packages' names."""
ARCHIVE = "code.zip"


class UserCode:
    """The files of the user's own code that a job imports, as they were when they were read.

    Picklable, and so is what is made of its modules: whoever unpickles the code first can import them.

    Parameters
    ----------
    files: content by path below an import path. paths: where each of them lies on this machine.
    roots: folders that are on the import path while it is in use, behind all others: for what is imported in other
        ways than by an import statement of its own.
    modules: names of those that the job names.
    name: of the package; else by the digest of all this.
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
        file_paths = [paths[path] for path in self.files]  # a module may read what lies beside it
        self.name = name or PREFIX + _digest(self.archive, *file_paths, *roots, *modules)
        self._paths, self._roots, self._modules = dict(paths), tuple(roots), tuple(modules)
        self._folders = {parent.as_posix() for path in self.files for parent in PurePosixPath(path).parents} - {"."}

    def __repr__(self) -> str:
        return f"UserCode({self.name!r}, {len(self.files)} files)"

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_user_code, (self.files, self._paths, self._roots, self._modules, self.name)

    @contextmanager
    def activated(self) -> Iterator[None]:
        """While entered, what a job of this thread names is imported from here. Afterwards the import path is as it
        was, and modules that came from the roots in other ways are forgotten, so that they are read anew next time."""
        now = _active.get()
        if now is not None and now.code is self:
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
        """`importlib.import_module` as this code's modules see it."""
        return importlib.import_module(f"{self.name}.{name}" if self.contains(name) else name, package)

    def contains(self, module: str) -> bool:
        """Whether importing `module` leads into this code."""
        path, top = module.replace(".", "/"), module.partition(".")[0]
        if f"{top}.py" in self.files or f"{top}/__init__.py" in self.files:
            return True
        return f"{path}.py" in self.files or path in self._folders

    def installed_module_digests(self) -> dict[str, str]:
        """SHA-256 of the modules of installed packages that the job names. It imports their packages."""
        names = [module for module in self._modules if not self.contains(module)]
        files = {name: file for name in names if (file := find_installed_file(name)) is not None}
        return {name: _digest_file(file) for name, file in files.items()}

    def find_unstored_files(self) -> dict[str, str]:
        """SHA-256 of files that were imported from the roots since this is in use and are none of its files, by their
        paths: for the import has no statement, or is of no Python file."""
        now = _active.get()
        files = self._find_other_imports(now).values() if now is not None and now.code is self else ()
        digests = {self._below_root(file): _digest_file(file) for file in files if file.is_file()}
        return {path: digest for path, digest in digests.items() if self.digests.get(path) != digest}

    def find_edited_files(self, digests: Mapping[str, str]) -> list[str]:
        """Those files of an earlier `not_stored` that are here, with another content."""
        edited_paths = []
        for path, digest in digests.items():
            files = [file for root in self._roots if (file := Path(root, path)).is_file()]
            if files and _digest_file(files[0]) != digest:
                edited_paths.append(path)
        return edited_paths

    def _find_other_imports(self, since: _ActiveCode) -> dict[str, Path]:
        """New modules whose files lie below a root, by name; but for those that were made of the files of some code."""
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
        """The path below the first root that holds a file; empty if none does."""
        root = next((root for root in self._roots if file.is_relative_to(root)), None)
        return file.relative_to(root).as_posix() if root is not None else ""

    def make_module_spec(self, fullname: str) -> importlib.machinery.ModuleSpec | None:
        """How to import one of its modules; None for what is none of them."""
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
        """`__import__` as this code's modules see it."""
        if level == 0 and self.contains(name):
            module = builtins.__import__(f"{self.name}.{name}", globals, locals, fromlist or (), 0)
            return module if fromlist else sys.modules[f"{self.name}.{name.partition('.')[0]}"]
        module = builtins.__import__(name, globals, locals, fromlist or (), level)
        return self._make_importlib() if module is importlib else module

    def _make_importlib(self) -> ModuleType:
        """`importlib`, whose `import_module` is that of this code."""
        module = ModuleType("importlib", importlib.__doc__)
        module.__dict__.update(vars(importlib))
        module.__dict__.update(import_module=self.import_module, __getattr__=lambda name: getattr(importlib, name))
        return module


@dataclass(frozen=True)
class _ActiveCode:
    code: UserCode
    modules_before: frozenset[str]
    """Names of those that were there before."""


_active: ContextVar[_ActiveCode | None] = ContextVar("trainyard_user_code", default=None)
_registered: dict[str, UserCode] = {}


class _UserModuleFinder(importlib.abc.MetaPathFinder):
    """Finds the packages of user code. Inert for all else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        code = _registered.get(fullname.partition(".")[0])
        return code.make_module_spec(fullname) if code is not None else None


_finder = _UserModuleFinder()


class _UserModuleLoader(importlib.machinery.SourceFileLoader):
    """Makes a module of the content that was read, with the imports of its code."""

    def __init__(self, fullname: str, path: str, code: UserCode, content: bytes) -> None:
        super().__init__(fullname, path)
        self._user_code = code
        self._content = content

    def get_data(self, path: str) -> bytes:
        return self._content if path == self.path else super().get_data(path)

    def get_code(self, fullname: str) -> CodeType | None:
        """Never a compiled file, which may be of another content."""
        return self.source_to_code(self._content, self.path)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._user_code.import_statement}
        super().exec_module(module)


def list_user_references(job: JobConfig) -> list[str]:
    """All `module:name` that a job would import, sorted."""
    names = [job.model.kind] if isinstance(job.model, CustomModelConfig) else []
    names += [job.data.source.call] if isinstance(job.data, UserFunctionDataConfig) else []
    names += [job.task.loss] if job.task.loss is not None and ":" in job.task.loss else []
    return sorted({*names, *job.metrics})


def collect_user_code(job: JobConfig) -> UserCode:
    """The user's own code that a job imports, read but not run: from its `code` folder, then the working directory,
    then for what it names itself wherever it lies on the import path, installed packages aside.

    Raises
    ------
    JobError: a module of the user's own is called as ours, so that it cannot be imported beside it; it is part of the
        running program; or the files are too many to be stored.
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
    """The same for some `module:name`."""
    modules = sorted({name.partition(":")[0] for name in names})
    if not modules:
        return NO_CODE
    for name in names:
        top = name.partition(":")[0].partition(".")[0]
        if top == PACKAGE_FOLDER.name:
            raise name_conflict_error(name)
        if top == "__main__":
            raise JobError(
                "code of the running program or notebook can neither be stored with a run nor be loaded again",
                where=name,
                fix="write it to a file beside it, such as nets.py, and name that: nets:Net",
            )
    roots = [*([Path(code_folder).absolute()] if code_folder is not None else []), Path.cwd()]
    where = f"code: {code_folder}" if code_folder is not None else str(Path.cwd())
    dependencies = CodeDependencies.collect(modules, roots, where)
    paths = {path: str(file) for path, file in dependencies.paths.items()}
    return _register(UserCode(dependencies.files, paths, [str(root) for root in dependencies.roots], modules))


def load_stored_code(archive: bytes) -> UserCode:
    """The code that was stored with a run.

    Raises
    ------
    StorageError: no such archive, or a file in it that could not have been stored.
    """
    name = PREFIX + _digest(archive)
    return _registered.get(name) or _write_to_temporary_folder(from_zip(archive), (), name)


def active_code() -> UserCode | None:
    """The code that is in use in this thread."""
    now = _active.get()
    return now.code if now is not None else None


def find_changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files and modules that differ between two sets of digests, sorted."""
    # Earlier versions noted every Python file of the folder, imported or not, and the archive of them all.
    names = {*now} if ARCHIVE in before else {*before, *now}
    return sorted(name for name in names if before.get(name) != now.get(name))


def name_conflict_error(what: str, error: type[InputError] = JobError, where: str = "code") -> InputError:
    """The error for a module that would hide this package, or be hidden by it."""
    return error(
        f"{what}: {PACKAGE_FOLDER.name!r} is the name of Trainyard's own package, and Python can import only one of "
        "that name",
        where=where,
        fix="rename yours",
    )


def _write_to_temporary_folder(files: Mapping[str, bytes], modules: Sequence[str], name: str) -> UserCode:
    """Code whose files lie nowhere on this machine: in a temporary folder, until this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="trainyard-code-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return _register(UserCode(files, {path: str(folder / path) for path in files}, [str(folder)], modules, name))


def _unpickle_user_code(
    files: Mapping[str, bytes], paths: Mapping[str, str], roots: Sequence[str], modules: Sequence[str], name: str
) -> UserCode:
    """Code that came from another process, perhaps on another machine."""
    if name == NO_CODE.name:
        return NO_CODE
    if name in _registered:
        return _registered[name]
    if all(Path(paths[path]).is_file() and Path(paths[path]).read_bytes() == files[path] for path in files):
        return _register(UserCode(files, paths, roots, modules, name))
    return _write_to_temporary_folder(files, modules, name)


def _register(code: UserCode) -> UserCode:
    """The one of its name in this process, which can be imported from here on."""
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
"""Of a job that names no modules."""
