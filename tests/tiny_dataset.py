"""Datasets of four short episodes with two instructions: one on disk, with a checkpoint of a tiny policy for
its robot, and one as the tools read it, smoother and without pictures."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from lerobot.datasets import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from tiny_policy import ACTION, FRONT, STATE, statistics, tiny_policy

from lerobot_pi0.tools.open_loop import Recording

TASKS = ("open the faucet", "close the faucet")
FRAMES = 12  # of each episode on disk

LENGTH, EPISODES = 30, 4
JOINTS = ["lift", "turn", "gripper"]


type Episode = tuple[str, np.ndarray, np.ndarray]  # instruction, states (frames, any), actions (frames, any)


def write_dataset(
    root: Path,
    episodes: Iterable[Episode],
    state: Sequence[str],
    action: Sequence[str],
    *,
    repo_id: str = "local/tiny",
    fps: int = 20,
    cameras: Sequence[str] = (FRONT,),
    size: tuple[int, int] = (48, 64),
) -> LeRobotDataset:
    """Episodes of these joints on disk, with pictures of noise."""
    features = {
        camera: {"dtype": "image", "shape": (*size, 3), "names": ["height", "width", "channels"]}
        for camera in cameras
    } | {
        "observation.state": {"dtype": "float32", "shape": (len(state),), "names": list(state)},
        "action": {"dtype": "float32", "shape": (len(action),), "names": list(action)},
    }
    dataset = LeRobotDataset.create(repo_id, fps=fps, features=features, root=root, use_videos=False)
    generator = np.random.default_rng(0)
    for task, states, actions in episodes:
        for now, next_ in zip(states.astype(np.float32), actions.astype(np.float32), strict=True):
            pictures = generator.integers(0, 256, (len(cameras), *size, 3), dtype=np.uint8)
            frame = {"observation.state": now, "action": next_, "task": task}
            dataset.add_frame(dict(zip(cameras, pictures, strict=True)) | frame)
        dataset.save_episode()
    dataset.finalize()
    return dataset


def noise_episodes(tasks: Iterable[str], frames: int, state: int, action: int) -> Iterator[Episode]:
    """States and actions are noise too."""
    generator = np.random.default_rng(1)
    for task in tasks:
        yield task, generator.standard_normal((frames, state)), generator.standard_normal((frames, action))


def make_dataset(root: Path) -> Path:
    """Slow movements, each task's from a place of its own; two episodes of each."""
    generator = np.random.default_rng(0)
    starts = dict(zip(TASKS, generator.standard_normal((2, STATE)), strict=True))
    episodes = []
    for task in (*TASKS, *TASKS):
        path = starts[task] + 0.02 * generator.standard_normal((FRAMES, STATE)).cumsum(0)
        episodes.append((task, path, path[:, :ACTION] * 1.01))
    joints = [f"joint_{i}" for i in range(STATE)]
    write_dataset(root, episodes, joints, ["lift", "turn", "reach", "gripper"], fps=10)
    return root


def make_checkpoint(folder: Path, model: str = "pi0") -> Path:
    """Random weights, and the processors that they need."""
    policy = tiny_policy(model)
    policy.save_pretrained(folder)
    for pipeline in make_pre_post_processors(policy.config, dataset_stats=statistics()):
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
