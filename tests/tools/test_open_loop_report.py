"""The report's numbers on recordings with planted truths, and its page in a browser."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from markupsafe import escape
from tiny_dataset import EPISODES, FRAMES, JOINTS, LENGTH, TASKS, recorded
from tiny_policy import MODELS

from lerobot_pi0 import cli
from lerobot_pi0.errors import CheckpointError, UserError
from lerobot_pi0.tools import open_loop
from lerobot_pi0.tools.open_loop import (
    HOLD,
    MEAN,
    NEAREST,
    Recording,
    baselines,
    displacements,
    select_episodes,
    trained_episodes,
)
from lerobot_pi0.tools.report.evaluation import evaluate

CHUNK, STRIDE, SAMPLES = 8, 4, 3


def frames_of(recording: Recording) -> np.ndarray:
    return np.concatenate([recording.frames(episode)[::STRIDE] for episode in range(EPISODES)])


def perfect(recording: Recording) -> np.ndarray:
    truth, _ = recording.following(frames_of(recording), CHUNK)
    return np.repeat(truth[:, None], SAMPLES, 1)


def report_of(recording: Recording, planned: np.ndarray) -> Any:
    return evaluate(recording, frames_of(recording), planned, STRIDE)


def test_recorded_actions_have_no_error_and_beat_everything():
    recording = recorded()
    report = report_of(recording, perfect(recording))
    assert report.error == 0
    assert [c.baseline for c in report.comparisons] == [HOLD, MEAN, NEAREST]
    assert all(c.is_beaten and c.ratio == pytest.approx(0) for c in report.comparisons)
    assert report.verdict()[0] == f"This policy beats {HOLD}, {MEAN} and {NEAREST}."
    assert report.discontinuity.mean == pytest.approx(report.discontinuity.recorded)


def test_policy_that_holds_still_is_no_better_than_holding_still():
    recording = recorded()
    held = recording.last_action(frames_of(recording))[:, None, None]
    report = report_of(recording, np.broadcast_to(held, perfect(recording).shape))
    (hold,) = (c for c in report.comparisons if c.baseline == HOLD)
    assert hold.ratio == pytest.approx(1)
    assert report.verdict()[0].startswith(f"This policy is no better than {HOLD}")


def test_holding_still_is_no_displacement_where_actions_are_displacements():
    """Of joints; a gripper is told where to be."""
    recording = recorded()
    moving = Recording(**vars(recording) | {"displaces": np.array([True, True, False])})
    frames = frames_of(recording)
    hold = baselines(moving, frames, CHUNK)[HOLD]
    assert not hold[..., :2].any()
    np.testing.assert_array_equal(hold[:, 0, 2], recording.last_action(frames)[:, 2])


@pytest.mark.parametrize("kind", ["positions", "displacements"])
def test_what_actions_are_is_read_off_the_data(kind):
    recording = recorded()
    states, names = recording.states[:, :2], ["reach.pos", "turn.pos"]
    following = np.roll(states, -1, axis=0)
    moves = following if kind == "positions" else following - states
    actions = np.column_stack((moves, recording.actions[:, 2])).astype(np.float32)
    config: Any = SimpleNamespace(state_feature_names=names, action_feature_names=[*names, "jaw"])
    found = displacements(cast(Any, SimpleNamespace(fps=10)), config, states, actions, recording.episode)
    assert found.tolist() == [kind == "displacements"] * 2 + [False]


def test_chunk_boundaries_that_were_not_evaluated_are_reported():
    recording = recorded()
    frames = frames_of(recording)[::3]
    truth, _ = recording.following(frames, CHUNK)
    report = evaluate(recording, frames, np.repeat(truth[:, None], SAMPLES, 1), 3 * STRIDE)
    assert report.discontinuity is None
    assert "chunks are 12 frames apart and have 8 actions" in report.verdict()[-2]


def test_last_action_is_of_the_same_episode():
    """An episode's first frame has none, and takes its own."""
    recording = recorded()
    frames = np.array([0, 7, LENGTH, LENGTH + 1])
    np.testing.assert_array_equal(recording.last_action(frames), recording.actions[[0, 6, LENGTH, LENGTH]])


def test_policy_slightly_better_than_chance_is_not_said_to_beat():
    """As good as the mean action in half of the episodes, a little worse in one, a little better in one."""
    recording = recorded()
    frames = frames_of(recording)
    planned = np.broadcast_to(recording.mean, perfect(recording).shape).copy()
    truth = perfect(recording)
    for episode, share in ((0, 0.1), (1, -0.09)):
        own = recording.episode[frames] == episode
        planned[own] += share * (truth[own] - planned[own])
    (mean,) = (c for c in report_of(recording, planned).comparisons if c.baseline == MEAN)
    assert mean.low < 1 < mean.high
    assert not mean.is_beaten
    (first, *_) = report_of(recording, planned).verdict()
    assert f"is not distinguishable from {MEAN}" in first
    assert f"no better than {MEAN}" not in first


def test_steps_beyond_the_episode_do_not_count():
    recording = recorded()
    planned = perfect(recording)
    _, valid = recording.following(frames_of(recording), CHUNK)
    assert not valid.all()
    planned[np.broadcast_to(~valid[:, None], planned.shape[:3])] = 1e6
    report = report_of(recording, planned)
    assert report.error == 0
    assert report.spread == pytest.approx(0, abs=1e-6)
    assert all(joint.error == 0 for joint in report.joints)


def test_errors_are_found_where_they_are_planted():
    """At one step of the chunk; in one joint and phase of the episode; their size in the robot's units."""
    recording, frames = recorded(), frames_of(recorded())
    planned = perfect(recording)
    planned[:, :, 5, 1] += 0.5
    report = report_of(recording, planned)
    at_step = [value or 0 for value in report.horizon["policy"]]
    assert np.flatnonzero(at_step).tolist() == [5]
    assert at_step[5] == pytest.approx(0.5 / recording.scale[1] / len(JOINTS), rel=1e-4)
    assert report.worst_joint.name == "turn"
    _, valid = recording.following(frames, CHUNK)
    assert report.worst_joint.error == pytest.approx(0.5 * valid[:, 5].sum() / valid.sum(), rel=1e-4)
    planned = perfect(recording)
    late = (frames % LENGTH)[:, None] + np.arange(CHUNK) >= LENGTH * 2 // 3
    planned[..., 0] += 3.0 * late[:, None]
    start, middle, end = report_of(recording, planned).joints[0].by_phase
    assert (start, middle) == (0, 0)
    assert end == pytest.approx(3 / recording.scale[0], rel=1e-4)


def test_nearest_demonstration_is_of_another_episode_and_of_the_same_task():
    recording = recorded()
    frames = np.arange(len(recording.episode))
    nearest = recording.nearest(frames)
    assert nearest is not None
    assert (recording.episode[nearest] != recording.episode[frames]).all()
    assert (recording.task[nearest] == recording.task[frames]).all()
    states = recording.states / recording.states.std(0)
    for frame in (0, 47, 119):
        allowed = (recording.task == recording.task[frame]) & (recording.episode != recording.episode[frame])
        distances = np.linalg.norm(states - states[frame], axis=1)
        assert distances[nearest[frame]] == pytest.approx(distances[allowed].min())


def test_without_another_episode_there_is_no_nearest_demonstration():
    recording = recorded()
    one = np.zeros_like(recording.episode)
    alone = Recording(**vars(recording) | {"episode": one, "task": one})
    assert alone.nearest(np.array([3])) is None
    report = evaluate(alone, np.array([0, 4]), perfect(recording)[:2], STRIDE)
    assert [c.baseline for c in report.comparisons] == [HOLD, MEAN]
    assert report.comparisons[0].low is None  # one episode tells nothing of others


def test_planted_discontinuity_between_chunks_is_found():
    recording = recorded()
    planned = perfect(recording)
    frames = frames_of(recording)
    chunk = int(np.flatnonzero(frames == 2 * LENGTH + 12)[0])
    planned[chunk, :, :, 1] += 50.0
    found = report_of(recording, planned).discontinuity
    assert (found.worst_episode, found.worst_joint) == (2, "turn")
    assert found.worst_frame in (12, 16)  # into the chunk, or out of it
    assert found.worst == pytest.approx(50, abs=2.5)
    per_episode = math.ceil(LENGTH / STRIDE) - 1
    assert found.count == EPISODES * per_episode


def test_gripper_that_closes_late_or_never_is_told_in_seconds():
    recording = recorded()
    late = np.roll(recording.actions, 3, axis=0)
    late = Recording(**vars(recording) | {"actions": late})
    (gripper,) = report_of(recording, perfect(late)).grippers
    assert gripper.name == "gripper"
    assert gripper.recorded == EPISODES
    assert gripper.missed == 0
    np.testing.assert_allclose(gripper.offsets, 0.3)
    planned = perfect(recording)
    planned[..., 2] = 0
    (gripper,) = report_of(recording, planned).grippers
    assert (gripper.missed, gripper.offsets, gripper.extra) == (EPISODES, [], 0)


def test_episodes_that_training_held_out_are_looked_at(tmp_path):
    """As lerobot-train splits: of each task the last ones, rounded up."""
    tasks = [["a"]] * 5 + [["b"]] * 3
    metadata: Any = SimpleNamespace(
        total_episodes=8, episodes={"tasks": tasks}, repo_id="me/data", root=tmp_path
    )

    def trained(**dataset: Any) -> set[int] | None:
        config = {"dataset": {"repo_id": "me/data", "episodes": None, "eval_split": 0.0} | dataset}
        (tmp_path / "train_config.json").write_text(json.dumps(config))
        return trained_episodes(tmp_path, metadata)

    assert trained_episodes(tmp_path, metadata) is None
    assert trained() == set(range(8))
    assert trained(repo_id="somebody/else") is None
    assert trained(repo_id="somebody/else", root=str(tmp_path)) == set(range(8))
    assert trained(episodes=[0, 6]) == {0, 6}
    assert trained(episodes=[0, 6, 8]) == {0, 6}  # the dataset was longer then
    for damaged in ("{", "{}", '{"dataset": null}'):
        (tmp_path / "train_config.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"train_config.json.* is damaged"):
            trained_episodes(tmp_path, metadata)
    assert trained(eval_split=0.3) == {0, 1, 2, 5, 6}
    held_out = select_episodes(None, metadata, tmp_path, 2)
    assert (held_out.episodes, held_out.trained_on) == ([3, 7], False)
    mixed = select_episodes([0, 4], metadata, tmp_path, 2)
    assert (mixed.episodes, mixed.trained_on) == ([0, 4], True)
    assert "1 of 2" in mixed.note
    with pytest.raises(ValueError, match="episodes 0 to 7"):
        select_episodes([8], metadata, tmp_path, 2)


def test_episodes_with_nan_are_left_out_and_refused_by_name(monkeypatch):
    frames = np.arange(40)
    columns = {
        "action": np.stack((frames, frames**2), 1).astype(np.float32),
        "observation.state": np.stack((frames, -frames), 1).astype(np.float32),
        "episode_index": np.repeat([0, 1, 2, 3], 10)[:, None],
        "task_index": np.zeros((40, 1), int),
        "index": frames,
    }
    columns["action"][13] = np.nan
    monkeypatch.setattr(open_loop, "read_columns", lambda *_: columns)
    stats = {"action": {"mean": [np.nan, 0.0], "std": [np.nan, 1.0]}}
    tasks = pd.DataFrame({"task_index": [0]}, index=["push"])
    metadata = cast(Any, SimpleNamespace(stats=stats, tasks=tasks, fps=10, features=columns))
    feature = SimpleNamespace(shape=(2,))
    config = cast(
        Any, SimpleNamespace(action_feature=feature, action_feature_names=None, state_feature_names=None)
    )
    recording = open_loop.read_recording(metadata, config, [0, 2])
    assert sorted(set(recording.episode.tolist())) == [0, 2, 3]
    for values in (recording.actions, recording.states, recording.mean, recording.scale):
        assert np.isfinite(values).all()
    with pytest.raises(UserError, match=r"episodes \[1\] of the dataset hold NaN"):
        open_loop.read_recording(metadata, config, [0, 1])


def test_a_dataset_with_other_names_is_told_from_a_damaged_one():
    metadata = cast(Any, SimpleNamespace(features={"actions": {}, "state": {}}))
    with pytest.raises(UserError, match=r"no 'action' among \['actions', 'state'\].*docs/finetuning.md"):
        open_loop.read_recording(metadata, cast(Any, None))


@pytest.fixture(scope="module")
def page(tiny, tmp_path_factory) -> Path:
    """The page of an untrained policy on a small dataset."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        flags = [*tiny, f"--output={folder}", "--num_samples=2"]
        patch.setattr("sys.argv", ["lerobot-pi0", "report", *flags])
        cli.main()
    return folder / "report.html"


@pytest.mark.parametrize("tiny", MODELS, indirect=True)
@pytest.mark.slow
def test_page_of_an_untrained_policy_says_so_and_needs_no_other_file(page):
    text = page.read_text(encoding="utf-8")
    numbers = json.loads(page.with_name("report.json").read_text())
    assert numbers["verdict"][0].startswith("This policy is no better than holding still")
    assert numbers["episodes"] == [0, 1, 2, 3]
    assert numbers["num_chunks"] == 4 * math.ceil(FRAMES / 3)  # one every n_action_steps
    assert all(escape(line) in text for line in numbers["verdict"])
    assert "does not say whether it was trained on these episodes" in text
    assert all(escape(task) in text for task in TASKS)
    sources = re.findall(r'(?:src|href)="([^"]{30})', text)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in text


@pytest.mark.slow
def test_page_fits_a_phone_in_a_browser(page, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium or chrome on PATH")
    # A window may not be as narrow as a phone, but a frame in it may.
    wrapped = tmp_path / "phone.html"
    text = page.read_text(encoding="utf-8")
    wrapped.write_text(
        f"""<body><iframe style="width:390px;height:800px;border:0" srcdoc="{escape(text)}"></iframe><script>
        onload = () => {{
            const page = document.querySelector("iframe").contentDocument;
            const images = [...page.images];
            document.body.dataset.found = JSON.stringify({{
                images: images.length,
                decoded: images.filter(image => image.complete && image.naturalWidth > 0).length,
                headings: [...page.querySelectorAll("h1, h2")].map(heading => heading.textContent),
                width: page.documentElement.scrollWidth,
                widest: Math.max(...images.map(image => image.getBoundingClientRect().right)),
            }});
        }}</script></body>""",
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--hide-scrollbars",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            wrapped.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    (found,) = re.findall(r'data-found="([^"]+)"', done.stdout)
    found = json.loads(found.replace("&quot;", '"'))
    assert found["images"] == found["decoded"] == 1 + 2 * 4  # the horizon; frames and chunks of each episode
    assert found["width"] == 390
    assert found["widest"] <= 390
    assert {"Open-loop report", "Joint by joint", "Episodes", "Method"} <= set(found["headings"])
