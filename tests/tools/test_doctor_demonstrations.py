"""The doctor of demonstrations: each fault is planted in columns, found with its episode and frame, and not
found in a healthy set of the same task."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_policy import tiny_config

from lerobot_pi0.tools.columns import Columns
from lerobot_pi0.tools.doctor import demonstrations
from lerobot_pi0.tools.doctor.finding import Finding, Severity
from lerobot_pi0.tools.doctor.inputs import Inputs
from lerobot_pi0.tools.pairing import Pairing

FPS, EPISODES = 20, 10
STATES = ["x", "y", "z", "fingers"]
ACTIONS = ["dx", "dy", "dz", "gripper"]
FAST = 0.02  # metres per frame
GRASP, REST = 6, 16  # frames that closing the fingers takes; frames after the release
Shown = np.ndarray  # (frames, any), of each frame what a picture shows


class Recorded:
    """A hand that goes to an object, closes, carries it to a basket, and opens: relative actions."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        self.state = np.array([*self.random.uniform(-0.05, 0.05, 2), 0.2, 1.0])
        self.object = np.array([*self.random.uniform(0.1, 0.2, 2), 0.0])
        self.states: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.shown: list[np.ndarray] = []

    def act(self, move: np.ndarray, gripper: float) -> None:
        self.states.append(self.state.copy())
        self.actions.append(np.append(np.clip(move / FAST, -1, 1), gripper))
        self.shown.append(np.concatenate((self.state, self.object)))
        self.state[:3] += FAST * self.actions[-1][:3]
        self.state[3] += np.clip(-gripper / GRASP, -self.state[3], 1 - self.state[3])

    def go(self, goal: np.ndarray, gripper: float, push: float) -> None:
        while np.abs(goal - self.state[:3]).max() > 1e-3:
            self.act(goal - self.state[:3], gripper)
            if self.random.random() < 0.3:
                self.state[:3] += self.random.normal(0, push, 3)


def episode(seed: int, *, rest: int = REST, pause: int = 0, push: float = 0.01, **changes: Any) -> Recorded:
    """`pause`: frames in which the fingers are shut already, and nothing happens."""
    hand = Recorded(seed)
    for name, value in changes.items():
        setattr(hand, name, value.copy())
    hand.go(hand.object + np.array([0, 0, 0.1]), -1, push)
    hand.go(hand.object, -1, 0)
    for _ in range(GRASP + 1 + pause):
        hand.act(np.zeros(3), 1)
    basket = np.array([0.0, 0.3, 0.2]) + np.append(hand.random.uniform(-0.03, 0.03, 2) * (push > 0), 0)
    hand.go(basket, 1, push)
    for _ in range(rest):
        hand.act(np.array([0, 0, 0.01]), -1)
    return hand


def inputs_of(hands: list[Recorded], show: bool = True, **changes: Any) -> Inputs:
    """A dataset of these episodes, with pictures in which everything is to be seen, or nothing."""
    lengths = [len(hand.states) for hand in hands]
    state, action, shown = (
        np.concatenate([getattr(hand, name) for hand in hands]) for name in ("states", "actions", "shown")
    )
    frame = np.concatenate([np.arange(length) for length in lengths])
    columns = Columns(
        episode=np.repeat(np.arange(len(hands)), lengths),
        frame=frame,
        timestamp=frame / FPS,
        task=np.zeros(len(frame), int),
        state=state,
        action=action,
    )
    config = tiny_config(chunk_size=16, n_action_steps=8)
    recorded = tiny_config(state_feature_names=STATES, action_feature_names=ACTIONS)

    def pictures_at(rows: list[int]) -> dict[str, torch.Tensor]:
        """A square of a picture for each number."""
        images = torch.zeros(len(rows), 3, 24, 24)
        if show:
            images[:, 0, 0, : shown.shape[1]] = torch.from_numpy(shown[rows]).float()
        return {"front": images}

    inputs = Inputs(None, None, None)
    inputs.__dict__.update(
        columns=columns,
        config=config,
        recorded=recorded,
        metadata=SimpleNamespace(fps=FPS),
        tasks={0: "put it into the basket"},
        pairing=Pairing.of(columns, STATES, ACTIONS, FPS),
        pictures_at=pictures_at,
        **changes,
    )
    return inputs


def healthy() -> list[Recorded]:
    return [episode(seed) for seed in range(EPISODES)]


CHECKS: list[Callable[[Inputs], Any]] = [
    demonstrations.grippers_change_before_the_end,
    demonstrations.pauses_show_when_they_end,
    demonstrations.same_states_get_the_same_actions,
    demonstrations.episodes_differ,
]


def found(inputs: Inputs) -> dict[str, Finding]:
    """What is not in order, by the check's name."""
    answers = {check.__name__: list(check(inputs)) for check in CHECKS}
    assert all(answers.values()), "each says that it is in order, or what is not"
    return {name: of[0] for name, of in answers.items() if of[0].severity is not Severity.FINE}


def test_a_healthy_set_gives_no_finding():
    inputs = inputs_of(healthy())
    assert inputs.columns.lengths.mean() > 40
    assert found(inputs) == {}


@pytest.mark.parametrize("named", [True, False])
def test_an_episode_that_ends_with_the_release(named):
    inputs = inputs_of([episode(seed, rest=4) for seed in range(EPISODES)])
    if not named:  # then by its two values
        inputs.recorded.action_feature_names = None
    (name, finding), *others = found(inputs).items()
    assert (name, others) == ("grippers_change_before_the_end", [])
    assert f"{EPISODES} of {EPISODES} episodes" in finding.what
    change = inputs.columns.lengths[0] - 4
    assert f"episode 0, frame {change}" in finding.evidence
    assert "4 frames (0.20 s)" in finding.evidence
    assert "--after_success" in finding.fix


def test_a_grasp_that_waits_for_a_time():
    inputs = inputs_of([episode(seed, pause=12) for seed in range(EPISODES)])
    (name, finding), *others = found(inputs).items()
    assert name == "pauses_show_when_they_end"
    assert dict(others).keys() <= {"same_states_get_the_same_actions"}, "as such a pause contradicts itself"
    rows = np.flatnonzero((inputs.columns.state[:, 3] < 0.01) & (inputs.columns.episode == 0))
    assert f"episode 0, frame {rows[0] - inputs.columns.episodes[0].start}" in finding.evidence
    length = int(finding.evidence.split("for ")[1].split(" frames")[0])
    assert 12 <= length <= 15
    assert f"--policy.n_action_steps={length}" in finding.fix


def test_a_pause_whose_end_a_camera_shows():
    hands = [episode(seed, pause=12) for seed in range(EPISODES)]
    for hand in hands:
        shut = np.flatnonzero(np.array(hand.states)[:, 3] < 0.01)
        for frame in shut[10:]:
            hand.shown[frame][-1] += 0.5  # a lamp
    assert found(inputs_of(hands)) == {}


def test_a_pause_at_the_end_is_followed_by_nothing():
    hands = healthy()
    for hand in hands:
        for _ in range(20):
            hand.act(np.zeros(3), -1)
    assert found(inputs_of(hands)) == {}


@pytest.mark.parametrize("seen", [False, True])
def test_two_leaders_with_opposite_signs(seen):
    """Where pictures show which of them it is, nothing contradicts."""
    hands = healthy()
    for seed, hand in enumerate(hands):
        leader = seed % 2
        hand.shown = [np.array([leader * seen]) for _ in hand.shown]
        if leader:
            hand.actions = [-action for action in hand.actions]
    faults = found(inputs_of(hands))
    assert ("same_states_get_the_same_actions" in faults) is not seen
    if not seen:
        finding = faults["same_states_get_the_same_actions"]
        pairs = re.findall(r"episode (\d+), frame \d+ and episode (\d+), frame", finding.evidence)
        assert len(pairs) == 3
        assert all((int(a) + int(b)) % 2 for a, b in pairs), "one of each leader"
        assert "'put it into the basket'" in finding.evidence
        assert "modify_tasks" in finding.fix


def test_one_narrow_tube():
    start, thing = np.array([0.0, 0.0, 0.2, 1.0]), np.array([0.15, 0.15, 0.0])
    hands = [episode(seed, push=0.0, state=start, object=thing) for seed in range(EPISODES)]
    (name, finding), *others = found(inputs_of(hands)).items()
    assert (name, others) == ("episodes_differ", [])
    assert f"the {EPISODES} episodes of 'put it into the basket'" in finding.what
    assert "frame" in finding.evidence
    assert list(demonstrations.episodes_differ(inputs_of(hands[:4]))) == [], "four episodes say nothing"
