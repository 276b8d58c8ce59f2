"""What holds for every test: no network, software rendering, one thread, a home of LeRobot's own that goes.

pytest imports this file before any test module: the environment is set, and the hook that checks the shapes
in signatures is in place, before LeRobot, MuJoCo or the package are imported.
"""

import importlib.util
import logging
import os
import sys
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# The tests' networks are tiny: a second thread only waits, and the cores belong to other workers of pytest.
os.environ["OMP_NUM_THREADS"] = "1"
HOME = tempfile.TemporaryDirectory(prefix="lerobot_home_")  # removed when this process ends
os.environ["HF_LEROBOT_HOME"] = HOME.name
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")


def import_model_with_checked_shapes() -> None:
    """Import `lerobot_pi0.model` so that its calls can check the shapes in their signatures.

    They check where the network is under test (tests/model); elsewhere it would only take time. The
    annotations are imported for type checkers only, so for that long this is one. The package around it is
    run afterwards, as everybody else runs it: `model/` needs torch alone.
    """
    import beartype  # before the switch below, which is meant for our modules alone
    import jaxtyping
    import torch  # noqa: F401  # likewise

    spec = importlib.util.find_spec("lerobot_pi0")
    assert spec is not None
    assert spec.loader is not None
    package = sys.modules["lerobot_pi0"] = importlib.util.module_from_spec(spec)
    with jaxtyping.install_import_hook("lerobot_pi0.model", f"{beartype.__name__}.beartype"):
        typing.TYPE_CHECKING = True
        try:
            importlib.import_module("lerobot_pi0.model")
        finally:
            typing.TYPE_CHECKING = False
    jaxtyping.config.update("jaxtyping_disable", True)
    spec.loader.exec_module(package)


# Not in a hook: before those run, the conftest.py of a folder that pytest is given imports the package.
import_model_with_checked_shapes()
importlib.import_module("cached_comments")

# What takes longest starts first, so that no worker has one of these left when the others are done.
LONGEST = (
    "simulated_robot/test_commands.py",
    "benchmarks/test_bench.py",
    "tools/test_plan.py",
    "tools/test_doctor.py",
    "control/test_rollout.py",
    "policy/test_entry_points.py",
    "checkpoints/test_adapters.py",
    "training/test_distributed.py",
    "training/test_training.py",
    "training/test_resume.py",
    "training/test_compilation.py",
    "checkpoints/test_hub.py",
    "demo/test_environment.py",
    "demo/test_record.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    order = {folder / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command sets up logging for its process, which here goes on with other tests."""
    ours = logging.getLogger("lerobot_pi0")
    handlers, level, propagates = list(ours.handlers), ours.level, ours.propagate
    yield
    ours.handlers[:], ours.propagate = handlers, propagates
    ours.setLevel(level)
