"""Datasets with other names than LeRobot's: what the error advises works."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from tiny_policy import tiny_config

from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.dataset import fit_to

DOCUMENT = Path(__file__).parents[2] / "docs" / "finetuning.md"
HEADING = "Datasets with other names"


def test_openpis_names_are_refused_with_the_section_that_helps():
    config = tiny_config(output_features={"actions": PolicyFeature(FeatureType.ACTION, (4,))})
    with pytest.raises(UserError, match=rf"needs 'action'.*docs/finetuning.md .*{HEADING}"):
        config.validate_features()
    assert f"### {HEADING}" in DOCUMENT.read_text("utf-8")


def test_the_script_writes_a_dataset_that_the_policy_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = {"dtype": "image", "shape": (24, 32, 3), "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "shape": (4,), "names": list("abcd")}
    features = {"image": picture, "wrist_image": picture, "state": vector, "actions": vector}
    old = LeRobotDataset.create("user/old", fps=10, features=features, root="data/old", use_videos=False)
    generator = np.random.default_rng(0)
    for length in (3, 2):
        for _ in range(length):
            frame = {name: generator.integers(0, 256, (24, 32, 3), np.uint8) for name in list(features)[:2]}
            frame |= {name: generator.random(4, np.float32) for name in list(features)[2:]}
            old.add_frame(frame | {"task": "reach"})
        old.save_episode()
    old.finalize()
    section = DOCUMENT.read_text("utf-8").partition(f"### {HEADING}")[2]
    exec(section.split("```python\n")[1].split("```")[0], {})
    assert json.loads(Path("data/new/meta/info.json").read_text())["total_episodes"] == 2
    config = tiny_config()
    fit_to(config, LeRobotDatasetMetadata("user/new", Path("data/new")))
    slots = {"base": "observation.images.image", "left_wrist": "observation.images.wrist_image"}
    assert config.cameras == slots
    before: Any = LeRobotDataset("user/old", root="data/old")
    after: Any = LeRobotDataset("user/new", root="data/new")
    for i in range(5):
        assert before[i]["state"].equal(after[i]["observation.state"])
        assert before[i]["actions"].equal(after[i]["action"])
        assert before[i]["wrist_image"].equal(after[i]["observation.images.wrist_image"])
