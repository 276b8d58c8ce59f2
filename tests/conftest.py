"""What holds for every test: no network, software rendering, few threads, shapes checked in `model/`.

pytest imports this file before any test module: the environment is set, and the hook that checks the shapes
in signatures is in place, before LeRobot, MuJoCo or the package are imported.
"""

import importlib.util
import logging
import os
import sys
import typing
from collections.abc import Iterator

import beartype  # before the switch below, which is meant for our modules alone
import pytest
import torch
from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")

torch.set_num_threads(min(2, torch.get_num_threads()))


def import_model_with_checked_shapes() -> None:
    """Import `lerobot_pi0.model` so that every call of it checks the shapes in its signatures.

    The annotations are imported for type checkers only, so for that long this is one. The package around it
    is run afterwards, as everybody else runs it: `model/` needs torch alone.
    """
    spec = importlib.util.find_spec("lerobot_pi0")
    assert spec is not None
    assert spec.loader is not None
    package = sys.modules["lerobot_pi0"] = importlib.util.module_from_spec(spec)
    with install_import_hook("lerobot_pi0.model", f"{beartype.__name__}.beartype"):
        typing.TYPE_CHECKING = True
        try:
            importlib.import_module("lerobot_pi0.model")
        finally:
            typing.TYPE_CHECKING = False
    spec.loader.exec_module(package)


import_model_with_checked_shapes()


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command sets up logging for its process, which here goes on with other tests."""
    ours = logging.getLogger("lerobot_pi0")
    handlers, level, propagates = list(ours.handlers), ours.level, ours.propagate
    yield
    ours.handlers[:], ours.propagate = handlers, propagates
    ours.setLevel(level)
