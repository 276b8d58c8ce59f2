"""`lerobot-pi0 record`: a suite's scripted experts become demonstrations in a LeRobotDataset.

Failed episodes are not kept. Equal settings give equal demonstrations.
"""

import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import batched
from pathlib import Path

from tqdm import tqdm

from lerobot_pi0.demo.flags import RecordConfig
from lerobot_pi0.demo.suites import OPTIONS, Frame, Recording, load_suite
from lerobot_pi0.errors import CommandError, OutputExistsError

logger = logging.getLogger(__name__)

# The built-in `map`, or one whose calls run side by side and whose results keep their order.
type Map = Callable[
    [Callable[[Iterable[int]], list[list[Frame]]], Iterable[Iterable[int]]], Iterable[list[list[Frame]]]
]

# Where the settings of a finished recording are kept, below the dataset's root.
SETTINGS_FILE = Path("meta", "recording.json")
# An expert that fails this often is not worth waiting for.
MAX_TRIES_PER_EPISODE = 5


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
    load_suite(config.suite).check_installed()
    import av
    import datasets
    from lerobot.datasets import LeRobotDataset

    # Each episode would bring a screenful of the encoder's settings and a progress bar of its own.
    os.environ.setdefault("SVT_LOG", "1")
    av.logging.set_libav_level(av.logging.ERROR)
    datasets.disable_progress_bars()

    recording, suite = config.recording(), load_suite(config.suite)
    partial = config.root.with_name(config.root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    dataset = LeRobotDataset.create(
        repo_id=recording.repo_id,
        root=partial,
        fps=suite.fps,
        robot_type=suite.robot_type,
        features=suite.features(recording),
        streaming_encoding=True,
        # An episode arrives at once, and the encoder drops what does not fit into its queue.
        encoder_queue_maxsize=recording.episode_length + recording.after_success + 1,
    )
    tasks = suite.parse_tasks(recording.tasks)
    # What the workers need is imported once, in a process without this one's threads and OpenGL.
    workers = multiprocessing.get_context("forkserver")
    workers.set_forkserver_preload([__name__, suite.preload])
    with (
        workers.Pool(min(os.cpu_count() or 1, 4)) as pool,
        tqdm(total=len(tasks) * recording.episodes_per_task, unit="episode") as progress,
    ):
        for task in tasks:
            progress.set_description(f"Recording {task}")
            for episode in demonstrations(task, recording, pool.imap):
                for frame in episode:
                    dataset.add_frame(frame)
                dataset.save_episode()
                progress.update()
    dataset.finalize()
    (partial / SETTINGS_FILE).write_text(json.dumps(recording.settings(), indent=2) + "\n", encoding="utf-8")
    partial.rename(config.root)
    return config.root


def is_recorded(config: RecordConfig, flag: str = "--root") -> bool:
    """Whether the finished recording is at `config.root`, a folder that the user chooses by `flag`.

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
            f"Choose another folder with {flag}."
        ) from None
    # A recording of an earlier version lacks the settings that came later.
    recording = config.recording()
    recorded = asdict(load_suite(recorded.get("suite", "metaworld")).defaults) | OPTIONS | recorded
    differing = [
        f"--{name}={recorded[name]}"
        for name, value in recording.settings().items()
        if recorded[name] != value
    ]
    if differing:
        raise OutputExistsError(
            f"{config.root} holds a recording with other settings ({' '.join(differing)}). "
            f"Choose another folder with {flag}, or delete that one."
        )
    return True


def demonstrations(task: str, recording: Recording, run: Map = map) -> Iterator[list[Frame]]:
    """Yield `recording.episodes_per_task` successful episodes of a task, as lists of frames for `add_frame`.

    They are those of the first seeds that succeed, whatever `run` does side by side.
    """
    suite = load_suite(recording.suite)
    max_tries = MAX_TRIES_PER_EPISODE * recording.episodes_per_task
    found = tries = 0
    while missing := min(recording.episodes_per_task - found, max_tries - tries):
        seeds = range(recording.seed + tries, recording.seed + tries + missing)
        calls = batched(seeds, suite.attempts_per_call)
        for episodes in run(partial(suite.successes, task, recording), calls):
            yield from episodes
            found += len(episodes)
        tries += missing
    if found < recording.episodes_per_task:
        raise CommandError(
            f"The scripted expert solved {task} only {found} times in {max_tries} tries with "
            f"--noise={recording.noise} and --episode_length={recording.episode_length}. "
            "Lower the former or raise the latter."
        )


def main(config: RecordConfig) -> str:
    """`lerobot-pi0 record`: records, and says what there is."""
    root = record(config)
    info = json.loads((root / "meta" / "info.json").read_text(encoding="utf-8"))
    return f"demonstrations: {info['total_episodes']}, frames: {info['total_frames']}, in {root}"
