"""A dataset of four short episodes with two instructions, and a checkpoint of a tiny policy for its robot."""

from pathlib import Path

import numpy as np
from lerobot.datasets import LeRobotDataset
from tiny_policy import ACTION, FRONT, STATE, statistics, tiny_policy

from lerobot_pi0.processor_pi0 import make_lerobot_pi0_pre_post_processors

TASKS = ("open the faucet", "close the faucet")
FRAMES = 12  # of each episode


def make_dataset(root: Path) -> Path:
    """Slow movements, pictures of noise; two episodes of each task."""
    features = {
        FRONT: {"dtype": "image", "shape": (48, 64, 3), "names": ["height", "width", "channels"]},
        "observation.state": {
            "dtype": "float32",
            "shape": (STATE,),
            "names": [f"joint_{i}" for i in range(STATE)],
        },
        "action": {"dtype": "float32", "shape": (ACTION,), "names": ["lift", "turn", "reach", "gripper"]},
    }
    dataset = LeRobotDataset.create("local/tiny", fps=10, features=features, root=root, use_videos=False)
    generator = np.random.default_rng(0)
    for task in (*TASKS, *TASKS):
        state = generator.standard_normal(STATE).astype(np.float32)
        for _ in range(FRAMES):
            state = state + 0.02 * generator.standard_normal(STATE).astype(np.float32)
            dataset.add_frame(
                {
                    FRONT: generator.integers(0, 256, (48, 64, 3), dtype=np.uint8),
                    "observation.state": state,
                    "action": state[:ACTION] * 1.01,
                    "task": task,
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root


def make_checkpoint(folder: Path) -> Path:
    """Random weights, and the processors that they need."""
    policy = tiny_policy()
    policy.save_pretrained(folder)
    for pipeline in make_lerobot_pi0_pre_post_processors(policy.config, statistics()):
        pipeline.save_pretrained(folder)
    return folder
