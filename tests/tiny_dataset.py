"""Datasets of four short episodes with two instructions: one on disk, with a checkpoint of a tiny policy for
its robot, and one as the tools read it, smoother and without pictures."""

from pathlib import Path

import numpy as np
from lerobot.datasets import LeRobotDataset
from tiny_policy import ACTION, FRONT, STATE, statistics, tiny_policy

from lerobot_pi0.processor_pi0 import make_lerobot_pi0_pre_post_processors
from lerobot_pi0.tools.open_loop import Recording

TASKS = ("open the faucet", "close the faucet")
FRAMES = 12  # of each episode on disk

LENGTH, EPISODES = 30, 4
JOINTS = ["lift", "turn", "gripper"]


def make_dataset(root: Path) -> Path:
    """Slow movements, each task's from a place of its own, and pictures of noise; two episodes of each."""
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
    starts = dict(zip(TASKS, generator.standard_normal((2, STATE)).astype(np.float32), strict=True))
    for task in (*TASKS, *TASKS):
        state = starts[task]
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


def recorded() -> Recording:
    """Four episodes of two tasks, smooth and each its own, whose gripper closes in the middle."""
    generator, at = np.random.default_rng(0), np.arange(LENGTH)
    actions = []
    for _ in range(EPISODES):
        phase, speed = generator.uniform(0, 2 * np.pi), generator.uniform(0.2, 0.4)
        gripper = np.where(at < LENGTH // 2, 0.0, 100.0)
        actions.append(np.stack((10 * np.sin(phase + speed * at), np.cos(phase + speed * at), gripper), 1))
    joined = np.concatenate(actions).astype(np.float32)
    return Recording(
        index=np.arange(len(joined)),
        actions=joined,
        states=np.roll(joined, 1, axis=0),
        episode=np.repeat(np.arange(EPISODES), LENGTH),
        task=np.repeat([0, 0, 1, 1], LENGTH),
        instructions={0: "lift", 1: "turn"},
        joints=JOINTS,
        displaces=np.zeros(len(JOINTS), bool),
        mean=joined.mean(0),
        scale=joined.std(0),
        fps=10,
    )
