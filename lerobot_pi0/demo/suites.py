"""Suites of the demo: a simulator with its tasks, its scripted experts and the evaluations that it allows.

A suite is one module of this folder that ends in an object `SUITE`. Everything else of the demo is shared and
knows suites by `Suite` alone. To add one, write the module and name it in `MODULES` and `SuiteName`.

The flags import the modules of all suites, and plugin discovery imports some: they import neither torch, nor
LeRobot, nor a simulator at their top. Those are imported by the methods that need them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lerobot_pi0.errors import UserError

SuiteName = Literal["metaworld", "libero", "aloha"]
MODULES: dict[SuiteName, str] = {
    "metaworld": "lerobot_pi0.demo.metaworld",
    "libero": "lerobot_pi0.demo.libero",
    "aloha": "lerobot_pi0.demo.aloha",
}

# A frame of an episode, as `LeRobotDataset.add_frame` takes it, with its instruction under "task".
Frame = dict[str, Any]

# Seed of the first evaluated episode, lerobot-eval's default; the episodes after it count up. Demonstrations
# begin far above, so that the evaluated scenes are new.
EVALUATION_SEED = 1000

# Settings of `Recording` that only some suites have, and their value where a suite does not have them.
OPTIONS: dict[str, Any] = {"show_goal": False, "position_actions": False, "moved": 0.0}


@dataclass(frozen=True)
class Recording:
    """Everything that determines the recorded frames. `RecordConfig` explains the fields."""

    suite: SuiteName
    tasks: str  # names, separated by commas
    episodes_per_task: int
    repo_id: str
    seed: int
    image_size: int
    noise: float
    episode_length: int
    after_success: int
    show_goal: bool = False
    position_actions: bool = False
    moved: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (
            ("episodes_per_task", 1),
            ("episode_length", 1),
            ("image_size", 32),  # the AV1 encoder brings the process down below
        ):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, not {getattr(self, name)}.")
        for name in ("noise", "after_success", "moved"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must not be negative, but is {getattr(self, name)}.")

    def settings(self) -> dict[str, Any]:
        """What is written beside the dataset: the fields that the suite has."""
        options = load_suite(self.suite).options
        absent = OPTIONS.keys() - set(options)
        return {name: value for name, value in asdict(self).items() if name not in absent}


@dataclass(frozen=True)
class Evaluation:
    """One run of lerobot-eval."""

    name: str  # of its folder: "evaluate", "evaluate_swapped", ...
    column: str  # its heading in the table: "success", "opposite instruction", ...
    meaning: str  # what the column shows, in a sentence
    tasks: tuple[str, ...]  # in the order in which lerobot-eval runs them
    flags: tuple[str, ...]  # of lerobot-eval: --env.*
    # Whether its tasks are to be solved: then the open-loop baseline is computed in its episodes, too.
    has_baseline: bool = True
    # How far its objects are moved, as in `Recording`; for `Suite.replay`.
    moved: float = 0.0


class Seconds(NamedTuple):
    """How long the demo's stages take on two cores."""

    record: int
    train: int
    evaluate: int
    report: int


class Suite(ABC):
    """A simulator for the demo.

    An object of a class at the top level of its module, which worker processes receive pickled.
    """

    name: SuiteName
    title: str  # as in "A small π0 in Meta-World"
    fps: int  # of the recording
    robot_type: str
    # The importable package of the simulator, and what to type when it is not there.
    package: str
    install: str
    # The module that worker processes import once, before they are forked: the simulator.
    preload: str

    defaults: Recording
    # Which of `OPTIONS` this suite has.
    options: tuple[str, ...] = ()
    # The quick demo records and evaluates these tasks; its evaluated episodes have so many steps.
    quick_tasks: str
    quick_episode_length: int = 20

    # Attempts of one call of `successes`: many where a simulation takes long to make.
    attempts_per_call: int = 10
    # Evaluated episodes of each task, and how many of them share a pass of the policy.
    eval_episodes: int
    eval_batch: int
    # In full, and with --quick.
    seconds: Seconds
    quick_seconds: Seconds
    # A sentence or two for the page: how to read the open-loop baseline and the other columns here.
    reading: str

    @abstractmethod
    def parse_tasks(self, tasks: str) -> list[str]:
        """Split names, separated by commas, and check each. Works without the simulator.

        Raises:
            UserError: if a name is unknown (the known ones are listed), given twice, or if there is none.
        """

    @abstractmethod
    def instruction(self, task: str) -> str:
        """The sentence that the policy is given for a task. Works without the simulator."""

    @abstractmethod
    def features(self, recording: Recording) -> dict[str, dict[str, Any]]:
        """The dataset's features, as `LeRobotDataset.create` takes them. Works without the simulator."""

    @abstractmethod
    def successes(self, task: str, recording: Recording, seeds: Iterable[int]) -> list[list[Frame]]:
        """The frames of the episodes that the scripted expert solves, of one attempt per seed.

        Equal arguments give equal frames. Runs in a worker process, with up to `attempts_per_call` seeds.
        """

    @abstractmethod
    def evaluations(
        self, tasks: Sequence[str], recording: Recording, episode_length: int, n_action_steps: int
    ) -> list[Evaluation]:
        """The runs of lerobot-eval, the one for the tasks as instructed first.

        Args:
            tasks: those that were recorded.
            recording: how.
            episode_length: steps after which an episode counts as failed.
            n_action_steps: how many actions of a chunk the policy executes before it looks again.
        """

    def task_name(self, task_group: str, task_id: int) -> str:
        """The task of an entry of lerobot-eval's `eval_info.json`."""
        del task_id
        return task_group

    def baseline_runs(self, task: str, demonstrations: Path) -> list[Any]:
        """The runs whose average is the open-loop baseline: the actions of each, (steps, action dim).

        Args:
            task: one of the recorded ones.
            demonstrations: the recorded dataset's root; its episodes are the runs, unless a suite has others.
        """
        from lerobot_pi0.demo.baseline import recorded_actions

        return recorded_actions(demonstrations, self.instruction(task))

    @abstractmethod
    def replay(
        self, evaluation: Evaluation, task: str, actions: Any, episodes: int, episode_length: int
    ) -> list[bool]:
        """The open-loop baseline: whether fixed actions solve the evaluated episodes.

        Args:
            evaluation: one of `evaluations`, whose flags say how its scenes are made.
            task: one of its tasks.
            actions: the mean of `baseline_runs`, (steps, action dim). After its end the last one is repeated.
            episodes: how many; lerobot-eval's first has seed `EVALUATION_SEED`.
            episode_length: steps after which an episode counts as failed.
        """

    def check_installed(self) -> None:
        """Raises UserError, which says how to install the simulator, if it is not there."""
        if find_spec(self.package) is None:
            raise UserError(f"--suite={self.name}: {self.title} is not installed. {self.install}")


@cache
def load_suite(name: SuiteName) -> Suite:
    """The suite of this name."""
    return import_module(MODULES[name]).SUITE


def split_tasks(tasks: str, known: Iterable[str], title: str, example: str) -> list[str]:
    """Split names, separated by commas, and check them: the usual `Suite.parse_tasks`.

    Raises:
        UserError: if a name is unknown (the known ones are listed), given twice, or if there is none.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    known = sorted(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"Unknown {title} task{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}. "
            f"Known tasks: {', '.join(known)}."
        )
    if not names:
        raise UserError(f"No {title} task given. Name at least one, for example {example}.")
    if len(set(names)) < len(names):
        raise UserError(f"A task is named twice in {tasks!r}; name each task once.")
    return names
