"""The language test on planted policies: one that obeys, one that does not listen."""

import json

import numpy as np
import pytest
from tiny_dataset import recorded
from tiny_policy import MODELS

from lerobot_pi0 import cli
from lerobot_pi0.tools.language import (
    FOLLOWS,
    IGNORES,
    SAME,
    LanguageConfig,
    Swap,
    compare,
    pooled,
    summarize,
    verdict,
)
from lerobot_pi0.tools.open_loop import Recording

CHUNK, SAMPLES = 8, 4
FRAMES = [0, 7, 16, 33, 40, 50, 62, 70, 95, 111]


def two_tasks() -> Recording:
    """The two episodes of a task do the same, and those of the other task something else."""
    recording = recorded()
    actions = recording.actions.copy()
    length = len(actions) // 4
    actions[length : 2 * length] = actions[:length] + 0.01
    actions[3 * length :] = actions[2 * length : 3 * length] + 0.01
    return Recording(**vars(recording) | {"actions": actions, "states": np.roll(actions, 1, axis=0)})


def swaps_of(obedience: float, recording: Recording, noise: float = 0.3) -> list[Swap]:
    """Of a policy that goes this part of the way to the demonstration of the task that it is told."""
    generator, swaps = np.random.default_rng(1), []
    for frame in FRAMES:
        own, other = int(recording.task[frame]), 1 - int(recording.task[frame])
        samples = noise * recording.scale * generator.standard_normal((SAMPLES, CHUNK, len(recording.scale)))
        as_told = recording.following(np.array([frame]), CHUNK)[0] + samples
        nearest = recording.nearest(np.array([frame]), other)
        assert nearest is not None
        there = recording.following(nearest, CHUNK)[0] + samples
        planned = {own: as_told, other: (1 - obedience) * as_told + obedience * there}
        swaps += compare(recording, frame, planned)
    return swaps


@pytest.mark.parametrize(
    ("obedience", "kind", "sentence"),
    [
        (0.0, IGNORES, "This policy ignores its instruction."),
        (0.6, FOLLOWS, "This policy follows its instruction."),
        (1.0, FOLLOWS, "This policy follows its instruction."),
    ],
)
def test_how_far_a_policy_follows_is_measured(obedience, kind, sentence):
    swaps = swaps_of(obedience, two_tasks())
    (pair,) = summarize(swaps)
    assert pair.followed == pytest.approx(obedience, abs=1e-6)
    assert pair.low == pytest.approx(obedience, abs=1e-6)
    assert (pair.verdict, pair.frames, pair.tasks) == (kind, len(FRAMES), (0, 1))
    assert verdict([pair], pooled(swaps))[0] == sentence


def test_policy_whose_actions_change_at_random_does_not_follow():
    """Another noise moves them as far as the words do, and neither towards the other task."""
    recording, generator, swaps = two_tasks(), np.random.default_rng(2), []
    for frame in FRAMES:
        shape = (SAMPLES, CHUNK, len(recording.scale))
        planned = {task: recording.scale * generator.standard_normal(shape) for task in (0, 1)}
        swaps += compare(recording, frame, planned)
    (pair,) = summarize(swaps)
    assert pair.change == pytest.approx(pair.noise, rel=0.2)
    assert pair.verdict != FOLLOWS


def test_tasks_that_are_demonstrated_alike_are_not_judged():
    recording = two_tasks()
    once = recording.actions[: len(recording.actions) // 4]
    noise = 0.05 * np.random.default_rng(0).standard_normal(recording.actions.shape)
    actions = (np.tile(once, (4, 1)) + noise).astype(np.float32)
    alike = Recording(**vars(recording) | {"actions": actions, "states": np.roll(actions, 1, axis=0)})
    swaps = swaps_of(0.0, alike)
    (pair,) = summarize(swaps)
    assert pair.verdict == SAME
    assert "nothing that an instruction could change" in verdict([pair], pooled(swaps))[0]


@pytest.mark.parametrize("tasks", [[], [1], [1, 1]])
def test_fewer_than_two_instructions_are_refused(tasks):
    with pytest.raises(ValueError, match=r"--tasks=.*: name two instructions or more"):
        LanguageConfig(tasks=tasks)


def test_one_task_alone_is_refused():
    recording = two_tasks()
    planned = {0: np.zeros((SAMPLES, CHUNK, 3))}
    with pytest.raises(ValueError, match="no other instruction"):
        summarize(compare(recording, 0, planned))
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        LanguageConfig(num_samples=1)


@pytest.mark.parametrize("tiny", MODELS, indirect=True)
@pytest.mark.slow
def test_untrained_policy_ignores_its_instruction(tiny, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lerobot-pi0", "language", *tiny, "--json"])
    cli.main()
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["verdict"][0] == "This policy ignores its instruction."
    assert list(numbers["instructions"].values()) == ["open the faucet", "close the faucet"]
    monkeypatch.setattr("sys.argv", ["lerobot-pi0", "language", *tiny, "--tasks=[0, 5]"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "the dataset has no task 5" in capsys.readouterr().err
