"""Meta-World as a suite of the demo.

The expert's action is disturbed before it is executed and written down undisturbed (DART, Laskey et al.
2017): the dataset visits states beside the expert's path and says how to come back from there.
"""

from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from lerobot_pi0.demo.metaworld_tasks import (
    ACTION_NAMES,
    FPS,
    OPPOSITES,
    POSITION_NAMES,
    STATE_NAMES,
    parse_tasks,
    task_instructions,
)
from lerobot_pi0.demo.suites import (
    EVALUATION_SEED,
    Evaluation,
    Frame,
    Recording,
    Seconds,
    Suite,
    SuiteName,
)


class MetaworldSuite(Suite):
    """Meta-World's tasks through `--env.type=metaworld_fast`."""

    name: SuiteName = "metaworld"
    title = "Meta-World"
    fps = FPS
    robot_type = "metaworld_sawyer"
    package = "metaworld"
    install = "pip install metaworld"
    preload = "lerobot_pi0.demo.metaworld_env"
    defaults = Recording(
        suite="metaworld",
        tasks="window-open-v3,window-close-v3,button-press-v3,handle-press-v3",
        episodes_per_task=60,
        repo_id="local/metaworld_demo",
        seed=100_000,
        image_size=96,
        noise=0.2,
        episode_length=200,
        after_success=0,
        moved=0.06,
    )
    options = ("show_goal", "position_actions", "moved")
    quick_tasks = "window-open-v3,window-close-v3"
    eval_episodes = 40
    eval_batch = 10
    # On a quiet AMD EPYC, scaled from 160 demonstrations and 2,500 steps. The quick demo mostly imports.
    seconds = Seconds(record=120, train=590, evaluate=82, report=17)
    quick_seconds = Seconds(record=25, train=25, evaluate=25, report=10)
    reading = (
        "Objects stand up to 6 cm from Meta-World's own places, so that the same motion seldom does: success "
        "above the open-loop baseline needs the camera. A policy that follows its instruction does the "
        "opposite task when it is given the opposite instruction, and so fails at this one."
    )

    def parse_tasks(self, tasks: str) -> list[str]:
        """As the function."""
        return parse_tasks(tasks)

    def instruction(self, task: str) -> str:
        """LeRobot's sentence."""
        return task_instructions()[task]

    def features(self, recording: Recording) -> dict[str, dict[str, Any]]:
        """One camera, the hand's state, its displacement or its next position."""
        from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE

        size = (recording.image_size, recording.image_size, 3)
        action_names = POSITION_NAMES if recording.position_actions else ACTION_NAMES
        return {
            # Video, not images: to read a chunk of actions, LeRobot would decode the image of each of its
            # steps. At 128 pixels and 16 actions, a training sample takes 2.6 ms from video and 7.6 ms from
            # images.
            OBS_IMAGE: {"dtype": "video", "shape": size, "names": ["height", "width", "channels"]},
            OBS_STATE: {"dtype": "float32", "shape": (len(STATE_NAMES),), "names": list(STATE_NAMES)},
            ACTION: {"dtype": "float32", "shape": (len(action_names),), "names": list(action_names)},
        }

    def successes(self, task: str, recording: Recording, seeds: Iterable[int]) -> list[list[Frame]]:
        """Episodes in `MetaworldFastEnv`; seeds say where the objects lie."""
        from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE

        from lerobot_pi0.demo.metaworld_env import PER_METRE, MetaworldFastEnv, scripted_expert

        env = MetaworldFastEnv(
            task,
            self.instruction(task),
            episode_length=recording.episode_length,
            image_size=recording.image_size,
            show_goal=recording.show_goal,
            moved=recording.moved,
        )
        episodes = []
        with closing(env):
            for seed in seeds:
                expert = scripted_expert(task)
                noise = np.random.default_rng(seed)
                observation, _ = env.reset(seed=seed)
                frames: list[Frame] = []
                success = truncated = False
                left = recording.after_success
                while not truncated and (not success or left >= 0):
                    action = expert(env.simulation.state)
                    target = action
                    if recording.position_actions:
                        target = np.append(observation["agent_pos"][:3] + action[:3] / PER_METRE, action[3])
                    frames.append(
                        {
                            OBS_IMAGE: observation["pixels"],
                            OBS_STATE: observation["agent_pos"],
                            ACTION: target.astype(np.float32),
                            "task": self.instruction(task),
                        }
                    )
                    disturbance = np.append(noise.normal(0.0, recording.noise, 3), 0.0)
                    observation, _, succeeded, truncated, _ = env.step(action + disturbance)
                    success |= succeeded
                    left -= success
                if success:
                    episodes.append(frames)
        return episodes

    def evaluations(
        self, tasks: Sequence[str], recording: Recording, episode_length: int, n_action_steps: int
    ) -> list[Evaluation]:
        """The tasks as instructed; those whose opposite is among them once more, with its instruction."""
        shared = (
            f"--env.episode_length={episode_length}",
            # A policy looks when it plans: pictures in between would be drawn for nobody.
            f"--env.steps_per_picture={n_action_steps}",
            f"--env.moved={recording.moved}",
        )

        def run(name: str, column: str, meaning: str, tasks: Sequence[str], *extras: str) -> Evaluation:
            flags = ("--env.type=metaworld_fast", f"--env.task={','.join(tasks)}", *shared, *extras)
            return Evaluation(name, column, meaning, tuple(tasks), flags, not extras, recording.moved)

        evaluations = [run("evaluate", "success", "success in new scenes", tasks)]
        pairs = [task for task in tasks if OPPOSITES.get(task) in tasks]
        if pairs:
            column = "opposite instruction"
            meaning = "success at the task when the policy is given the opposite one"
            swap = "--env.swap_instructions=true"
            evaluations.append(run("evaluate_swapped", column, meaning, pairs, swap))
        return evaluations

    def replay(
        self, evaluation: Evaluation, task: str, actions: np.ndarray, episodes: int, episode_length: int
    ) -> list[bool]:
        """Without a camera, in the scenes of lerobot-eval's seeds."""
        from lerobot_pi0.demo.metaworld_env import Simulation

        simulation = Simulation(task, evaluation.moved)
        solved = []
        for seed in range(EVALUATION_SEED, EVALUATION_SEED + episodes):
            simulation.reset(seed)
            steps = (actions[min(step, len(actions) - 1)] for step in range(episode_length))
            solved.append(any(simulation.step(action)[1] for action in steps))
        return solved


SUITE = MetaworldSuite()
