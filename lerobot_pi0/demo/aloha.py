"""ALOHA's transfer of a cube, as a suite of the demo: two arms in gym-aloha, LeRobot's `--env.type=aloha`.

Two things keep a policy from following the expert's path without looking. Most demonstrations begin after
the expert has acted unseen on a place without a cube: where the hand is says nothing about where the cube is,
and an empty closed hand goes back for it. And targets are disturbed before they are executed and written down
undisturbed (DART, Laskey et al. 2017): the dataset visits states beside the expert's path and says how to
come back from there.
"""

from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from lerobot_pi0.demo.suites import (
    EVALUATION_SEED,
    Evaluation,
    Frame,
    Recording,
    Seconds,
    Suite,
    SuiteName,
    split_tasks,
)

FPS = 50

# LeRobot's environment has no sentence for a task: it gives the policy this name.
TASKS = {"transfer_cube": "AlohaTransferCube-v0"}

JOINTS = tuple(
    f"{arm}_arm_{joint}"
    for arm in ("left", "right")
    for joint in ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
)

# The place above the cube, from which the hand is lowered, is scattered by so many times the noise.
SCATTER_PER_NOISE = 1.25

# The share of disturbed demonstrations that begin on the way to another place, and the steps until then: the
# expert reaches such a place and closes the fingers in about 55.
ELSEWHERE, UNSEEN_STEPS = 0.7, (5, 75)
# The expert's runs whose mean is the open-loop baseline.
BASELINE_RUNS = 10


class AlohaSuite(Suite):
    """The transfer of a cube from the right hand to the left."""

    name: SuiteName = "aloha"
    title = "ALOHA"
    fps = FPS
    robot_type = "aloha"
    package = "gym_aloha"
    install = "Install the extra: pip install 'lerobot_policy_pi0[aloha]', or run make aloha."
    preload = "lerobot_pi0.demo.aloha_env"
    defaults = Recording(
        suite="aloha",
        tasks="transfer_cube",
        episodes_per_task=100,
        repo_id="local/aloha_demo",
        seed=100_000,
        image_size=160,
        noise=0.02,
        episode_length=250,
        after_success=25,
    )
    quick_tasks = "transfer_cube"
    eval_episodes = 50
    eval_batch = 1
    seconds = Seconds(record=300, train=1100, evaluate=3100, report=60)
    quick_seconds = Seconds(record=30, train=30, evaluate=30, report=10)
    reading = (
        "The cube lies anywhere in a square of 20 cm, so that a motion replayed without a camera rarely "
        "finds it. gym-aloha counts an episode as solved when the left hand touches the lifted cube."
    )

    def parse_tasks(self, tasks: str) -> list[str]:
        """`transfer_cube`."""
        return split_tasks(tasks, TASKS, self.title, "transfer_cube")

    def instruction(self, task: str) -> str:
        """The task's name, which is what LeRobot's environment tells a policy."""
        return task

    def features(self, recording: Recording) -> dict[str, dict[str, Any]]:
        """The camera from above, 4:3 and `image_size` pixels wide, and the joints of both arms."""
        from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

        size = (recording.image_size * 3 // 4, recording.image_size, 3)
        joints = {"dtype": "float32", "shape": (len(JOINTS),), "names": list(JOINTS)}
        return {
            f"{OBS_IMAGES}.top": {"dtype": "video", "shape": size, "names": ["height", "width", "channels"]},
            OBS_STATE: joints,
            ACTION: joints,
        }

    def successes(self, task: str, recording: Recording, seeds: Iterable[int]) -> list[list[Frame]]:
        """Episodes in gym-aloha's physics; a seed draws the cube's place, the beginning and disturbances."""
        from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

        from lerobot_pi0.demo.aloha_env import Camera, Expert, Pushes, Simulation, sample_box_pose

        simulation = Simulation()
        episodes = []
        with closing(Camera(simulation, recording.image_size)) as camera:
            for seed in seeds:
                simulation.reset(seed)
                rng = np.random.default_rng(seed)
                if recording.noise and rng.random() < ELSEWHERE:
                    elsewhere = sample_box_pose(int(rng.integers(2**31)))[:3]
                    expert = Expert(simulation.state, rng, SCATTER_PER_NOISE * recording.noise)
                    for _ in range(rng.integers(*UNSEEN_STEPS)):
                        expert.step(simulation.state, elsewhere)
                        simulation.step(expert.action())
                expert = Expert(simulation.state, rng, SCATTER_PER_NOISE * recording.noise)
                pushes = Pushes(rng, recording.noise)
                frames: list[Frame] = []
                success, left = False, recording.after_success
                while len(frames) < recording.episode_length and (not success or left >= 0):
                    expert.step(simulation.state, simulation.cube)
                    frames.append(
                        {
                            f"{OBS_IMAGES}.top": camera.picture(),
                            OBS_STATE: simulation.state.astype(np.float32),
                            ACTION: expert.action().astype(np.float32),
                            "task": self.instruction(task),
                        }
                    )
                    success |= simulation.step(expert.action(pushes.step() * expert.steadiness()[:, None]))
                    left -= success
                if success:
                    episodes.append(frames)
        return episodes

    def evaluations(
        self, tasks: Sequence[str], recording: Recording, episode_length: int, n_action_steps: int
    ) -> list[Evaluation]:
        """LeRobot's own environment. It has one task, so no other instruction."""
        flags = (
            "--env.type=aloha",
            f"--env.task={','.join(TASKS[task] for task in tasks)}",
            f"--env.episode_length={episode_length}",
        )
        return [Evaluation("evaluate", "success", "success in new scenes", tuple(tasks), flags)]

    def task_name(self, task_group: str, task_id: int) -> str:
        """The one task: LeRobot calls it by its environment's type."""
        del task_group, task_id
        return "transfer_cube"

    def replay(
        self, evaluation: Evaluation, task: str, actions: np.ndarray, episodes: int, episode_length: int
    ) -> list[bool]:
        """Without a camera, in the scenes of lerobot-eval's seeds."""
        from lerobot_pi0.demo.aloha_env import Simulation

        simulation = Simulation()
        solved = []
        for seed in range(EVALUATION_SEED, EVALUATION_SEED + episodes):
            simulation.reset(seed)
            steps = (actions[min(step, len(actions) - 1)] for step in range(episode_length))
            solved.append(any(simulation.step(action) for action in steps))
        return solved

    def baseline_runs(self, task: str, demonstrations: Path) -> list[np.ndarray]:
        """Demonstrations begin anywhere, so the expert runs again from the arms' own pose, undisturbed."""
        del task, demonstrations
        from lerobot_pi0.demo.aloha_env import Expert, Simulation

        simulation = Simulation()
        runs = []
        for seed in range(self.defaults.seed, self.defaults.seed + BASELINE_RUNS):
            simulation.reset(seed)
            expert = Expert(simulation.state, np.random.default_rng(seed), 0.0)
            actions: list[np.ndarray] = []
            solved = False
            while not solved and len(actions) < self.defaults.episode_length:
                expert.step(simulation.state, simulation.cube)
                actions.append(expert.action())
                solved = simulation.step(actions[-1])
            runs.append(np.stack(actions))
        return runs


SUITE = AlohaSuite()
