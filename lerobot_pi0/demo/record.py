"""`lerobot-pi0 record`: Meta-World's scripted experts become demonstrations in a LeRobotDataset.

The expert's action is disturbed before it is executed and written down undisturbed (DART, Laskey et al.
2017): the dataset visits states beside the expert's path and says how to come back from there. Failed
episodes are not kept. Equal settings give equal demonstrations.
"""

import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE
from tqdm import tqdm

from lerobot_pi0.demo.flags import RecordConfig
from lerobot_pi0.demo.metaworld import (
    ACTION_NAMES,
    FPS,
    POSITION_NAMES,
    STATE_NAMES,
    parse_tasks,
    task_instructions,
)
from lerobot_pi0.errors import CommandError, OutputExistsError

logger = logging.getLogger(__name__)

Frame = dict[str, Any]
# The built-in `map`, or one whose calls run side by side and whose results keep their order.
type Map = Callable[
    [Callable[[Iterable[int]], list[list[Frame]]], Iterable[Iterable[int]]], Iterable[list[list[Frame]]]
]

# Where the settings of a finished recording are kept, below the dataset's root.
SETTINGS_FILE = Path("meta", "recording.json")
# An expert that fails this often is not worth waiting for.
MAX_TRIES_PER_EPISODE = 5
# Making an environment takes half as long as an episode in it.
SEEDS_PER_ENVIRONMENT = 10


def record(config: RecordConfig) -> Path:
    """Record the dataset at `config.root`, unless it is there already.

    The dataset appears at its place when it is complete; an interrupted recording leaves `<root>.partial`,
    which the next one replaces.

    Returns:
        The dataset's root.

    Raises:
        FileExistsError: if something else is at `config.root`.
        RuntimeError: if an expert fails too often.
    """
    if is_recorded(config):
        logger.info("Reusing the demonstrations in %s.", config.root)
        return config.root
    import av
    import datasets
    from lerobot.datasets import LeRobotDataset

    # Each episode would bring a screenful of the encoder's settings and a progress bar of its own.
    os.environ.setdefault("SVT_LOG", "1")
    av.logging.set_libav_level(av.logging.ERROR)
    datasets.disable_progress_bars()

    partial = config.root.with_name(config.root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    size = (config.image_size, config.image_size, 3)
    action_names = POSITION_NAMES if config.position_actions else ACTION_NAMES
    dataset = LeRobotDataset.create(
        repo_id=config.repo_id,
        root=partial,
        fps=FPS,
        robot_type="metaworld_sawyer",
        features={
            # Video, not images: to read a chunk of actions, LeRobot would decode the image of each of its
            # steps. At 128 pixels and 16 actions, a training sample takes 2.6 ms from video and 7.6 ms from
            # images.
            OBS_IMAGE: {"dtype": "video", "shape": size, "names": ["height", "width", "channels"]},
            OBS_STATE: {"dtype": "float32", "shape": (len(STATE_NAMES),), "names": list(STATE_NAMES)},
            ACTION: {"dtype": "float32", "shape": (len(action_names),), "names": list(action_names)},
        },
        streaming_encoding=True,
        # An episode arrives at once, and the encoder drops what does not fit into its queue.
        encoder_queue_maxsize=config.episode_length + 1,
    )
    tasks = parse_tasks(config.tasks)
    # What the workers need is imported once, in a process without this one's threads and OpenGL.
    workers = multiprocessing.get_context("forkserver")
    workers.set_forkserver_preload([__name__, "lerobot_pi0.demo.metaworld_env"])
    with (
        workers.Pool(min(os.cpu_count() or 1, 4)) as pool,
        tqdm(total=len(tasks) * config.episodes_per_task, unit="episode") as progress,
    ):
        for task in tasks:
            progress.set_description(f"Recording {task}")
            for episode in demonstrations(task, config, pool.imap):
                for frame in episode:
                    dataset.add_frame(frame)
                dataset.save_episode()
                progress.update()
    dataset.finalize()
    (partial / SETTINGS_FILE).write_text(json.dumps(config.settings(), indent=2) + "\n", encoding="utf-8")
    partial.rename(config.root)
    return config.root


def is_recorded(config: RecordConfig) -> bool:
    """Whether the finished recording is at `config.root`.

    Raises:
        FileExistsError: if something is there that was not recorded with these settings.
    """
    if not config.root.exists():
        return False
    try:
        recorded = json.loads((config.root / SETTINGS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OutputExistsError(
            f"{config.root} exists but is not a recording of `lerobot-pi0 record`. "
            "Choose another folder with --root."
        ) from None
    differing = [
        f"--{name}={recorded.get(name)}"
        for name, value in config.settings().items()
        if recorded.get(name, getattr(RecordConfig, name)) != value
    ]
    if differing:
        raise OutputExistsError(
            f"{config.root} holds a recording with other settings ({' '.join(differing)}). "
            "Give these, choose another folder with --root, or delete that one."
        )
    return True


def demonstrations(task: str, config: RecordConfig, run: Map = map) -> Iterator[list[Frame]]:
    """Yield `config.episodes_per_task` successful episodes of a task, as lists of frames for `add_frame`.

    They are those of the first seeds that succeed, whatever `run` does side by side.
    """
    max_tries = MAX_TRIES_PER_EPISODE * config.episodes_per_task
    found = tries = 0
    while missing := min(config.episodes_per_task - found, max_tries - tries):
        seeds = range(config.seed + tries, config.seed + tries + missing)
        for episodes in run(partial(successes, task, config), batched(seeds, SEEDS_PER_ENVIRONMENT)):
            yield from episodes
            found += len(episodes)
        tries += missing
    if found < config.episodes_per_task:
        raise CommandError(
            f"The scripted expert solved {task} only {found} times in {max_tries} tries with "
            f"--noise={config.noise} and --episode_length={config.episode_length}. "
            "Lower the former or raise the latter."
        )


def successes(task: str, config: RecordConfig, seeds: Iterable[int]) -> list[list[Frame]]:
    """The frames of the episodes that the expert solves, of one per seed."""
    from lerobot_pi0.demo.metaworld_env import PER_METRE, MetaworldFastEnv, scripted_expert

    instruction = task_instructions()[task]
    env = MetaworldFastEnv(
        task,
        instruction,
        episode_length=config.episode_length,
        image_size=config.image_size,
        show_goal=config.show_goal,
    )
    episodes = []
    with closing(env):
        for seed in seeds:
            expert = scripted_expert(task)
            noise = np.random.default_rng(seed)
            observation, _ = env.reset(seed=seed)
            frames: list[Frame] = []
            success = truncated = False
            left = config.after_success
            while not truncated and (not success or left >= 0):
                action = expert(env.simulation.state)
                target = action
                if config.position_actions:
                    target = np.append(observation["agent_pos"][:3] + action[:3] / PER_METRE, action[3])
                frames.append(
                    {
                        OBS_IMAGE: observation["pixels"],
                        OBS_STATE: observation["agent_pos"],
                        ACTION: target.astype(np.float32),
                        "task": instruction,
                    }
                )
                disturbance = np.append(noise.normal(0.0, config.noise, 3), 0.0)
                observation, _, succeeded, truncated, _ = env.step(action + disturbance)
                success |= succeeded
                left -= success
            if success:
                episodes.append(frames)
    return episodes


def main(config: RecordConfig) -> str:
    """`lerobot-pi0 record`: records, and says what there is."""
    root = record(config)
    info = json.loads((root / "meta" / "info.json").read_text(encoding="utf-8"))
    return f"demonstrations: {info['total_episodes']}, frames: {info['total_frames']}, in {root}"
