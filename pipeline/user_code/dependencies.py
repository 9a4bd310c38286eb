"""Which files are the user's own code: found from import statements alone. Nothing is imported, torch least of all."""

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
"""The package whose name a user's own must not have."""
MAX_FILES, MAX_BYTES = 1_000, 10_000_000
"""Bounds of the code that is stored with a run."""

_IMPORTS_BY_NAME = frozenset({"import_module", "__import__"})
_IMPORTS_BY_PATH = frozenset(
    {"spec_from_file_location", "SourceFileLoader", "run_path", "run_module", "iter_modules", "walk_packages"}
)


@dataclass
class CodeDependencies:
    """The files that modules of the user's own import, directly or not.

    roots: folders in which these are looked for, in this order. Of what is found elsewhere only the modules that the
        job itself names count, and what lies below one of the roots, such as `src/` of a project that is installed
        in place.
    files: content by path below its root, such as `parts/layers.py`. paths: where each was read.
    """

    roots: list[Path]
    where: str
    files: dict[str, bytes] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    _total_bytes: int = 0

    @classmethod
    def collect(cls, modules: Iterable[str], roots: Sequence[Path], where: str) -> CodeDependencies:
        """The files of `modules` and of all that they import.

        A package's `__init__` belongs to its modules. Where a module is imported by a name or path that is computed,
        every Python file below its root belongs to the code.

        Parameters
        ----------
        where: what of the job names the code, for messages.

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
        """The files that importing a module runs: path below the root, file, root. Empty if it is not the user's."""
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
            below = any(folder.is_relative_to(root) for root in self.roots)
            if (named or below) and folder not in self.roots:
                self.roots.append(folder)

    def _add_file(self, path: str, file: Path) -> bytes:
        content = self.files[path] = file.read_bytes()
        self.paths[path] = file
        self._total_bytes += len(content)
        if len(self.files) > MAX_FILES or self._total_bytes > MAX_BYTES:
            raise JobError(
                f"more than {MAX_FILES:,} Python files or {MAX_BYTES // 10**6} MB would be stored with the run",
                where=self.where,
                fix="point code: at a smaller folder, one that holds the job's own modules alone",
            )
        return content

    def _add_all_files(self, root: Path) -> None:
        for file in _iter_python_files(root):
            path = file.relative_to(root).as_posix()
            if path not in self.files:
                self._add_file(path, file)


def is_installed(path: Path) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    packages = {"site-packages", "dist-packages"} & set(path.parts)
    return bool(packages) or path.is_relative_to(sysconfig.get_path("stdlib"))


def _module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _find_module_file(folder: Path, name: str) -> Path | None:
    """The file of a regular package, or of a module, called `name` in a folder."""
    for file in (folder / name / "__init__.py", folder / f"{name}.py"):
        if file.is_file():
            return file
    return None


def _find_package_files(root: Path, parts: Sequence[str]) -> list[Path]:
    """The files of a module and of the packages above it, as far as they are there."""
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
    """The folders from which Python would import a top-level name, installed packages aside."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):  # of a module that was made by hand
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
    """The source file of a module that belongs to an installed package; its package may be imported."""
    try:
        spec: importlib.machinery.ModuleSpec | None = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None or not spec.has_location or spec.origin is None or not is_installed(Path(spec.origin)):
        return None
    return Path(spec.origin)


def _parse_source(content: bytes) -> ast.Module:
    """A file's syntax tree; an empty one for what is no Python, of which the import will tell, if it comes to that."""
    try:
        return ast.parse(content)
    except (SyntaxError, ValueError):  # ValueError: null bytes
        return ast.Module([], [])


def _iter_imports(tree: ast.Module, package: str) -> Iterator[str]:
    """The absolute names of all modules that a file may import, and some that are none, such as `module.function`."""
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
    """What `from package import *` imports: the constants of `__all__`."""
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
    """`name` without leading dots; empty where it leads out of the package."""
    try:
        return importlib.util.resolve_name(name, package or None)
    except (ImportError, ValueError):
        return ""


def _iter_python_files(folder: Path) -> Iterator[Path]:
    """All Python files below a folder; hidden folders, caches and virtual environments are left out."""
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
