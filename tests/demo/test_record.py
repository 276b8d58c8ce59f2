"""The recorder and what it leaves: a LeRobotDataset of clean labels, reused when asked for again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lerobot.datasets import LeRobotDataset

from lerobot_pi0.demo import record as recorder
from lerobot_pi0.demo.baseline import mean_demonstration, recorded_actions
from lerobot_pi0.demo.metaworld import SUITE
from lerobot_pi0.demo.metaworld_env import MetaworldFastEnv, scripted_expert
from lerobot_pi0.demo.metaworld_tasks import FPS, task_instructions
from lerobot_pi0.demo.record import RecordConfig, record
from lerobot_pi0.demo.suites import EVALUATION_SEED

TASK = "door-unlock-v3"
SETTINGS: dict[str, Any] = {"tasks": TASK, "episodes_per_task": 2, "image_size": 64, "moved": 0.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return record(RecordConfig(root=tmp_path_factory.mktemp("recording") / "door", **SETTINGS))


def read(root: Path, **settings: Any) -> Any:
    """The dataset; LeRobot's types for its samples and episodes say less than they are."""
    return LeRobotDataset("local/x", root=root, **settings)


def test_a_recording_reads_back_with_chunks_of_actions(root):
    dataset = read(root, delta_timestamps={"action": [step / FPS for step in range(16)]})
    assert dataset.num_episodes == 2
    sample = dataset[0]
    assert sample["observation.image"].shape == (3, 64, 64)
    assert sample["observation.state"].shape == (4,)
    assert sample["action"].shape == (16, 4)
    assert sample["task"] == task_instructions()[TASK]


def test_labels_are_the_experts_clean_actions_in_the_states_that_noise_led_to(root):
    dataset, expert = read(root), scripted_expert(TASK)
    env, noise = MetaworldFastEnv(TASK, "", image_size=64), np.random.default_rng(SUITE.defaults.seed)
    observation, _ = env.reset(seed=SUITE.defaults.seed)
    success, off_course = False, 0.0
    for step in range(dataset.meta.episodes[0]["length"]):
        sample = dataset[step]
        np.testing.assert_allclose(sample["observation.state"], observation["agent_pos"], atol=1e-6)
        image = sample["observation.image"].permute(1, 2, 0).numpy() * 255
        assert np.abs(image - observation["pixels"]).mean() < 8  # the video is lossy
        action = sample["action"].numpy()
        np.testing.assert_array_equal(action, expert(env.simulation.state))
        assert np.abs(action).max() <= 1
        executed = action + np.append(noise.normal(0, SUITE.defaults.noise, 3), 0)
        off_course += np.abs(executed - action).sum()
        observation, _, success, _, _ = env.step(executed)
    env.close()
    assert success
    assert off_course > 1


def test_attempts_that_run_side_by_side_give_the_episodes_of_the_first_seeds_that_succeed(root, tmp_path):
    lengths = read(root).meta.episodes["length"]
    # One of the first two attempts runs out of time.
    settings: dict[str, Any] = SETTINGS | {"image_size": 32, "episode_length": max(lengths) - 1}
    short = RecordConfig(root=tmp_path, **settings).recording()
    attempts = []

    def backwards(function, chunks):
        """Makes the last call first, as a faster process may, and gives the results in order."""
        attempts.extend(chunks := list(chunks))
        return reversed([function(chunk) for chunk in reversed(chunks)])

    first, second = recorder.demonstrations(TASK, short, backwards)
    assert [seed for chunk in attempts for seed in chunk][:3] == [short.seed, short.seed + 1, short.seed + 2]
    assert len(first) == min(lengths)
    (alone,) = SUITE.successes(TASK, short, [attempts[-1][-1]])
    np.testing.assert_array_equal([frame["action"] for frame in second], [frame["action"] for frame in alone])


def test_a_finished_recording_is_reused(root, monkeypatch):
    monkeypatch.setattr(recorder, "demonstrations", lambda *_: pytest.fail("records again"))
    assert record(RecordConfig(root=root, **SETTINGS)) == root


def test_other_settings_are_refused_with_the_flags_that_differ(root):
    with pytest.raises(FileExistsError, match=r"\(--image_size=64\).*--root, or delete"):
        record(RecordConfig(root=root, **SETTINGS | {"image_size": 32}))


def test_a_folder_that_is_no_recording_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"is not a recording.*--root"):
        record(RecordConfig(root=tmp_path, **SETTINGS))
    assert (tmp_path / "thesis.tex").exists()


def test_an_interrupted_recording_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
    complete = recorder.demonstrations

    def interrupted(*arguments):
        yield next(complete(*arguments))
        raise KeyboardInterrupt

    config = RecordConfig(root=tmp_path / "door", **SETTINGS | {"image_size": 32, "episodes_per_task": 1})
    monkeypatch.setattr(recorder, "demonstrations", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record(config)
    assert not config.root.exists()
    monkeypatch.setattr(recorder, "demonstrations", complete)
    assert json.loads((record(config) / "meta" / "info.json").read_text())["total_episodes"] == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"image_size": 16},
        {"episodes_per_task": 0},
        {"episode_length": 0},
        {"noise": -0.1},
        {"after_success": -1},
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_its_flag(tmp_path, setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"--{name} must"):
        RecordConfig(root=tmp_path, **setting)


def test_an_expert_that_never_succeeds_says_which_flags_to_change(tmp_path):
    config = RecordConfig(root=tmp_path / "door", **SETTINGS | {"image_size": 32, "episode_length": 2})
    with pytest.raises(
        RuntimeError, match=r"only 0 times in 10 tries with --noise=0.2 and --episode_length=2"
    ):
        record(config)
    shutil.rmtree(tmp_path / "door.partial")


def test_the_actions_of_a_task_are_read_episode_by_episode(root):
    lengths = read(root).meta.episodes["length"]
    actions = recorded_actions(root, task_instructions()[TASK])
    assert [episode.shape for episode in actions] == [(length, 4) for length in lengths]


def test_the_mean_demonstration_leaves_out_episodes_that_are_over():
    demonstrations = [np.full((2, 4), 1.0), np.full((3, 4), 3.0)]
    np.testing.assert_array_equal(mean_demonstration(demonstrations)[:, 0], [2, 2, 3])


def test_objects_are_moved_in_recordings_as_in_evaluations(tmp_path):
    """The average demonstration of one moved scene solves that one, and not the one that Meta-World has."""
    config = RecordConfig(
        root=tmp_path / "moved",
        tasks=TASK,
        episodes_per_task=1,
        image_size=32,
        noise=0.0,
        seed=EVALUATION_SEED,
        moved=0.1,
    )
    (demonstration,) = recorded_actions(record(config), task_instructions()[TASK])
    (moved,) = SUITE.evaluations([TASK], config.recording(), 200, 4)
    assert SUITE.replay(moved, TASK, demonstration, 1, 200) == [True]
    assert SUITE.replay(replace(moved, moved=0.0), TASK, demonstration, 1, 200) == [False]


def test_replaying_a_demonstration_in_its_own_scene_solves_it_and_standing_still_does_not(tmp_path):
    calm = RecordConfig(
        root=tmp_path / "calm",
        tasks=TASK,
        episodes_per_task=1,
        image_size=32,
        noise=0.0,
        seed=EVALUATION_SEED,
    )
    (demonstration,) = recorded_actions(record(calm), task_instructions()[TASK])
    (evaluation,) = SUITE.evaluations([TASK], calm.recording(), 200, 4)
    assert SUITE.replay(evaluation, TASK, demonstration, 1, 200) == [True]
    assert SUITE.replay(evaluation, TASK, np.zeros((1, 4)), 1, 50) == [False]


def test_an_expert_goes_on_after_success_for_as_long_as_asked(root, tmp_path):
    longer = record(RecordConfig(root=tmp_path / "door", after_success=7, **SETTINGS))
    one, other = read(root), read(longer)
    lengths = one.meta.episodes["length"], other.meta.episodes["length"]
    assert [after - before for before, after in zip(*lengths, strict=True)] == [7] * len(lengths[0])
    for step in range(lengths[0][0]):
        np.testing.assert_array_equal(one[step]["action"], other[step]["action"])


def test_positions_say_where_the_displacements_lead(root, tmp_path):
    positions = record(RecordConfig(root=tmp_path / "door", position_actions=True, **SETTINGS))
    one, other = read(root), read(positions)
    assert other.meta.features["action"]["names"] == ["hand_x", "hand_y", "hand_z", "gripper_effort"]
    env = MetaworldFastEnv(TASK, "", image_size=64, position_actions=True)
    env.reset(seed=SUITE.defaults.seed)
    success = False
    for step in range(one.meta.episodes[0]["length"]):
        displacement, position = one[step], other[step]
        moved = (position["action"] - position["observation.state"])[:3] * 100
        np.testing.assert_allclose(moved, displacement["action"][:3], atol=1e-3)
        assert position["action"][3] == displacement["action"][3]
        _, _, done, _, _ = env.step(position["action"].numpy())
        success |= done
    env.close()
    assert success


def test_a_recording_of_an_earlier_version_is_recognized(root, tmp_path):
    earlier = tmp_path / "door"
    shutil.copytree(root / "meta", earlier / "meta")
    settings = earlier / recorder.SETTINGS_FILE
    kept = json.loads(settings.read_text())
    for name in ("suite", "after_success", "position_actions", "moved"):
        del kept[name]
    settings.write_text(json.dumps(kept))
    assert recorder.is_recorded(RecordConfig(root=earlier, **SETTINGS))


def test_a_setting_of_another_suite_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(SUITE, "options", ("show_goal",))
    RecordConfig(root=tmp_path, show_goal=True)
    with pytest.raises(ValueError, match=r"--moved means nothing in Meta-World"):
        RecordConfig(root=tmp_path, moved=0.05)


def test_a_simulator_that_is_missing_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(SUITE, "package", "no_such_package")
    with pytest.raises(ValueError, match=r"--suite=metaworld: .* is not installed. pip install"):
        record(RecordConfig(root=tmp_path / "door", **SETTINGS))
