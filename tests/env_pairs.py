"""A policy that fits a simulator, and the doctor's findings about both."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lerobot.datasets import LeRobotDataset
from lerobot.envs import EnvConfig
from tiny_policy import tiny_config

from lerobot_pi0.inputs.dataset import DatasetFlags, fit_to
from lerobot_pi0.tools.doctor.checks import CHECKS, examine
from lerobot_pi0.tools.doctor.finding import Severity
from lerobot_pi0.tools.doctor.inputs import Inputs

OF_ENVIRONMENT = [check for check in CHECKS if check.area == "environment"]


def write(root: Path, features: Mapping[str, Any], fps: int, episodes: Sequence[Sequence[dict]]) -> None:
    """Episodes as a dataset with pictures instead of videos, which are quicker to write."""
    features = {
        key: {**of, "dtype": "image" if of["dtype"] == "video" else of["dtype"]}
        for key, of in features.items()
    }
    dataset = LeRobotDataset.create("local/any", fps=fps, features=features, root=root, use_videos=False)
    for episode in episodes:
        for frame in episode:
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()


def inputs_of(root: Path, env: EnvConfig, like: Inputs | None = None, **changes: Any) -> Inputs:
    """A policy trained on a dataset, and an environment; that of `like` is not opened again."""
    inputs = Inputs(None, DatasetFlags("local/any", root), None, {}, env)
    metadata = inputs.metadata
    assert metadata is not None
    config = tiny_config(
        max_state_dim=32, max_action_dim=32, input_features={}, output_features={}, **changes
    )
    fit_to(config, metadata)
    inputs.__dict__.update(checkpoint=(config, Path()), statistics=metadata.stats, rename_map={})
    if like is not None:
        inputs.__dict__.update(opened_env=like.opened_env, columns=like.columns)
    return inputs


def found(inputs: Inputs) -> dict[str, str]:
    """What the doctor finds wrong with the environment, by the name of the check."""
    return {
        of.check.look.__name__: f"{of.finding.what}. {of.finding.evidence}"
        for of in examine(inputs, OF_ENVIRONMENT)
        if of.finding.severity in (Severity.WARNING, Severity.ERROR)
    }
