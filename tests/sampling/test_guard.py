"""What never reaches a robot: actions that are no numbers, and wild ones."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tiny_policy import ACTION, CHUNK, FRONT, STATE, batch, first, noise, statistics, tiny_config, tiny_policy
from torch.utils._python_dispatch import TorchDispatchMode

from lerobot_pi0.configuration_pi0 import ActionLimits, ReferenceState
from lerobot_pi0.data.normalization import NormalizationStatistics
from lerobot_pi0.data.training_data import make_limits
from lerobot_pi0.errors import UserError
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.sampling.guard import ChunkGuard, check_observation

NAMES = ["pan.pos", "lift.pos", "wrist.pos", "gripper.pos"]
LIMITS = ActionLimits(
    low=[-100.0, -50.0, 0.0, 7.0],
    high=[100.0, 50.0, 10.0, 7.0],
    step=[10.0, 5.0, 1.0, 0.0],
    gain=[0.01, 0.02, 0.1, 1.0],
    offset=[0.0, 0.5, -0.5, -7.0],
)


def normalized(chunk) -> torch.Tensor:
    return torch.tensor(chunk) * torch.tensor(LIMITS.gain) + torch.tensor(LIMITS.offset)


def raw(chunk: torch.Tensor) -> torch.Tensor:
    return (chunk - torch.tensor(LIMITS.offset)) / torch.tensor(LIMITS.gain)


def still(steps: int = 5) -> list[list[float]]:
    return [[0.0, 0.0, 5.0, 7.0] for _ in range(steps)]


def test_what_the_data_has_passes_bit_for_bit():
    chunk = still()
    chunk[2] = [9.0, -4.0, 5.9, 7.009]
    chunk = normalized([chunk])
    assert ChunkGuard(LIMITS, NAMES).hold(chunk) is not None
    assert torch.equal(ChunkGuard(LIMITS, NAMES).hold(chunk), chunk)


def test_range_with_a_margin_of_a_tenth():
    limits = ActionLimits(LIMITS.low, LIMITS.high, None, LIMITS.gain, LIMITS.offset)
    chunk = still()
    chunk[1:3] = [[119.0, 0.0, -2.0, 7.0], [500.0, -200.0, 5.0, 8.0]]
    held = raw(ChunkGuard(limits, NAMES).hold(normalized([chunk])))[0]
    assert held[1].tolist() == pytest.approx([119, 0, -1, 7], abs=1e-4)
    assert held[2].tolist() == pytest.approx([120, -60, 5, 7.01], abs=1e-4)


def test_steps_are_no_larger_than_the_datas_and_a_tenth():
    chunk = still(6)
    chunk[2:] = [[60.0, 0.0, 5.0, 7.0]] * 4
    held = raw(ChunkGuard(LIMITS, NAMES).hold(normalized([chunk])))[0]
    assert held[:, 0].tolist() == pytest.approx([0, 0, 11, 22, 33, 44], abs=1e-4)


def test_only_what_is_too_fast_changes():
    chunk = normalized([[[0.1 * i, 0.7 * i, 5 + 0.1 * i, 7.0] for i in range(20)]])
    chunk[:, 10:, 0] += 3.0
    held = ChunkGuard(LIMITS, NAMES).hold(chunk)
    assert torch.equal(held[..., 1:], chunk[..., 1:])
    assert not torch.equal(held[..., 0], chunk[..., 0])


def test_a_chunk_begins_no_further_from_the_action_before_it_than_the_data_steps():
    guard = ChunkGuard(LIMITS, NAMES)
    chunk = still()
    for action in chunk[2:]:
        action[0] = 40.0
    before = normalized([[0.0, 0.0, 5.0, 7.0]])
    assert guard.hold(normalized([chunk[2:]]), before)[0, :, 0].tolist() == pytest.approx([0.11, 0.22, 0.33])


def test_what_never_moves_within_an_episode_may_do_so_a_little():
    """A gripper that is open in some episodes and closed in others: the data has no step of it."""
    limits = ActionLimits(LIMITS.low, LIMITS.high, [0.0] * ACTION, LIMITS.gain, LIMITS.offset)
    chunk = still(4)
    chunk[1][0], chunk[2][0], chunk[3][0] = 3.9, 0.0, 50.0
    held = raw(ChunkGuard(limits, NAMES).hold(normalized([chunk])))[0]
    assert held[:, 0].tolist() == pytest.approx([0, 3.9, 0, 4], abs=1e-4)  # a fiftieth of the range


def wild(guard: ChunkGuard, num_chunks: int, joint: int = 1) -> None:
    chunk = still()
    for step in chunk:
        step[joint] = 80.0
    for _ in range(num_chunks):
        guard.hold(normalized([chunk]))


def test_clamped_chunks_are_summed_up_ever_less_often(caplog):
    guard = ChunkGuard(LIMITS, NAMES)
    for _ in range(30):
        guard.hold(normalized([still()]))
    assert caplog.messages == []
    assert guard.summary == ""
    wild(guard, 1, joint=2)
    wild(guard, 11)
    assert guard.num_held == {"lift.pos": 11, "wrist.pos": 1}
    assert len(caplog.messages) == 2  # the 1st and the 10th
    assert caplog.messages[1] == (
        "chunk guard: 10 of 40 chunks were clamped to the range and the steps of the training data: lift.pos "
        "in 9, wrist.pos in 1. The last of lift.pos: held at 60 instead of 80; the data, with a margin, has "
        "-60 to 60, in steps of at most 5.5. Where the robot may leave this range: --policy.chunk_guard=false"
    )


def test_a_summary_names_three_joints(caplog):
    guard = ChunkGuard(LIMITS, NAMES)
    guard.hold(normalized([[[900.0, 900.0, 900.0, 900.0]]]))
    assert "pan.pos in 1, lift.pos in 1, wrist.pos in 1 and 1 more. The last of pan.pos" in guard.summary


def test_a_policy_whose_chunks_are_mostly_clamped_is_said_to_lack_training():
    guard = ChunkGuard(LIMITS, NAMES)
    wild(guard, 9)
    assert "not trained enough" not in guard.summary
    wild(guard, 1)
    assert "not trained enough" in guard.summary
    assert "chunk_guard=false" not in guard.summary


def test_a_chunk_that_is_clamped_again_for_the_action_before_it_counts_once(caplog):
    guard = ChunkGuard(LIMITS, NAMES)
    chunk = still()
    for step in chunk:
        step[1] = 80.0
    held = guard.hold(normalized([chunk, still()]))
    before = normalized([[50.0, 0.0, 5.0, 7.0]] * 2)
    guard.hold(held, before)  # clamps the first joint of both
    assert (guard.num_clamped, guard.num_chunks) == (2, 2)
    assert guard.num_held == {"pan.pos": 2, "lift.pos": 1}


def test_chunks_that_no_robot_gets_do_not_count(caplog):
    guard = ChunkGuard(LIMITS, NAMES)
    with guard.not_counting():
        wild(guard, 3)
    assert (guard.num_chunks, guard.summary, caplog.messages) == (0, "", [])


def guarded(**changes) -> Pi0Policy:
    limits = ActionLimits([-0.1] * ACTION, [0.1] * ACTION, [0.01] * ACTION, [1.0] * ACTION, [0.0] * ACTION)
    return tiny_policy(action_limits=limits, action_feature_names=NAMES, **changes)


def test_every_way_out_of_the_policy_is_guarded():
    policy, observation = guarded(), first(batch())
    free = guarded(chunk_guard=False).predict_action_chunk(observation, noise=noise(1))
    assert free.abs().max() > 0.2
    chunks = [
        policy.predict_action_chunk(observation, noise=noise(1)),
        policy.plan(policy.encode(observation), num_samples=2),
        policy.predict_action_chunk(observation, inference_delay=2, prev_chunk_left_over=free[0]),
    ]
    for chunk in chunks:
        assert chunk.abs().max() <= 0.1201
        assert chunk.diff(dim=1).abs().max() <= 0.0201
    policy.reset()
    assert policy.select_action(observation).abs().max() <= 0.1201


@pytest.mark.parametrize("chunk_guard", [True, False])
def test_what_never_changes_in_the_data_leaves_the_policy_unchanged(chunk_guard):
    limits = ActionLimits([-9.0] * ACTION, [9.0] * ACTION, None, [0.1] * ACTION, [0.2] * ACTION)
    limits.low[1] = limits.high[1] = 3.0
    policy = tiny_policy(action_limits=limits, chunk_guard=chunk_guard)
    chunk = policy.predict_action_chunk(first(batch()), noise=noise(1))
    assert torch.equal(chunk[..., 1], torch.full_like(chunk[..., 1], 3.0 * 0.1 + 0.2))
    assert (chunk.diff(dim=1).abs().amax((0, 1)) > 0).tolist() == [True, False, True, True]


def test_no_step_between_two_chunks_is_larger_than_the_datas():
    policy, observation = guarded(n_action_steps=2), first(batch())
    torch.manual_seed(0)
    sent = [policy.select_action(observation) for _ in range(10)]
    assert torch.stack(sent).diff(dim=0).abs().max() <= 0.0201
    last = sent[-1]
    steps = []
    for start in (noise(1), -noise(1)):
        policy.reset()  # another episode goes on from nothing
        free = policy.predict_action_chunk(observation, noise=start)
        assert torch.equal(policy.select_action(observation, noise=start), free[:, 0])
        steps.append((free[:, 0] - last).abs().max())
    assert max(steps) > 0.0201

    # Real-time chunking: what follows the last old action that is executed.
    left = torch.full((CHUNK, ACTION), 0.05)
    chunk = policy.predict_action_chunk(
        observation, noise=noise(1), inference_delay=2, prev_chunk_left_over=left
    )
    assert torch.equal(chunk[0, :2], left[:2])
    assert (chunk[0, 2] - left[1]).abs().max() <= 0.0201


# The first action.

POSE = ReferenceState(actions=[0, 2], states=[1, 4], gain=[1.0, 1.0], offset=[0.0, 0.0])
AT = 0.05  # joints 0 and 2 of the robot, whose first action without limits is elsewhere


def standing(**changes) -> tuple[Pi0Policy, dict[str, Any]]:
    """A guarded policy whose actions 0 and 2 are positions of the state's 1 and 4, and an observation."""
    policy, observation = guarded(**changes), first(batch())
    limits = policy.config.action_limits
    assert limits is not None
    config = {"action_limits": replace(limits, pose=POSE), "action_feature_names": NAMES}
    observation["observation.state"] = torch.full((1, STATE), AT)
    return tiny_policy(**config | changes), observation


def ways_to_begin(policy: Pi0Policy, observation: dict[str, Any]) -> list[torch.Tensor]:
    """The first actions of an episode: in turn, and of real-time chunking (also the policy server's way)."""
    policy.reset()
    return [
        torch.stack([policy.select_action(observation, noise=noise(1)) for _ in range(3)], 1),
        policy.predict_action_chunk(observation, noise=noise(1), inference_delay=0)[:, :3],
    ]


def test_the_first_action_is_a_step_of_the_data_from_where_the_robot_is():
    policy, observation = standing()
    free = policy.predict_action_chunk(observation, noise=noise(1))
    assert (free[0, 0, [0, 2]] - AT).abs().min() > 0.0201
    for begun in ways_to_begin(policy, observation):
        assert (begun[0, 0, [0, 2]] - AT).abs().max() <= 0.0201
        assert torch.equal(begun[0, 0, [1, 3]], free[0, 0, [1, 3]])  # which are no positions of the state
        assert begun.diff(dim=1).abs().max() <= 0.0201  # and so it goes on


def test_a_first_action_that_is_far_is_refused_with_the_distance_or_free_as_it_is_set():
    policy, observation = standing(first_action="refuse")
    for begin in (
        lambda: policy.select_action(observation, noise=noise(1)),
        lambda: policy.predict_action_chunk(observation, noise=noise(1), inference_delay=0),
    ):
        with pytest.raises(
            UserError, match=r"pan\.pos by 0\.\d+ \(a step is at most 0\.02\).*first_action=clamp"
        ):
            begin()
    near = policy.predict_action_chunk(observation, noise=noise(1))[:, 0]
    observation["observation.state"][:, [1, 4]] = near[:, [0, 2]]
    assert torch.isfinite(policy.select_action(observation, noise=noise(1))).all()
    policy, observation = standing(first_action="free")
    free = policy.predict_action_chunk(observation, noise=noise(1))
    for begun in ways_to_begin(policy, observation):
        assert torch.equal(begun, free[:, :3])


def test_only_joints_whose_actions_are_positions_of_the_state_have_a_pose(tmp_path):
    """Of three that are called alike: a position, changes of a position, and a position of another thing."""
    generator = np.random.default_rng(0)
    state = 50 + generator.standard_normal((40, STATE)).cumsum(0)
    elsewhere = generator.standard_normal(40).cumsum()
    actions = np.stack([state[:, 1] + 0.1, np.gradient(state[:, 0]), elsewhere, state[:, 3]], 1)
    config = tiny_config(
        action_feature_names=["a", "b", "c", "another"], state_feature_names=["b", "a", "c", "d", "e"]
    )
    given = NormalizationStatistics(statistics())
    found = make_limits(config, given, dataset(tmp_path, actions, [0] * 40, state))
    assert found is not None
    assert found.pose is not None
    assert (found.pose.actions, found.pose.states) == ([0], [1])
    mean, std = (statistics()["observation.state"][name][1].item() for name in ("mean", "std"))
    normal = (state[:, 1] - mean) / std * found.pose.gain[0] + found.pose.offset[0]
    np.testing.assert_allclose((normal - found.offset[0]) / found.gain[0], state[:, 1], rtol=1e-5)


# Numbers.


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("key", "named"), [("observation.state", r"\['2'\]"), (FRONT, "")])
def test_an_observation_that_is_no_number_is_refused_by_name(key, named, bad):
    observation = first(batch())
    observation[key] = observation[key].clone()
    observation[key].view(-1)[2] = bad
    policy = tiny_policy()
    for act in (policy.predict_action_chunk, policy.select_action, policy.encode):
        with pytest.raises(ValueError, match=f"'{key}' of the observation is NaN or infinite in .*{named}"):
            act(observation)
    assert not policy.action_queue


class HostReads(TorchDispatchMode):
    """Counts the numbers that the host asks for: on a GPU it would wait for each."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")
        return func(*args, **(kwargs or {}))


def test_the_host_asks_once_whether_an_observation_is_finite():
    cameras = {f"observation.images.{i}": torch.rand(1, 3, 8, 8) for i in range(3)}
    given = cameras | {"observation.state": torch.zeros(1, 3)}
    with HostReads() as reads:
        check_observation(given, dict.fromkeys(given))
    assert reads.count == 1
    pictures = {key: torch.zeros(1, 3, 8, 8, dtype=torch.uint8) for key in cameras}
    with HostReads() as reads:
        check_observation(pictures, dict.fromkeys(pictures))
    assert reads.count == 0


def test_actions_that_are_no_numbers_are_not_sent(monkeypatch):
    policy = tiny_policy(action_feature_names=NAMES, chunk_guard=False)
    with torch.no_grad():
        policy.model.action_out_proj.bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or Inf for .*'lift.pos'.*no action was sent"):
        policy.select_action(first(batch()))


# Limits of a dataset.


def dataset(
    tmp_path, actions: np.ndarray, episodes: list[int], states: np.ndarray | None = None
) -> SimpleNamespace:
    folder = tmp_path / "data" / "chunk-000"
    folder.mkdir(parents=True)
    columns = {
        "action": list(actions.astype(np.float32)),
        "episode_index": episodes,
        "index": list(range(len(episodes))),
    }
    if states is not None:
        columns["observation.state"] = list(states.astype(np.float32))
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "file-000.parquet")
    return SimpleNamespace(root=tmp_path)


def test_limits_are_the_datas_and_no_step_crosses_an_episode(tmp_path):
    actions = np.zeros((6, ACTION))
    actions[:3, 0], actions[3:, 0] = [0, 2, 3], [50, 49, 49.5]
    found = make_limits(
        tiny_config(), NormalizationStatistics(statistics()), dataset(tmp_path, actions, [0, 0, 0, 1, 1, 1])
    )
    assert found is not None
    assert found.step is not None
    assert (found.low[0], found.high[0], found.step[0]) == (0, 50, 2)
    mean, std = (statistics()["action"][name][0].item() for name in ("mean", "std"))
    assert found.gain[0] * 50 + found.offset[0] == pytest.approx((50 - mean) / std, rel=1e-5)


def test_without_frames_on_disk_the_range_is_that_of_the_statistics():
    found = make_limits(tiny_config(), NormalizationStatistics(statistics(), statistics()), None)
    assert found is not None
    assert found.low == [-1, -2, -3, -4]
    assert found.step is None
    assert make_limits(tiny_config(), NormalizationStatistics(statistics()), None) is None


def test_training_writes_the_limits_into_the_checkpoint(tmp_path):
    policy = Pi0Policy(tiny_config(), dataset_stats=statistics())
    policy.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["action_limits"]
    assert saved["high"] == [1, 2, 3, 4]
    loaded = Pi0Policy.from_pretrained(tmp_path)
    assert loaded.action_space.guard is not None
    assert loaded.config.action_limits == policy.config.action_limits


def test_float_images_of_0_to_255_are_refused():
    observation = first(batch())
    policy = tiny_policy()
    levels = (255 * observation[FRONT]).round()
    with pytest.raises(ValueError, match=rf"'{FRONT}' has values up to 25\d, but float images are"):
        policy.select_action(observation | {FRONT: levels})
    policy.select_action(observation | {FRONT: levels.to(torch.uint8)})
