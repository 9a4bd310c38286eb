"""The private interfaces of Ray that are used exist in the installed Ray, and only one module uses them."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from packaging.requirements import Requirement

from pipeline.cluster import ray_internals

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray and of what it imports

PACKAGE = Path(ray_internals.__file__).parents[1]
MODULE_FILE = Path(ray_internals.__file__)
MISSING_MESSAGE = (
    f"Ray {ray.__version__} has no {{}} any more: see the function of pipeline/cluster/ray_internals.py that uses it,"
    f" and the versions on which it was checked ({', '.join(ray_internals.CHECKED_RAY_VERSIONS)})"
)

USED = [
    "ray._private.state:state.available_resources_per_node",
    "ray._private.state:state.get_draining_nodes",
    "ray._private.state:state.get_max_resources_from_cluster_config",
    "ray._private.ray_constants:ENABLE_RAY_CLUSTER",
    "ray._private.worker:print_to_stdstream",
    "ray._raylet:Config.initialize",
    "ray._raylet:GcsClient",
    "ray._raylet:InnerGcsClient.internal_kv_del",  # GcsClient forwards its calls to it
    "ray._raylet:InnerGcsClient.internal_kv_get",
    "ray.job_submission:JobSubmissionClient._do_request",
    "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer._create_default_callbacks",  # in driver.py
]
TEXTS = {
    "ray._private.ray_constants": ["RAY_worker_niceness"],
    "ray._private.accelerators.accelerator": ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"],
    "ray._private.runtime_env.packaging": ["_ray_pkg_"],
    "ray._private.services": ["--python_worker_command="],
    "ray.dashboard.modules.dashboard_sdk": ["self._server_ray_version", "logging.getLogger(__name__)"],
    "ray.dashboard.modules.job.job_head": ["/api/packages/{protocol}/{package_name}"],
    "ray.dashboard.modules.job.sdk": ["logging.getLogger(__name__)"],
    "ray.dashboard.modules.node.node_head": ['"/nodes"', '"summary"'],
    "ray.train.v2._internal.constants": [
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S",
    ],
    "ray.train.v2._internal.exceptions": ["self._base_exc"],
}
"""By module, strings in its source: environment variables, paths, and attributes that only instances have."""


@pytest.mark.parametrize("name", USED)
def test_private_name_exists_in_the_installed_ray(name: str) -> None:
    module, _, path = name.partition(":")
    try:
        value = importlib.import_module(module)
        for attribute in path.split("."):
            value = getattr(value, attribute)
    except (ImportError, AttributeError):
        pytest.fail(MISSING_MESSAGE.format(name))


@pytest.mark.parametrize(("module", "text"), [(module, text) for module, texts in TEXTS.items() for text in texts])
def test_variable_or_path_is_in_the_installed_ray(module: str, text: str) -> None:
    spec = importlib.util.find_spec(module)
    assert spec is not None, MISSING_MESSAGE.format(module)
    assert spec.origin is not None
    assert text in Path(spec.origin).read_text(), MISSING_MESSAGE.format(f"{text} in {module}")


def test_every_private_import_of_the_module_is_tested() -> None:
    tested_names = {re.split("[:.]", name.partition(":")[2])[0]: name.partition(":")[0] for name in USED}
    modules = {name.partition(":")[0] for name in USED}
    for module, name in private_imports(MODULE_FILE):
        assert f"{module}.{name}" in modules or tested_names.get(name) == module, f"from {module} import {name}"
    variables = {*ray_internals.RAY_ENV_DEFAULTS, ray_internals.WORKER_HEALTH_CHECK_VARIABLE}
    assert variables <= {text for texts in TEXTS.values() for text in texts}


def test_no_other_module_uses_private_interfaces_of_ray() -> None:
    imports = {
        f"{file.relative_to(PACKAGE)}: from {module} import {name}"
        for file in PACKAGE.rglob("*.py")
        if file != MODULE_FILE
        for module, name in private_imports(file)
    }
    assert imports == set()
    private = re.compile(r"\bray\._(?!_)|\b_raylet\b|\._do_request\b|_server_ray_version|_base_exc\b|RAY_worker_")
    assert [
        str(file) for file in PACKAGE.rglob("*.py") if file != MODULE_FILE and private.search(file.read_text())
    ] == []


def test_installed_ray_was_checked_and_is_within_the_declared_bounds() -> None:
    version = ".".join(ray.__version__.split(".")[:2])
    assert version in ray_internals.CHECKED_RAY_VERSIONS, "see the docstring of pipeline/cluster/ray_internals.py"
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    declared = next(Requirement(line) for line in project["dependencies"] if line.startswith("ray["))
    assert declared.specifier.contains(ray.__version__)
    assert any(bound.operator == "<" for bound in declared.specifier), (
        "there is an upper bound, which is raised by hand"
    )


def private_imports(file: Path) -> Iterator[tuple[str, str]]:
    """Return module and name of every import from Ray with a private part."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[tuple[str, str]] = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        for module, name in names:
            parts = [*module.split("."), name]
            if parts[0] == "ray" and any(part.startswith("_") for part in parts):
                yield module, name
