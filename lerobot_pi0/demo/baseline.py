"""The open-loop baseline: a task's average demonstration, replayed without observations.

Many tasks can be solved this way, because objects lie at nearly the same place in each episode. A policy's
success rate shows that it uses its observations only where it is above this one.
"""

from pathlib import Path

import numpy as np
from lerobot.utils.constants import ACTION


def mean_demonstration(actions: list[np.ndarray]) -> np.ndarray:
    """Average demonstrations step by step.

    Args:
        actions: of each demonstration, (steps, action dim); the lengths differ.

    Returns:
        (longest, action dim): at each step the mean over the demonstrations that are still going on.
    """
    longest = max(len(episode) for episode in actions)
    return np.stack(
        [
            np.mean([episode[step] for episode in actions if step < len(episode)], axis=0)
            for step in range(longest)
        ]
    )


def recorded_actions(root: Path, instruction: str) -> list[np.ndarray]:
    """The actions (steps, action dim) of each demonstration with an instruction in the dataset at `root`."""
    from datasets import disable_progress_bars, load_dataset
    from lerobot.datasets import LeRobotDatasetMetadata

    metadata = LeRobotDatasetMetadata("local/demonstrations", root=root)
    index = metadata.get_task_index(instruction)
    disable_progress_bars()  # LeRobot has just enabled them
    frames = load_dataset("parquet", data_files=f"{root}/data/**/*.parquet", split="train").with_format(
        "numpy"
    )
    mine = frames["task_index"][:] == index
    actions, episodes = np.stack(frames[ACTION][:])[mine], frames["episode_index"][:][mine]
    return [actions[episodes == episode] for episode in np.unique(episodes)]
