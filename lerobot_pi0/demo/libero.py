"""LIBERO's objects that are put into a basket (libero_object), as a suite of the demo.

A task is called by its object. Evaluation is LeRobot's own `--env.type=libero` in LIBERO's initial states
from number 0 on; demonstrations begin in RECORDED_STATES. What LeRobot's environment cannot do, moved objects
and other instructions, `--env.type=libero_varied` does.

LIBERO puts the object of a task in the same place in every initial state. A policy that learns from these
alone need not look, and need not read. So a demonstration moves object and basket, may ask for the object in
another task's scene, and begins anywhere: the expert acts unseen for a while, then the hand is pushed away,
and from there on the expert is recorded. Had the push been recorded, the chunks before it would hold the
expert's answer to what nobody could foresee.
"""

from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from lerobot_pi0.demo.libero_tasks import (
    ACTION_NAMES,
    CAMERAS,
    EPISODE_LENGTH,
    FPS,
    OTHERS,
    STATE_NAMES,
    SUITE_NAME,
    TASK_IDS,
    instruction,
)
from lerobot_pi0.demo.suites import Evaluation, Frame, Recording, Seconds, Suite, SuiteName, split_tasks

# Initial states of demonstrations; those before are for evaluation.
RECORDED_STATES = range(20, 50)
# Shares of demonstrations: in a scene of another task, if the object is there; with all in its place; that
# begin late; that begin with a push. Of the pushes: with fingers that close. A policy that has never seen an
# empty closed hand carries it to the basket.
ELSEWHERE, UNMOVED, LATE, PUSHED, CLOSING = 0.5, 0.25, 0.55, 0.85, 0.3
# The expert's steps before a late beginning, the steps of a push and its strength (as an action).
LATE_STEPS, PUSH_STEPS, PUSH = (0, 110), (4, 20), 1.2
# Where a push turns back, in metres: x, y, z.
LOW, HIGH = np.array([-0.32, -0.42, 0.04]), np.array([0.25, 0.42, 0.42])
# How far the second table of the evaluation moves objects, in metres, whatever was recorded.
MOVED = 0.05
# The expert's runs whose mean is the open-loop baseline.
BASELINE_RUNS = 10


class LiberoSuite(Suite):
    """Tasks of libero_object through LeRobot's own environment."""

    name: SuiteName = "libero"
    title = "LIBERO"
    fps = FPS
    robot_type = "libero_panda"
    package = "libero"
    install = "Install the extra: pip install 'lerobot_policy_pi0[libero]', or run make libero."
    preload = "lerobot_pi0.demo.libero_env"
    defaults = Recording(
        suite="libero",
        # Each stands in the scene of another of them too, so that a scene is recorded with several names.
        tasks="alphabet_soup,salad_dressing,ketchup,butter",
        episodes_per_task=168,
        repo_id="local/libero_demo",
        seed=0,
        image_size=96,
        noise=0.1,
        episode_length=EPISODE_LENGTH,
        after_success=12,
        moved=MOVED,
    )
    options = ("moved",)
    quick_tasks = "alphabet_soup,salad_dressing"
    # Making a scene takes as long as two episodes, and a call makes one for each scene that it draws.
    attempts_per_call = 30
    eval_episodes = 20
    eval_batch = 1
    # On an AMD EPYC, beside other work.
    seconds = Seconds(record=3800, train=3600, evaluate=2400, report=500)
    quick_seconds = Seconds(record=120, train=60, evaluate=180, report=60)
    reading = (
        "The open-loop baseline is the expert's average run in LIBERO's states, replayed without looking. "
        "With the object and the basket moved it falls; what is above it needs the cameras. Told the name "
        "of another object, a policy that follows its instruction leaves the task's object where it is."
    )

    def parse_tasks(self, tasks: str) -> list[str]:
        """Names of objects."""
        return split_tasks(tasks, TASK_IDS, SUITE_NAME, "alphabet_soup")

    def instruction(self, task: str) -> str:
        """LIBERO's sentence."""
        return instruction(task)

    def features(self, recording: Recording) -> dict[str, dict[str, Any]]:
        """Both cameras, as LeRobot's environment calls and turns them; its state and action."""
        from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

        size = (recording.image_size, recording.image_size, 3)
        return {
            **{
                f"{OBS_IMAGES}.{camera}": {
                    "dtype": "video",
                    "shape": size,
                    "names": ["height", "width", "channels"],
                }
                for camera in CAMERAS
            },
            OBS_STATE: {"dtype": "float32", "shape": (len(STATE_NAMES),), "names": list(STATE_NAMES)},
            ACTION: {"dtype": "float32", "shape": (len(ACTION_NAMES),), "names": list(ACTION_NAMES)},
        }

    def successes(self, task: str, recording: Recording, seeds: Iterable[int]) -> list[list[Frame]]:
        """Runs of the expert; a seed draws scene, initial state, places, beginning and disturbance."""
        from lerobot_pi0.demo.libero_env import Scene

        seeds_by_scene: dict[str, list[int]] = {}
        for seed in seeds:
            seeds_by_scene.setdefault(self._scene(task, recording, seed), []).append(seed)
        episodes = {}
        for name, its_seeds in seeds_by_scene.items():
            with closing(Scene(name, recording.image_size)) as scene:
                for seed in its_seeds:
                    random = np.random.default_rng((seed, 1))
                    if frames := _attempt(scene, name, task, recording, random):
                        episodes[seed] = frames
        return [episodes[seed] for seed in sorted(episodes)]

    def _scene(self, task: str, recording: Recording, seed: int) -> str:
        """The scene of an attempt: its task's, or that of another recorded task where its object stands."""
        random = np.random.default_rng((seed, 0))
        elsewhere = [other for other in self.parse_tasks(recording.tasks) if task in OTHERS[other]]
        return str(random.choice(elsewhere)) if elsewhere and random.random() < ELSEWHERE else task

    def evaluations(
        self, tasks: Sequence[str], recording: Recording, episode_length: int, n_action_steps: int
    ) -> list[Evaluation]:
        """LeRobot's own environment; objects and basket moved; the name of another object of the scene."""
        numbers = sorted(TASK_IDS[task] for task in tasks)
        shared = (
            f"--env.observation_height={recording.image_size}",
            f"--env.observation_width={recording.image_size}",
            f"--env.episode_length={episode_length}",
        )
        own = ("--env.type=libero", f"--env.task={SUITE_NAME}", "--env.hard_reset=false")
        # A policy looks when it plans: pictures in between would be drawn for nobody.
        varied = ("--env.type=libero_varied", f"--env.steps_per_picture={n_action_steps}")
        in_order = tuple(sorted(tasks, key=TASK_IDS.__getitem__))
        evaluations = [
            Evaluation(
                "evaluate",
                "success",
                "success in LIBERO's initial states that were not recorded from",
                in_order,
                (*own, f"--env.task_ids={numbers}", *shared),
            ),
            Evaluation(
                "evaluate_moved",
                "moved",
                f"success with the object and the basket moved by up to {100 * MOVED:.0f} cm along x and y",
                in_order,
                (*varied, f"--env.task_ids={numbers}", *shared, f"--env.moved={MOVED}"),
                moved=MOVED,
            ),
        ]
        if scenes := tuple(task for task in in_order if set(OTHERS[task]) & set(tasks)):
            evaluations.append(
                Evaluation(
                    "evaluate_swapped",
                    "another object's name",
                    "the task's object in the basket although another object of the scene is asked for",
                    scenes,
                    (
                        *varied,
                        f"--env.task_ids={[TASK_IDS[scene] for scene in scenes]}",
                        *shared,
                        f"--env.instruction_of={','.join(tasks)}",
                    ),
                    has_baseline=False,
                )
            )
        return evaluations

    def task_name(self, task_group: str, task_id: int) -> str:
        """The object of a task's number."""
        del task_group
        return list(TASK_IDS)[task_id]

    def replay(
        self, evaluation: Evaluation, task: str, actions: np.ndarray, episodes: int, episode_length: int
    ) -> list[bool]:
        """Without a camera, in the initial states from number 0 on."""
        from lerobot_pi0.demo.libero_env import Scene, reset_evaluated

        solved = []
        with closing(Scene(task)) as scene:
            for episode in range(episodes):
                reset_evaluated(scene, task, episode, evaluation.moved)
                for step in range(episode_length):
                    scene.step(actions[min(step, len(actions) - 1)])
                    if scene.solved(task):
                        break
                solved.append(scene.solved(task))
        return solved

    def baseline_runs(self, task: str, demonstrations: Path) -> list[np.ndarray]:
        """Demonstrations begin anywhere, so the expert runs again in LIBERO's own states, undisturbed."""
        del demonstrations
        from lerobot_pi0.demo.libero_env import Scene, expert_action

        runs = []
        with closing(Scene(task)) as scene:
            for number in RECORDED_STATES[:BASELINE_RUNS]:
                scene.reset(scene.initial_states[number])
                actions: list[np.ndarray] = []
                while not scene.solved(task) and len(actions) < EPISODE_LENGTH:
                    actions.append(expert_action(scene, task))
                    scene.step(actions[-1])
                runs.append(np.stack(actions))
        return runs


def _attempt(
    scene: Any, name: str, task: str, recording: Recording, random: np.random.Generator
) -> list[Frame]:
    """Frames of one run of the expert; none if it fails.

    Args:
        scene: the `Scene` called `name`.
        task: the object that is asked for.
    """
    from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

    from lerobot_pi0.demo.libero_env import expert_action

    state = scene.initial_states[random.choice(RECORDED_STATES)]
    if recording.moved and (name != task or random.random() >= UNMOVED):
        scene.reset_moved(state, task, recording.moved, random)
    else:
        scene.reset(state)
    if random.random() < LATE:
        for _ in range(random.integers(*LATE_STEPS)):
            scene.step(expert_action(scene, task))
    if random.random() < PUSHED:
        gripper = [1.0] if random.random() < CLOSING else expert_action(scene, task)[6:]
        push = random.uniform(-PUSH, PUSH, 3)
        for _ in range(random.integers(*PUSH_STEPS)):
            push = np.where(scene.hand < LOW, abs(push), np.where(scene.hand > HIGH, -abs(push), push))
            scene.step(np.concatenate([push, np.zeros(3), gripper]))
    run: list[tuple[Any, np.ndarray, np.ndarray]] = []
    success = scene.solved(task)
    if success:  # before the recording began
        return []
    left = recording.after_success
    while left >= 0:
        if not success and len(run) >= recording.episode_length:
            return []
        action = expert_action(scene, task)
        run.append((scene.moment(), scene.state(), action))
        scene.step(action + np.append(random.normal(0.0, recording.noise, 3), np.zeros(4)))
        success |= scene.solved(task)
        left -= success
    # Drawn last: pictures take most of the time, and a third of the runs fail.
    return [
        {
            **{f"{OBS_IMAGES}.{camera}": picture for camera, picture in scene.pictures(moment).items()},
            OBS_STATE: state,
            ACTION: action,
            "task": instruction(task),
        }
        for moment, state, action in run
    ]


SUITE = LiberoSuite()
