"""The README says what is so: commands are read by their programs, code runs, links lead somewhere."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from shipped_configs import read_training_config
from tiny_policy import tiny_config

from lerobot_pi0 import Pi0Config, Pi0Policy
from lerobot_pi0.processor_pi0 import make_lerobot_pi0_pre_post_processors

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_training_command_is_read_by_lerobots_parser(monkeypatch):
    (command,) = [block for block in blocks("bash") if block.startswith("lerobot-train")]
    monkeypatch.setattr("sys.argv", [*shlex.split(command.replace("\\\n", " ")), "--policy.device=cpu"])
    config: Any = cast(Callable[[], Any], read_training_config)()
    assert isinstance(config.policy, Pi0Config)
    assert str(config.policy.pretrained_path) == "lerobot/pi0_base"
    assert config.dataset.repo_id


def test_the_python_example_runs(tmp_path, monkeypatch):
    (code,) = blocks("python")
    features = {
        "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 128, 128)),
        "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
    }
    config = tiny_config(chunk_size=16, n_action_steps=4, input_features=features)
    (folder,) = re.findall(r'^folder = "(.*)"$', code, flags=re.MULTILINE)
    policy = Pi0Policy(config)
    one = {"mean": [0.0] * 4, "std": [1.0] * 4}
    pre, post = make_lerobot_pi0_pre_post_processors(config, {"observation.state": one, "action": one})
    for saved in (policy, pre, post):
        saved.save_pretrained(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["chunk"].shape == (1, 16, 4)
    assert torch.isfinite(names["chunk"]).all()
    assert len(code.strip().splitlines()) <= 14


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`(pytest [^`]*)`", README))))
def test_every_test_that_the_readme_names_exists(command):
    words = shlex.split(command)
    (path,) = [word for word in words if word.endswith(".py")]
    names = re.findall(r"^def (test_\w+)", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
    word = words[words.index("-k") + 1] if "-k" in words else ""
    assert any(word in name for name in names), f"{word!r} is in no name of {path}: {names}"


def test_links_into_the_repository_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_no_figure_is_left_out():
    assert re.findall(r"@\w+@", README) == []
