"""Relative actions: their statistics, what they are relative to, and LeRobot's ways to training and running.

LeRobot's own relative step is refused by its rollout, and its fine-tuning puts the dataset's absolute
statistics over those of a checkpoint. Here the policy itself makes actions relative and absolute.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot_commands import checkpoint, run
from tiny_dataset import write_dataset
from tiny_policy import ACTION, CHUNK, FRONT, SIZES, STATE, noise, statistics, tiny_config, tiny_policy
from torch import Tensor

from lerobot_pi0.configuration_pi0 import Pi0Config, ReferenceState
from lerobot_pi0.data import normalization, relative_actions
from lerobot_pi0.data.normalization import NormalizationStatistics
from lerobot_pi0.data.relative_actions import relative_joints, relative_statistics
from lerobot_pi0.data.statistics import prepare_statistics
from lerobot_pi0.data.training_data import check_first_batch
from lerobot_pi0.errors import UserError
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.processor_pi0 import make_lerobot_pi0_pre_post_processors

ACTIONS = ["pan", "lift", "gripper", "roll"]
STATES = ["gripper", "roll", "pan", "current", "lift"]  # in another order, and one more
JOINTS = [(0, 2), (1, 4), (3, 1)]
NAMES = {"action_feature_names": ACTIONS, "state_feature_names": STATES}
Run = tuple[Any, Any, Any, Any]  # policy, preprocessor, postprocessor, the dataset's metadata
LENGTHS = (9, 4, 12)  # one episode is shorter than a chunk
MODES = ("MEAN_STD", "QUANTILES", "QUANTILE10", "MIN_MAX", "IDENTITY")


def mapping(mode: str) -> dict[str, NormalizationMode]:
    chosen = NormalizationMode[mode]
    return {"VISUAL": NormalizationMode.IDENTITY, "STATE": chosen, "ACTION": chosen}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> LeRobotDataset:
    """Actions a little ahead of a state that wanders far."""
    root = tmp_path_factory.mktemp("data") / "arm"
    generator, episodes = np.random.default_rng(0), []
    for length in LENGTHS:
        steps = generator.standard_normal((length, STATE)).cumsum(0)
        states = 100 * generator.standard_normal(STATE) + steps
        ahead = 1 + generator.standard_normal((length, ACTION)) / 10
        episodes.append(("reach", states, states[:, [STATES.index(name) for name in ACTIONS]] + ahead))
    write_dataset(root, episodes, STATES, ACTIONS, repo_id="local/arm")
    return LeRobotDataset(
        "local/arm",
        root=root,
        delta_timestamps={"action": [i / 20 for i in range(CHUNK)]},
        return_uint8=True,
    )


def metadata(dataset: LeRobotDataset) -> Any:
    """Afresh, as each run of LeRobot reads it."""
    return LeRobotDatasetMetadata(dataset.repo_id, dataset.root)


def frames(dataset: LeRobotDataset, *indices: int) -> dict[str, Any]:
    """A batch as LeRobot's data loader gives it."""
    batch = torch.utils.data.default_collate([dataset[i] for i in indices])
    return batch | {FRONT: batch[FRONT].float() / 255}


def columns(dataset: LeRobotDataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = dataset.hf_dataset.with_format("numpy")
    return (
        np.stack([*rows["action"]]).astype(np.float64),
        np.stack([*rows["observation.state"]]).astype(np.float64),
        np.array([*rows["episode_index"]]),
    )


def brute_force(dataset: LeRobotDataset, joints=JOINTS, chunk: int = CHUNK) -> np.ndarray:
    """All relative actions (any, joints) of all chunks, frame by frame."""
    actions, states, episodes = columns(dataset)
    return np.array(
        [
            [actions[t + step, a] - states[t, s] for a, s in joints]
            for t in range(len(actions))
            for step in range(chunk)
            if t + step < len(actions) and episodes[t + step] == episodes[t]
        ]
    )


# As lerobot-train goes about it (scripts/lerobot_train.py, train).


def start(config: Pi0Config, dataset: LeRobotDataset, resume: bool = False) -> Run:
    """Policy and pipelines of a run, and the dataset's metadata, which has become the run's."""
    meta = metadata(dataset)
    policy: Any = make_policy(config, ds_meta=meta)
    path: Any = config.pretrained_path
    settings: dict[str, Any] = {} if path and resume else {"dataset_stats": meta.stats}
    if path:
        pre: dict[str, Any] = {
            "device_processor": {"device": "cpu"},
            "normalizer_processor": {
                "features": {**policy.config.input_features, **policy.config.output_features},
                "norm_map": policy.config.normalization_mapping,
            },
            "rename_observations_processor": {"rename_map": {}},
        }
        post: dict[str, Any] = {
            "unnormalizer_processor": {
                "features": policy.config.output_features,
                "norm_map": policy.config.normalization_mapping,
            }
        }
        if not resume:
            pre["normalizer_processor"]["stats"] = post["unnormalizer_processor"]["stats"] = meta.stats
        settings |= {"preprocessor_overrides": pre, "postprocessor_overrides": post}
    preprocess, postprocess = make_pre_post_processors(config, pretrained_path=path, **settings)
    return policy, preprocess, postprocess, meta


def save(run: Run, folder: Path) -> Path:
    for part in run[:3]:
        part.save_pretrained(folder)
    return folder


def again(folder: Path, *overrides: str) -> Any:
    """The config of `--policy.path=folder --policy.…`."""
    config = PreTrainedConfig.from_pretrained(folder, cli_overrides=[*overrides])
    config.pretrained_path = folder
    return config


def relative_config(**changes: Any) -> Pi0Config:
    return tiny_config(relative_actions=True, **changes)


def targets(run: Run, raw: dict[str, Any], monkeypatch) -> Tensor:
    """The actions (batch, chunk, action size) that the network is trained to give."""
    policy, preprocess, *_ = run
    seen: list[Tensor] = []

    def loss(observation, actions, noise, time, prefix):
        seen.append(actions)
        return torch.zeros_like(noise)

    monkeypatch.setattr(policy.model, "loss", loss)
    policy.forward(preprocess(raw))
    assert not seen[0][..., ACTION:].any()
    return seen[0][..., :ACTION]


class Perfect:
    """A sampler that gives what the network was trained to give."""

    def __init__(self, target: Tensor):
        self.target = torch.nn.functional.pad(target, (0, 8 - ACTION))

    def sample(self, observation: Any, noise: Tensor, *_: Any) -> Tensor:
        return self.target


def assert_relative(run: Run, dataset: LeRobotDataset) -> None:
    """The normalizer holds the statistics of relative actions for relative joints, the gripper's own."""
    relative, (actions, states, _) = brute_force(dataset), columns(dataset)
    mean, std = actions.mean(0), actions.std(0)
    mean[[a for a, _ in JOINTS]], std[[a for a, _ in JOINTS]] = relative.mean(0), relative.std(0)
    assert_normalizes(run, mean, std, states)


def assert_absolute(run: Run, dataset: LeRobotDataset) -> None:
    actions, states, _ = columns(dataset)
    assert_normalizes(run, actions.mean(0), actions.std(0), states)
    assert run[0].config.reference_state is None


def assert_normalizes(run: Run, mean: np.ndarray, std: np.ndarray, states: np.ndarray) -> None:
    _, preprocess, postprocess, _ = run
    for value in (0.0, 1.0):
        found = postprocess(torch.full((1, ACTION), value))[0]
        # LeRobot adds up the dataset's own in float32.
        torch.testing.assert_close(
            found.double(), torch.tensor(mean + value * (std + 1e-6)), rtol=1e-4, atol=1e-3
        )
    raw = {"task": ["reach"], "observation.state": torch.tensor(states.mean(0))[None].float()}
    found = preprocess(raw | {FRONT: torch.zeros(1, 3, 48, 64)})["observation.state"]
    torch.testing.assert_close(found, torch.zeros(1, STATE), rtol=0, atol=1e-3)


# Statistics.


def test_statistics_are_those_of_every_relative_action_one_by_one(dataset):
    prepared = prepare_statistics(relative_config(**NAMES), metadata(dataset).stats, metadata(dataset))
    wanted = brute_force(dataset)
    joints = [a for a, _ in JOINTS]
    for name, value in {
        "mean": wanted.mean(0),
        "std": wanted.std(0) + 1e-6,
        "min": wanted.min(0),
        "max": wanted.max(0) + 1e-6,
        "q01": np.quantile(wanted, 0.01, axis=0),
        "q50": np.quantile(wanted, 0.5, axis=0),
        "q99": np.quantile(wanted, 0.99, axis=0) + 1e-6,
    }.items():
        np.testing.assert_allclose(prepared["action"][name][joints], value, rtol=1e-6, atol=1e-6)
        own = metadata(dataset).stats["action"][name][2]
        np.testing.assert_allclose(prepared["action"][name][2], own, atol=2e-6)


def all_relative(actions: np.ndarray, states: np.ndarray, borders: np.ndarray, chunk: int) -> np.ndarray:
    """All relative actions (dims, any) of all chunks."""
    frames = np.arange(actions.shape[1])
    episode = np.searchsorted(borders, frames, side="right")
    pairs = [(frames[: len(frames) - step], frames[step:]) for step in range(chunk)]
    pairs = [(now[(same := episode[now] == episode[then])], then[same]) for now, then in pairs]
    return np.concatenate([actions[:, then].astype(float) - states[:, now] for now, then in pairs], 1)


@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_statistics_of_many_frames_are_those_of_all_their_chunks(chunk):
    """More frames than are taken at once, and an episode that goes on where that ends."""
    generator = np.random.default_rng(1)
    actions, states = generator.standard_normal((2, 2, 20_000)).astype(np.float32)
    borders = np.array([0, 1, 60, 8000, 8190, 16_300])
    found = relative_statistics(actions, states, borders, chunk)
    wanted = all_relative(actions, states, borders, chunk)
    assert wanted.shape[1] < 2**19, "quantiles are of all of them"
    for name, value in {
        "mean": wanted.mean(1),
        "std": wanted.std(1),
        "min": wanted.min(1),
        "max": wanted.max(1),
        "q01": np.quantile(wanted, 0.01, axis=1),
        "q99": np.quantile(wanted, 0.99, axis=1),
    }.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-9)


def test_statistics_lose_no_digits_far_from_zero():
    actions = 1e6 + np.random.default_rng(2).standard_normal((1, 5000))
    found = relative_statistics(actions, np.zeros((1, 5000)), np.array([0]), 1)
    np.testing.assert_allclose(found["std"], actions.std(1), rtol=1e-9)


def test_quantiles_of_a_large_dataset_are_those_of_evenly_spread_actions():
    generator = np.random.default_rng(3)
    borders = np.array([0, 7_000])
    actions, states = generator.standard_normal((2, 1, 40_000))
    actions += np.linspace(0, 5, 40_000)
    found = relative_statistics(actions, states, borders, 16)
    exact = all_relative(actions, states, borders, 16)
    assert exact.shape[1] > 2**19, "more than quantiles are taken from"
    for name, share in {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}.items():
        np.testing.assert_allclose(found[name], np.quantile(exact, share, axis=1), atol=0.05)
    np.testing.assert_allclose(found["max"], exact.max(1))


def test_streamed_dataset_is_refused_with_both_ways_out(dataset, tmp_path):
    meta = SimpleNamespace(root=tmp_path, features=dataset.meta.features)
    with pytest.raises(ValueError, match=r"none on this disk.*--dataset.streaming.*--policy.statistics=ch"):
        prepare_statistics(relative_config(**NAMES), metadata(dataset).stats, meta)


# Joints, by name.


def test_joints_are_matched_by_name(dataset):
    assert relative_joints(relative_config(**NAMES)) == JOINTS
    policy, *_ = start(relative_config(), dataset)
    assert policy.config.reference_state is not None
    assert (
        list(zip(policy.config.reference_state.actions, policy.config.reference_state.states, strict=True))
        == JOINTS
    )


def test_permuted_state_gives_the_permuted_anchor():
    order = [4, 2, 0, 1, 3]
    one = tiny_policy(
        relative_actions=True, reference_state=ReferenceState([0, 1], [2, 4], [0.5, 2.0], [1.0, -1.0])
    )
    other = tiny_policy(
        relative_actions=True,
        reference_state=ReferenceState([0, 1], [order.index(2), order.index(4)], [0.5, 2.0], [1.0, -1.0]),
    )
    state = torch.randn(3, STATE)
    found = one.action_space.reference(state)
    assert found is not None
    torch.testing.assert_close(
        found, torch.stack([state[:, 2] / 2 + 1, state[:, 4] * 2 - 1, *2 * [torch.zeros(3)]], 1)
    )
    permuted = other.action_space.reference(state[:, order])
    assert permuted is not None
    assert torch.equal(permuted, found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_feature_names": None}, r"does not name each dimension of 'observation.state'.*=false"),
        ({"action_feature_names": None}, r"does not name each dimension of 'action'.*relative_actions=false"),
        (
            {"state_feature_names": ["gripper", "roll", "x", "y", "z"]},
            r"\['pan', 'lift'\] of the action cannot be found in the state.*"
            r"""--policy.absolute_joints='\["gripper", "pan", "lift"\]'""",
        ),
        ({"state_feature_names": ["pan", "roll", "pan", "y", "lift"]}, r"\['pan'\] of the action cannot"),
        ({"absolute_joints": ["elbow"]}, r"absolute_joints names \['elbow'\], but the joints are \['pan'"),
        ({"absolute_joints": ["l", "gripper", "pan"]}, r"all joints are absolute"),
    ],
)
def test_joints_that_cannot_be_matched_are_refused_with_the_flag(changes, message):
    with pytest.raises(ValueError, match=message):
        relative_joints(relative_config(**NAMES | changes))


def test_words_for_absolute_joints_are_parts_of_names_in_any_case():
    assert relative_joints(relative_config(**NAMES | {"absolute_joints": ["Grip", "PAN"]})) == JOINTS[1:]
    names = {"action_feature_names": ["a", "b"], "state_feature_names": ["b", "a"]}
    assert relative_joints(relative_config(**names)) == [
        (0, 1),
        (1, 0),
    ]  # no gripper: the default is no demand


# There and back.


@pytest.mark.parametrize("mode", MODES)
def test_actions_come_back_absolute_from_what_the_network_is_trained_to_give(dataset, monkeypatch, mode):
    run = start(relative_config(normalization_mapping=mapping(mode)), dataset)
    policy, preprocess, postprocess, meta = run
    raw = frames(dataset, 0, 5, 11, 20)
    target = targets(run, raw, monkeypatch)
    wanted = raw["action"].double().clone()
    for a, s in JOINTS:
        wanted[..., a] -= raw["observation.state"][:, None, s].double()
    gain, offset = normalization.affine(policy.config, meta.stats, "action")
    torch.testing.assert_close(
        target.double(), wanted * torch.tensor(gain) + torch.tensor(offset), rtol=1e-5, atol=1e-3
    )
    monkeypatch.setattr(policy.sampler, "current", lambda: Perfect(target))
    found = postprocess(policy.predict_action_chunk(preprocess(raw), noise=torch.zeros(4, CHUNK, 8)))
    torch.testing.assert_close(found.double(), raw["action"].double(), rtol=1e-5, atol=1e-5)


def test_absolute_joints_are_trained_as_they_are(dataset, monkeypatch):
    run = start(relative_config(), dataset)
    raw = frames(dataset, 3, 14)
    _, preprocess, *_ = run
    assert torch.equal(targets(run, raw, monkeypatch)[..., 2], preprocess(raw)["action"][..., 2])


def test_encoded_observations_anchor_their_own_chunks(dataset):
    policy, preprocess, *_ = start(relative_config(), dataset)
    batch, start_at = preprocess(frames(dataset, 2, 20)), noise()
    chunk = policy.predict_action_chunk(batch, noise=start_at)
    context = policy.encode(batch)
    assert torch.equal(policy.plan(context, noise=start_at), chunk)
    several = policy.plan(context, noise=start_at.repeat_interleave(3, 0), num_samples=3)
    for i in range(3):
        torch.testing.assert_close(several[i::3], chunk, atol=1e-4, rtol=1e-5)


def test_queued_actions_stay_anchored_at_the_observation_of_their_chunk(dataset):
    policy, preprocess, *_ = start(relative_config(chunk_guard=False), dataset)
    policy.eval()
    then, later = preprocess(frames(dataset, 2)), preprocess(frames(dataset, 20))
    start_at = noise(1)
    wanted = policy.predict_action_chunk(then, noise=start_at)
    found = [policy.select_action(then, noise=start_at)] + [policy.select_action(later) for _ in range(2)]
    assert torch.equal(torch.stack(found, 1), wanted[:, :3])
    following = policy.select_action(later, noise=start_at)  # the next chunk has the next reference state
    assert torch.equal(following, policy.predict_action_chunk(later, noise=start_at)[:, 0])


# LeRobot's ways: a new run, a checkpoint of ours, resume. The normalizer must hold the right numbers.


def test_new_run_normalizes_by_relative_statistics(dataset, tmp_path):
    run = start(relative_config(), dataset)
    assert_relative(run, dataset)
    saved = json.loads((save(run, tmp_path) / "config.json").read_text())
    assert saved["relative_actions"]
    assert saved["reference_state"]["actions"] == [0, 1, 3]


def test_checkpoint_runs_as_it_was_trained_without_a_dataset(dataset, tmp_path):
    run = start(relative_config(), dataset)
    folder = save(run, tmp_path)
    loaded = Pi0Policy.from_pretrained(folder)
    assert loaded.config.reference_state == run[0].config.reference_state
    batch = run[1](frames(dataset, 7))
    wanted = run[0].eval().predict_action_chunk(batch, noise=noise(1))
    torch.testing.assert_close(loaded.predict_action_chunk(batch, noise=noise(1)), wanted)


def test_fine_tuning_goes_from_absolute_to_relative_and_back(dataset, tmp_path):
    absolute = start(tiny_config(), dataset)
    assert_absolute(absolute, dataset)
    relative = start(again(save(absolute, tmp_path / "1"), "--relative_actions=true"), dataset)
    assert_relative(relative, dataset)
    assert relative[0].config.reference_state is not None
    once_more = start(again(save(relative, tmp_path / "2")), dataset)
    assert_relative(once_more, dataset)
    assert once_more[0].config.reference_state == relative[0].config.reference_state
    assert_absolute(start(again(tmp_path / "2", "--relative_actions=false"), dataset), dataset)


def test_fine_tuning_with_another_chunk_has_statistics_of_its_own(dataset, tmp_path):
    folder = save(start(relative_config(), dataset), tmp_path)
    *_, meta = start(again(folder, "--chunk_size=3"), dataset)
    relative = brute_force(dataset, chunk=3)
    np.testing.assert_allclose(meta.stats["action"]["std"][[0, 1, 3]], relative.std(0) + 1e-6, rtol=1e-6)


@pytest.mark.parametrize("relative", [False, True])
def test_resumed_run_computes_what_is_saved(dataset, tmp_path, relative):
    new = start(tiny_config(relative_actions=relative), dataset)
    resumed = start(again(save(new, tmp_path)), dataset, resume=True)
    (assert_relative if relative else assert_absolute)(resumed, dataset)
    assert resumed[0].config.reference_state == new[0].config.reference_state
    raw = frames(dataset, 1, 13, 24)
    batch = resumed[1](raw)
    assert torch.equal(batch["action"], new[1](raw)["action"])
    check_first_batch(resumed[0].config, resumed[3].stats, resumed[3], batch)


@pytest.mark.parametrize("relative", [False, True])
def test_statistics_of_our_checkpoint_survive_lerobots_overwriting_on_request(dataset, tmp_path, relative):
    first = start(tiny_config(relative_actions=relative), dataset)
    # Statistics unlike the dataset's.
    first[3].stats["action"]["mean"] += 3
    changed = (first[0], *make_pre_post_processors(first[0].config, dataset_stats=first[3].stats), first[3])
    first[0].config.reference_state = relative_actions.make_reference_state(first[0].config, first[3].stats)
    folder = save(changed, tmp_path)
    taken = start(again(folder, "--statistics=checkpoint"), dataset)
    probe = torch.randn(3, ACTION)
    assert torch.equal(taken[2](probe), changed[2](probe))
    assert not torch.allclose(start(again(folder), dataset)[2](probe), changed[2](probe))
    assert taken[0].config.reference_state == first[0].config.reference_state


def test_absolute_actions_are_not_measured_by_a_checkpoints_relative_statistics(dataset, tmp_path, caplog):
    folder = save(start(relative_config(), dataset), tmp_path)
    caplog.clear()
    with caplog.at_level("INFO", "lerobot_pi0.data.statistics"):
        start(again(folder, "--statistics=checkpoint"), dataset)
    (message,) = (text for text in caplog.messages if text.startswith("largest normalized values"))
    assert "of action" not in message


@pytest.mark.parametrize(
    ("saved", "override"),
    [
        ({"relative_actions": True}, "--relative_actions=false"),
        ({"relative_actions": False}, "--relative_actions=true"),
        ({"relative_actions": True}, '--absolute_joints=["gripper", "roll"]'),
    ],
)
def test_statistics_of_other_actions_are_refused(dataset, tmp_path, saved, override):
    folder = save(start(tiny_config(**saved), dataset), tmp_path)
    with pytest.raises(ValueError, match=r"are those of other actions.*--policy.statistics=dataset"):
        start(again(folder, override, "--statistics=checkpoint"), dataset)


def test_openpis_statistics_do_not_say_of_which_actions_they_are(tmp_path, dataset):
    """A folder of its PyTorch code has a config.json, without a type."""
    (tmp_path / "config.json").write_text(json.dumps({"action_horizon": 50}))
    (assets := tmp_path / "assets" / "robot").mkdir(parents=True)
    of = statistics()
    stats = {
        theirs: {name: x.tolist() for name, x in of[ours].items()}
        for theirs, ours in (("state", "observation.state"), ("actions", "action"))
    }
    (assets / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    config = tiny_config(statistics="checkpoint", relative_actions=True, **NAMES)
    taken = prepare_statistics(config, statistics(), dataset, tmp_path)
    assert taken["action"]["mean"].tolist() == of["action"]["mean"].tolist()


def test_statistics_of_in_tree_checkpoints_must_be_of_the_same_kind(tmp_path, dataset):
    for pipeline in make_lerobot_pi0_pre_post_processors(tiny_config(), statistics()):
        pipeline.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"type": "pi0", "use_relative_actions": True}))
    config = tiny_config(statistics="checkpoint", **NAMES)
    with pytest.raises(ValueError, match="are those of other actions"):
        prepare_statistics(config, metadata(dataset).stats, None, tmp_path)
    config.relative_actions = True
    prepare_statistics(config, metadata(dataset).stats, None, tmp_path)


def test_pipelines_of_relative_actions_need_the_policys_statistics():
    with pytest.raises(ValueError, match=r"computed when the policy is made: make it first, Pi0Policy\("):
        make_lerobot_pi0_pre_post_processors(relative_config(**NAMES), statistics())


def test_flag_that_contradicts_a_checkpoint_is_refused_when_it_runs(dataset, tmp_path):
    folder = save(start(relative_config(), dataset), tmp_path)
    with pytest.raises(ValueError, match=r"relative_actions=false, but the policy was not trained so"):
        Pi0Policy.from_pretrained(folder, config=again(folder, "--relative_actions=false"))
    with pytest.raises(ValueError, match=r"relative_actions=true, but the policy was not trained so"):
        tiny_policy(relative_actions=True)


# The first batch.


@pytest.mark.parametrize("mode", MODES)
def test_first_batch_of_a_run_passes_and_another_does_not(dataset, mode):
    policy, preprocess, _, meta = start(relative_config(normalization_mapping=mapping(mode)), dataset)
    batch = preprocess(frames(dataset, 24, 0, 11))
    check_first_batch(policy.config, meta.stats, meta, batch)
    batch["action"][2, 0, 1] *= 1.01
    with pytest.raises(ValueError, match=r"frame 11 has .* in 'lift' of 'action'"):
        check_first_batch(policy.config, meta.stats, meta, batch)


def test_first_batch_normalized_by_other_statistics_is_refused_by_name(dataset):
    """What LeRobot does to its own relative actions: the dataset's absolute statistics over the run's."""
    policy, _, _, meta = start(relative_config(), dataset)
    preprocess, _ = make_pre_post_processors(tiny_config(**NAMES), dataset_stats=metadata(dataset).stats)
    batch = preprocess(frames(dataset, 24, 5))
    with pytest.raises(
        ValueError, match=r"frame (24|5) has .* in '(pan|lift|roll)' of 'action'; by .*--policy.path"
    ):
        check_first_batch(policy.config, meta.stats, meta, batch)


def test_first_batch_after_the_dataset_has_changed_is_refused(dataset):
    policy, preprocess, _, meta = start(tiny_config(), dataset)
    raw = metadata(dataset).stats
    raw["observation.state"]["mean"][3] += 0.01 * raw["observation.state"]["std"][3]
    other = prepare_statistics(policy.config, raw, meta)
    with pytest.raises(ValueError, match=r"'current' of 'observation.state'"):
        check_first_batch(policy.config, other, meta, preprocess(frames(dataset, 2)))


def test_first_batch_that_holds_no_numbers_is_refused(dataset):
    policy, preprocess, _, meta = start(tiny_config(), dataset)
    batch = preprocess(frames(dataset, 2))
    batch["action"][0, 0, 1] = float("nan")
    with pytest.raises(ValueError, match=r"frame 2 has nan in 'lift' of 'action'"):
        check_first_batch(policy.config, meta.stats, meta, batch)


def test_a_frame_that_is_nan_in_the_dataset_is_named_and_not_called_a_resumed_run(tmp_path):
    generator = np.random.default_rng(0)
    states, actions = generator.standard_normal((2, 8, 3))
    states[5, 1] = np.nan
    names = ["a", "b", "c"]
    write_dataset(tmp_path / "x", [("reach", states, actions)], names, names)
    meta = LeRobotDatasetMetadata("local/tiny", tmp_path / "x")
    features = {
        "input_features": {"observation.state": PolicyFeature(FeatureType.STATE, (3,))},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (3,))},
        "state_feature_names": names,
    }
    config = tiny_config(**features, normalization_mapping=mapping("IDENTITY"))
    batch = {
        "index": torch.arange(8),
        "observation.state": torch.tensor(states),
        "action": torch.tensor(actions),
    }
    with pytest.raises(UserError, match=r"frame 5 of the dataset has nan in 'b' of 'observation.state'") as e:
        check_first_batch(config, NormalizationStatistics({}), meta, batch)
    assert "resumed" not in str(e.value)


def test_first_batch_of_a_streamed_dataset_is_not_checked(dataset, tmp_path):
    policy, preprocess, _, meta = start(tiny_config(), dataset)
    batch = preprocess(frames(dataset, 2))
    batch["action"] += 1
    check_first_batch(
        policy.config, meta.stats, SimpleNamespace(root=tmp_path, features=meta.features), batch
    )
    del batch["index"]
    check_first_batch(policy.config, meta.stats, meta, batch)


# lerobot-train itself.


@pytest.fixture(scope="module")
def ran(dataset, tmp_path_factory) -> Path:
    """Where all commands have run: relative, resumed, to absolute and back, adapters, the checkpoint's."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name: str, *arguments: str) -> list[str]:
        common = [f"--dataset.repo_id={dataset.repo_id}", f"--dataset.root={dataset.root}", "--batch_size=2"]
        quiet = ["--policy.device=cpu", "--policy.push_to_hub=false", "--num_workers=0", "--env_eval_freq=0"]
        return ["lerobot-train", *common, *quiet, f"--output_dir={folder / name}", *arguments]

    def resume(name: str, *arguments: str) -> list[str]:
        config = checkpoint(folder, name) / "train_config.json"
        return ["lerobot-train", f"--config_path={config}", "--resume=true", *arguments]

    def from_run(name: str) -> str:
        return f"--policy.path={checkpoint(folder, name)}"

    new = ["--policy.type=lerobot_pi0", *SIZES, "--policy.tokenizer=small", "--policy.relative_actions=true"]
    commands = [
        train("new", *new, "--steps=2"),
        resume("new", "--steps=3"),
        train("absolute", from_run("new"), "--policy.relative_actions=false", "--steps=1"),
        train("back", from_run("absolute"), "--policy.relative_actions=true", "--steps=1"),
        train("kept", from_run("back"), "--policy.statistics=checkpoint", "--steps=1"),
        train("adapters", from_run("new"), "--peft.method_type=LORA", "--peft.r=4", "--steps=1"),
        resume("adapters", "--steps=2"),
    ]
    run(folder, commands).succeed()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["new", "back", "kept", "adapters"])
def test_lerobot_train_saves_relative_statistics(ran, dataset, name):
    folder = checkpoint(ran, name)
    config = PreTrainedConfig.from_pretrained(folder)
    pipelines = make_pre_post_processors(config, pretrained_path=str(folder))
    assert_relative((SimpleNamespace(config=config), *pipelines, None), dataset)
    assert json.loads((folder / "config.json").read_text())["reference_state"]["states"] == [2, 4, 1]


@pytest.mark.slow
def test_lerobot_train_saves_absolute_statistics_again(ran, dataset):
    folder = checkpoint(ran, "absolute")
    config = PreTrainedConfig.from_pretrained(folder)
    pipelines = make_pre_post_processors(config, pretrained_path=str(folder))
    assert_absolute((SimpleNamespace(config=config), *pipelines, None), dataset)


@pytest.mark.slow
def test_lerobot_train_tells_the_largest_values_before_training(ran):
    log = (ran / "log.txt").read_text()
    assert log.index("relative actions: pan, lift, roll") < log.index("largest normalized values in the data")
    assert log.index("largest normalized values in the data") < log.index("Start offline training")


@pytest.mark.slow
def test_run_resumed_on_another_dataset_is_refused(ran, dataset, tmp_path):
    changed = shutil.copytree(dataset.root, tmp_path / "arm")
    stats = json.loads((changed / "meta" / "stats.json").read_text())
    stats["observation.state"]["mean"][0] += 1
    (changed / "meta" / "stats.json").write_text(json.dumps(stats))
    config = checkpoint(ran, "absolute") / "train_config.json"
    resume = [f"--config_path={config}", "--resume=true", "--steps=2", f"--dataset.root={changed}"]
    done = run(tmp_path, [["lerobot-train", *resume]])
    assert done.returncode != 0
    assert "in 'gripper' of 'observation.state'; by this run's statistics it is" in done.output
    assert "A resumed run needs the dataset and the settings that it began with" in done.output
