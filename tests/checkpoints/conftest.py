"""Checkpoints that several modules load."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tiny_policy import tiny_policy

from lerobot_pi0.checkpoints.layouts import to_openpi


@pytest.fixture
def model(request) -> str:
    """π0, or what a test is parametrized by (`indirect`)."""
    return getattr(request, "param", "pi0")


@pytest.fixture
def published(tmp_path, model) -> Path:
    """The tiny policy's weights in openpi's layout, with LeRobot's config of another policy type beside."""
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(to_openpi(tiny_policy(model).model.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"type": model}))
    return folder
