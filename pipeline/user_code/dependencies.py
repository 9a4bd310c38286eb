"""Find the files of the user's code from import statements alone. Nothing is imported."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import JobError

PACKAGE_FOLDER = Path(__file__).parents[1]
"""The folder of this package, whose name no module of the user may have."""
MAX_FILES, MAX_BYTES = 1_000, 10_000_000
"""Limits of the code that is stored with a run."""

_IMPORTS_BY_NAME = frozenset({"import_module", "__import__"})
_IMPORTS_BY_PATH = frozenset(
    {"spec_from_file_location", "SourceFileLoader", "run_path", "run_module", "iter_modules", "walk_packages"}
)


@dataclass
class CodeDependencies:
    """The files that the user's modules import, directly or indirectly.

    Parameters
    ----------
    roots: folders to search, in this order. Modules found elsewhere count only if the job names them, or if they are
        below one of the roots, such as `src/` of a project with an editable install.
    where: the key or folder of the code, for messages.
    files: content by path below its root, such as `parts/layers.py`.
    paths: the file on this machine, by the same path.
    """

    roots: list[Path]
    where: str
    files: dict[str, bytes] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    _total_bytes: int = 0

    @classmethod
    def collect(cls, modules: Iterable[str], roots: Sequence[Path], where: str) -> CodeDependencies:
        """Collect the files of `modules` and of everything that they import.

        A package's `__init__` belongs to its modules. If a module is imported by a computed name or path, every Python
        file below its root belongs to the code.

        Raises
        ------
        JobError: more than 1,000 files or 10 MB.
        """
        dependencies = cls([root for root in dict.fromkeys(roots) if not is_installed(root)], where)
        for module in modules:
            dependencies._add_root_of(module.partition(".")[0], named=True)
            dependencies._add(module)
        return dependencies

    def _add(self, module: str) -> None:
        pending = [module]
        seen: set[str] = set()
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            for path, file, root in self._locate(name):
                if path in self.files:
                    continue
                content = self._add_file(path, file)
                package = _module_name(path) if file.name == "__init__.py" else _module_name(path).rpartition(".")[0]
                tree = _parse_source(content)
                pending.extend(_iter_imports(tree, package))
                if file.name == "__init__.py":
                    pending.extend(f"{package}.{name}" for name in _iter_exports(tree))
                if _has_dynamic_import(tree):
                    self._add_all_files(root)

    def _locate(self, module: str) -> list[tuple[str, Path, Path]]:
        """Return the files that importing a module runs (path below the root, file, root); empty if not the user's."""
        parts = module.split(".")
        if parts[0] in sys.stdlib_module_names or parts[0] == PACKAGE_FOLDER.name:
            return []
        self._add_root_of(parts[0], named=False)
        regular = [root for root in self.roots if _find_module_file(root, parts[0]) is not None]
        for root in regular[:1] or self.roots:
            if files := [(file.relative_to(root).as_posix(), file, root) for file in _find_package_files(root, parts)]:
                return files
        return []

    def _add_root_of(self, top: str, *, named: bool) -> None:
        if any(_find_module_file(root, top) is not None or (root / top).is_dir() for root in self.roots):
            return
        for folder in _import_locations(top):
            is_below_root = any(folder.is_relative_to(root) for root in self.roots)
            if (named or is_below_root) and folder not in self.roots:
                self.roots.append(folder)

    def _add_file(self, path: str, file: Path) -> bytes:
        content = self.files[path] = file.read_bytes()
        self.paths[path] = file
        self._total_bytes += len(content)
        if len(self.files) > MAX_FILES or self._total_bytes > MAX_BYTES:
            raise JobError(
                f"more than {MAX_FILES:,} Python files or {MAX_BYTES // 10**6} MB would be stored with the run",
                where=self.where,
                fix="set code: to a smaller folder, with the modules of the job alone",
            )
        return content

    def _add_all_files(self, root: Path) -> None:
        for file in _iter_python_files(root):
            path = file.relative_to(root).as_posix()
            if path not in self.files:
                self._add_file(path, file)


def is_installed(path: Path) -> bool:
    """Return whether a file belongs to Python or to an installed package."""
    packages = {"site-packages", "dist-packages"} & set(path.parts)
    return bool(packages) or path.is_relative_to(sysconfig.get_path("stdlib"))


def _module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _find_module_file(folder: Path, name: str) -> Path | None:
    """Return the file of the regular package or module `name` in a folder."""
    for file in (folder / name / "__init__.py", folder / f"{name}.py"):
        if file.is_file():
            return file
    return None


def _find_package_files(root: Path, parts: Sequence[str]) -> list[Path]:
    """Return the existing files of a module and of the packages that contain it."""
    files, folder = [], root
    for part in parts:
        file = _find_module_file(folder, part)
        if file is not None:
            files.append(file)
        folder = folder / part
        if file is None and not folder.is_dir():  # a folder without __init__.py is a package too
            break
    return files


def _import_locations(top: str) -> list[Path]:
    """Return the folders from which Python would import a top-level name, except installed packages."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):  # of a module that was created at run time
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        folders = [Path(location).absolute().parent for location in spec.submodule_search_locations]
        return [folder for folder in folders if not is_installed(folder / top)]
    if not spec.has_location or spec.origin is None or not spec.origin.endswith(".py"):
        return []
    origin = Path(spec.origin).absolute()
    return [] if is_installed(origin) else [origin.parent]


def find_installed_file(module: str) -> Path | None:
    """Return the source file of a module of an installed package. May import the package."""
    try:
        spec: importlib.machinery.ModuleSpec | None = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None or not spec.has_location or spec.origin is None or not is_installed(Path(spec.origin)):
        return None
    return Path(spec.origin)


def _parse_source(content: bytes) -> ast.Module:
    """Return a file's syntax tree, empty if it is not valid Python: only importing it raises the error."""
    try:
        return ast.parse(content)
    except (SyntaxError, ValueError):  # ValueError: null bytes
        return ast.Module([], [])


def _iter_imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Yield the absolute names of all modules that a file may import, and of non-modules, such as `module.function`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _resolve_module_name("." * node.level + (node.module or ""), package)
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")
        elif isinstance(node, ast.Call) and _called_name(node) in _IMPORTS_BY_NAME and node.args:
            name = node.args[0]
            text = name.value if isinstance(name, ast.Constant) else None
            if isinstance(text, str) and (module := _resolve_module_name(text, package)):
                yield module


def _iter_exports(tree: ast.Module) -> Iterator[str]:
    """Yield the constants of `__all__`, which `from package import *` imports."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            for item in ast.walk(node):
                if isinstance(item, ast.Constant) and isinstance(item.value, str):
                    yield item.value


def _has_dynamic_import(tree: ast.Module) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = _called_name(node)
            by_constant = bool(node.args) and isinstance(node.args[0], ast.Constant)
            if function in _IMPORTS_BY_PATH or (function in _IMPORTS_BY_NAME and not by_constant):
                return True
    return False


def _called_name(call: ast.Call) -> str:
    if isinstance(call.func, ast.Name):
        return call.func.id
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def _resolve_module_name(name: str, package: str) -> str:
    """Return the absolute name of a relative one; empty if it is outside the package."""
    try:
        return importlib.util.resolve_name(name, package or None)
    except (ImportError, ValueError):
        return ""


def _iter_python_files(folder: Path) -> Iterator[Path]:
    """Yield all Python files below a folder, except hidden folders, caches and virtual environments."""
    for folder_path, folders, files in os.walk(folder):
        current_folder = Path(folder_path)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in ("__pycache__", "site-packages")
            and not (current_folder / name / "pyvenv.cfg").is_file()
        )
        yield from (
            current_folder / name
            for name in sorted(files)
            if name.endswith(".py") and (current_folder / name).is_file()
        )
