"""LeRobot's own commands with the simulated arm: record, train, roll out in each way, async over loopback,
replay."""

import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from async_control import remote_client, sent, server
from attempts import attempts
from lerobot.datasets import LeRobotDataset
from lerobot_commands import checkpoint, run
from tiny_policy import SIZES

from lerobot_pi0.control.trace import read_trace
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.simulated_robot.simulation import HOME, JOINTS

pytestmark = pytest.mark.slow

TASK = "reach the red block"
# A first chunk takes seconds on a busy machine.
ROLLOUT = ["--duration=4", "--return_to_initial_position=false"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """Where all commands have run, in one process. Each left the robot's trace in a folder of its name."""
    folder = tmp_path_factory.mktemp("simulated")

    def robot(name: str) -> list[str]:
        return ["--robot.type=simulated_so101", f"--robot.trace={folder / name}", "--play_sounds=false"]

    def dataset(name: str) -> list[str]:
        return [f"--dataset.repo_id=local/{name}", f"--dataset.root={folder / name}_data"]

    def recording(seconds: float) -> list[str]:
        return [
            f"--dataset.single_task={TASK}",
            "--dataset.num_episodes=2",
            f"--dataset.episode_time_s={seconds}",
            "--dataset.push_to_hub=false",
            "--dataset.video=false",
        ]

    def rollout(name: str, *arguments: str) -> list[str]:
        policy = f"--policy.path={checkpoint(folder, 'training')}"
        return ["lerobot-rollout", policy, "--policy.device=cpu", *robot(name), f"--task={TASK}", *arguments]

    commands = [
        [
            "lerobot-record",
            *robot("record"),
            *dataset("record"),
            *recording(3),
            "--dataset.reset_time_s=2",
            "--teleop.type=scripted_so101",
        ],
        [
            "lerobot-train",
            "--policy.type=lerobot_pi0",
            *SIZES,
            # Longer than predicting takes on a busy machine: real-time chunking needs actions left.
            "--policy.chunk_size=50",
            "--policy.n_action_steps=25",
            "--policy.tokenizer=small",
            "--policy.device=cpu",
            "--policy.push_to_hub=false",
            *dataset("record"),
            f"--output_dir={folder / 'training'}",
            "--steps=2",
            "--batch_size=2",
            "--num_workers=0",
            "--env_eval_freq=0",
        ],
        rollout("sync", *ROLLOUT),
        rollout(
            "rtc",
            *ROLLOUT,
            "--inference.type=rtc",
            "--inference.queue_threshold=30",
            "--inference.rtc.execution_horizon=10",
        ),
        rollout(
            "episodic",
            "--strategy.type=episodic",
            *dataset("rollout_episodic"),
            *recording(1),
            "--dataset.reset_time_s=0.2",
            "--return_to_initial_position=false",
        ),
        ["lerobot-replay", *robot("replay"), *dataset("record"), "--dataset.episode=0"],
    ]
    run(folder, commands).succeed()
    policy = checkpoint(folder, "training")
    with (
        server(policy, folder, 30) as (_, address),
        remote_client(address, policy, folder / "async", 30) as client,
    ):
        client.wait_until(lambda: len(sent(folder / "async")) > 60)  # more than one chunk
        client.send_signal(signal.SIGINT)
        client.wait(60)
    return folder


def recorded(ran: Path, name: str) -> Any:
    return LeRobotDataset(f"local/{name}", root=ran / f"{name}_data")


def events(ran: Path, name: str, event: str) -> list[dict[str, Any]]:
    return [found for found in read_trace(ran / name) if found["event"] == event]


def test_the_script_records_episodes_that_begin_at_home_and_reach_the_block(ran):
    dataset = recorded(ran, "record")
    assert dataset.num_episodes == 2
    assert dataset.features["action"]["names"] == [f"{joint}.pos" for joint in JOINTS]
    assert dataset.features["observation.state"]["names"] == [f"{joint}.pos" for joint in JOINTS]
    assert dataset.features["observation.images.front"]["shape"] == (96, 96, 3)
    assert dataset[0]["task"] == TASK
    for episode in dataset.meta.episodes:
        state = dataset[episode["dataset_from_index"]]["observation.state"].numpy()
        assert np.abs(state - [*HOME.values()]).max() < 3
    tries = attempts(ran / "record")
    assert [found.reached is not None for found in tries[:2]] == [True, True]
    assert tries[0].block != tries[1].block


@pytest.mark.parametrize("name", ["sync", "rtc", "episodic", "async"])
def test_a_policy_that_was_trained_on_them_drives_the_arm(ran, name):
    policy = Pi0Policy.from_pretrained(checkpoint(ran, "training"))
    assert policy.config.cameras == {"base": "observation.images.front"}
    actions = events(ran, name, "action")
    assert len(actions) >= 4
    assert all([*action["values"]] == [f"{joint}.pos" for joint in JOINTS] for action in actions)
    assert all(math.isfinite(value) for action in actions for value in action["values"].values())
    assert len({action["values"]["shoulder_pan.pos"] for action in actions}) > 1
    assert len(events(ran, name, "observation")) > 1
    assert len(events(ran, name, "stop")) == 1


def test_rolled_out_episodes_are_recorded(ran):
    dataset = recorded(ran, "rollout_episodic")
    assert dataset.num_episodes == 2
    assert dataset[len(dataset) - 1]["task"] == TASK


def test_a_replayed_episode_takes_the_arm_where_it_was(ran):
    dataset = recorded(ran, "record")
    length = dataset.meta.episodes[0]["length"]
    actions = events(ran, "replay", "action")
    assert len(actions) == length
    for index in (0, length // 2, length - 1):
        values = [*actions[index]["values"].values()]
        assert values == pytest.approx(dataset[index]["action"].tolist(), abs=1e-3)
    closest = attempts(ran / "replay")[0].closest
    assert closest == pytest.approx(attempts(ran / "record")[0].closest, abs=0.01)
