"""The open-loop baseline: a task's average demonstration, replayed without observations.

Many Meta-World tasks can be solved this way, because objects lie at nearly the same place in each episode. A
policy's success rate shows that it uses its observations only where it is above this one.
"""

from pathlib import Path

import numpy as np
from lerobot.utils.constants import ACTION
from tqdm import tqdm

from lerobot_pi0.demo.metaworld import task_instructions


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


def recorded_actions(root: Path, task: str) -> list[np.ndarray]:
    """The actions (steps, action dim) of each demonstration of a task in the dataset at `root`."""
    from datasets import disable_progress_bars, load_dataset
    from lerobot.datasets import LeRobotDatasetMetadata

    metadata = LeRobotDatasetMetadata("local/demonstrations", root=root)
    index = metadata.get_task_index(task_instructions()[task])
    disable_progress_bars()  # LeRobot has just enabled them
    frames = load_dataset("parquet", data_files=f"{root}/data/**/*.parquet", split="train").with_format(
        "numpy"
    )
    mine = frames["task_index"][:] == index
    actions, episodes = np.stack(frames[ACTION][:])[mine], frames["episode_index"][:][mine]
    return [actions[episodes == episode] for episode in np.unique(episodes)]


def open_loop_success(task: str, demonstration: np.ndarray, seeds: range, episode_length: int) -> float:
    """The share of episodes, one per seed, that the replayed demonstration (steps, 4) solves.

    After its last step the last action is repeated up to `episode_length`.
    """
    from lerobot_pi0.demo.metaworld_env import Simulation

    simulation = Simulation(task)
    solved = 0
    for seed in tqdm(seeds, desc=f"Open-loop baseline {task}", unit="episode", leave=False):
        simulation.reset(seed)
        for step in range(episode_length):
            _, success = simulation.step(demonstration[min(step, len(demonstration) - 1)])
            if success:
                solved += 1
                break
    return solved / len(seeds)
