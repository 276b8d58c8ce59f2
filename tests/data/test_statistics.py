"""The statistics that a run normalizes by: where they are from, the floor under them, refusals."""

import copy
import gc
import json
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from tiny_dataset import write_dataset
from tiny_policy import ACTION, STATE, raw_batch, statistics, tiny_config

from lerobot_pi0.data.normalization import FLOOR, NEARLY_CONSTANT, NormalizationStatistics
from lerobot_pi0.data.statistics import check_statistics, prepare_statistics, read_statistics
from lerobot_pi0.errors import UserError
from lerobot_pi0.modeling_pi0 import Pi0Policy

RANGES = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}


def mapping(mode: str) -> dict[str, NormalizationMode]:
    chosen = NormalizationMode[mode]
    return {"VISUAL": NormalizationMode.IDENTITY, "STATE": chosen, "ACTION": chosen}


def state(raw: dict[str, Any], stats: dict, **changes: Any) -> torch.Tensor:
    preprocess, _ = make_pre_post_processors(tiny_config(**changes), dataset_stats=stats)
    return preprocess(raw)["observation.state"]


# Epsilon and floor.


def test_z_scores_have_openpis_epsilon():
    stats = statistics()
    deviation = 2 * NEARLY_CONSTANT
    stats["observation.state"]["std"][0] = deviation
    raw = raw_batch()
    raw["observation.state"][:, 0] = stats["observation.state"]["mean"][0] + deviation
    wanted = torch.full((2,), deviation / (deviation + 1e-6))  # 0.995
    torch.testing.assert_close(state(raw, stats)[:, 0], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", RANGES)
def test_ranges_have_openpis_epsilon(mode):
    low, high = RANGES[mode]
    stats, width = statistics(), 2 * NEARLY_CONSTANT
    stats["observation.state"][low][0], stats["observation.state"][high][0] = 0.0, width
    raw = raw_batch()
    raw["observation.state"][:, 0] = width
    wanted = torch.full((2,), 2 * width / (width + 1e-6) - 1)  # 0.990
    found = state(raw, stats, normalization_mapping=mapping(mode))[:, 0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["MEAN_STD", *RANGES])
def test_dimension_that_hardly_moves_is_divided_by_the_floor_and_named(mode, caplog):
    stats = statistics()
    of = stats["observation.state"]
    if mode == "MEAN_STD":
        start, of["std"][1] = of["mean"][1], NEARLY_CONSTANT / 2
    else:
        low, high = RANGES[mode]
        start = of[low][1]
        of[high][1] = start + NEARLY_CONSTANT / 2
    raw = raw_batch()
    raw["observation.state"][:, 1] = start + FLOOR
    names = ["a", "b", "c", "d", "e"]
    with caplog.at_level(logging.WARNING):
        found = state(raw, stats, normalization_mapping=mapping(mode), state_feature_names=names)
    torch.testing.assert_close(found[:, 1], torch.ones(2), atol=1e-4, rtol=0)
    (record,) = caplog.records
    assert "observation.state hardly moves in the data in: b (5.0e-05)" in record.getMessage()
    assert "divided by 0.01" in record.getMessage()


def test_dimensions_that_move_are_not_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        prepare_statistics(tiny_config(), statistics())
    assert not caplog.records


@pytest.mark.parametrize("mode", ["MEAN_STD", *RANGES])
def test_unnormalizing_is_the_exact_inverse_where_dimensions_hardly_move_too(mode):
    stats = statistics()
    for name in ("std", "max", "q99", "q90"):
        stats["action"][name][0] = stats["action"][
            {"max": "min", "q99": "q01", "q90": "q10"}.get(name, name)
        ][0]
    stats["action"]["std"][0] = 0
    processors = make_pre_post_processors(
        tiny_config(normalization_mapping=mapping(mode)), dataset_stats=stats
    )
    raw = raw_batch()
    found = processors[1](processors[0](raw)["action"])
    torch.testing.assert_close(found, raw["action"], atol=1e-6, rtol=1e-6)


def test_prepared_statistics_are_ready_for_any_mode():
    """So that a run may take those of a checkpoint that had another mode."""
    stats = statistics()
    for of in stats.values():
        of["std"][:], of["max"][:], of["q99"][:], of["q90"][:] = 0, of["min"], of["q01"], of["q10"]
    prepared = prepare_statistics(tiny_config(), stats)
    for of in prepared.values():
        assert (of["std"] > 0).all()
        assert all((of[high] > of[low]).all() for low, high in RANGES.values())


def test_preparing_twice_is_preparing_once():
    once = prepare_statistics(tiny_config(), statistics())
    twice = prepare_statistics(tiny_config(), once)
    assert all((once[key][name] == twice[key][name]).all() for key, of in once.items() for name in of)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda stats: {key: copy.deepcopy(of) for key, of in stats.items()},  # as LeRobot after 0.6.1
        lambda stats: {key: {name: torch.tensor(x) for name, x in of.items()} for key, of in stats.items()},
        lambda stats: {key: {name: x.tolist() for name, x in of.items()} for key, of in stats.items()},
    ],
    ids=["deep", "dicts", "tensors", "lists"],
)
def test_a_copy_of_prepared_statistics_is_not_prepared_again(copied):
    raw = statistics()
    raw["observation.state"]["std"][0] = 2e-4  # here epsilon counts
    once = prepare_statistics(tiny_config(), raw)
    twice = prepare_statistics(tiny_config(), copied(once))
    assert all((once[key][name] == twice[key][name]).all() for key, of in once.items() for name in of)
    torch.testing.assert_close(state(raw_batch(), copied(once)), state(raw_batch(), once), rtol=0, atol=0)


def test_statistics_are_prepared_whose_copy_is_known_only_as_long_as_they_are_there():
    """Nobody else has them: then the values are a dataset's own."""
    once = prepare_statistics(tiny_config(), statistics())
    plain = {key: dict(of) for key, of in once.items()}
    assert NormalizationStatistics.known(plain) is once
    del once
    gc.collect()
    assert NormalizationStatistics.known(plain) is None
    assert NormalizationStatistics.known(statistics()) is None


def test_prepared_statistics_reach_the_workers_of_a_data_loader():
    once = prepare_statistics(tiny_config(), statistics())
    again = pickle.loads(pickle.dumps(once))
    assert isinstance(again, NormalizationStatistics)
    assert again["action"]["std"].tolist() == once["action"]["std"].tolist()
    assert again.raw.keys() == once.raw.keys()


def test_other_statistics_of_the_dataset_stay_as_they_are():
    stats = statistics() | {"reward": {"mean": 3}, "observation.images.front": {"mean": 0.5}}
    prepared = prepare_statistics(tiny_config(), stats)
    assert prepared["reward"] is stats["reward"]
    assert prepared["observation.images.front"] is stats["observation.images.front"]


# What the user is told.


def test_three_dimensions_with_the_largest_values_are_told_by_name(caplog):
    stats = statistics()  # 5.5 at most
    stats["action"]["max"][1] = 100.0
    stats["observation.state"]["min"][4] = -50.0
    stats["observation.state"]["max"][3] = 20.0
    names = {"action_feature_names": list("abcd"), "state_feature_names": list("vwxyz")}
    with caplog.at_level(logging.INFO, "lerobot_pi0.data.statistics"):
        prepare_statistics(tiny_config(**names), stats)
    assert caplog.messages == [
        "largest normalized values in the data: 249.5 in b of action; 50.5 in z of observation.state; "
        "24.5 in y of observation.state"
    ]


def test_nothing_is_told_where_nothing_is_normalized(caplog):
    with caplog.at_level(logging.INFO, "lerobot_pi0.data.statistics"):
        prepare_statistics(tiny_config(normalization_mapping=mapping("IDENTITY")), statistics())
    assert not caplog.records


# Refusals.


def test_missing_statistics_stop_training_with_the_command_that_mends_it():
    stats = statistics()
    del stats["action"]["q99"]
    modes = mapping("QUANTILES") | {"STATE": NormalizationMode.MEAN_STD}
    with pytest.raises(
        ValueError, match=r"dataset has no \['q99'\] of 'action'.*ACTION: QUANTILES.*recompute_stats"
    ):
        Pi0Policy(
            tiny_config(normalization_mapping=modes), dataset_stats=stats, dataset_meta=SimpleNamespace()
        )


@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_quantiles_that_the_dataset_does_not_have_are_those_of_its_frames(model, tmp_path):
    """π0.5 takes them from there in any case: LeRobot's are averages over episodes."""
    frames = np.random.default_rng(0).standard_normal((300, STATE + ACTION)) * 7
    dataset = write_dataset(
        tmp_path / "d",
        [("push", frames[:, :STATE], frames[:, STATE:])],
        list("abcde"),
        list("abcd"),
        size=(8, 8),
    )
    stats = statistics()
    for name in ("q01", "q99"):
        del stats["observation.state"][name], stats["action"][name]
    config = tiny_config(model, normalization_mapping=mapping("QUANTILES"))
    found = prepare_statistics(config, stats, dataset.meta)
    for key, columns in (("observation.state", slice(STATE)), ("action", slice(STATE, None))):
        low, high = np.quantile(frames[:, columns], (0.01, 0.99), axis=0)
        np.testing.assert_allclose(found[key]["q01"], low, rtol=1e-5)
        np.testing.assert_allclose(found[key]["q99"], high + 1e-6, rtol=1e-5)
    with pytest.raises(UserError, match=r"has no \['q01', 'q99'\] of 'observation.state'.*recompute_stats"):
        prepare_statistics(config, stats)
    wrong = prepare_statistics(config, statistics(), dataset.meta)
    assert (model == "pi05") == np.array_equal(wrong["action"]["q01"], found["action"]["q01"])


def test_dataset_without_any_statistics_stops_training():
    with pytest.raises(ValueError, match=r"dataset has no \['mean', 'std'\] of 'observation.state'"):
        Pi0Policy(tiny_config(), dataset_stats=None, dataset_meta=SimpleNamespace())


def test_statistics_of_another_size_are_refused():
    stats = statistics()
    stats["action"]["std"] = torch.ones(7)
    with pytest.raises(
        ValueError, match=r"the dataset has statistics of 7 dimensions for 'action', the .* 4"
    ):
        check_statistics(tiny_config(), stats, "the dataset")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_statistics_that_are_not_finite_are_refused_with_the_dimension(value):
    stats: Any = {key: {name: v.tolist() for name, v in of.items()} for key, of in statistics().items()}
    stats["action"]["std"][2] = value
    with pytest.raises(
        UserError, match=r"the dataset has a NaN or infinite std of 'action' in \['c'\].*doctor"
    ):
        prepare_statistics(tiny_config(action_feature_names=list("abcd")), stats)


def dataset_of(state: int) -> Any:
    features = {"observation.state": {"shape": (state,)}, "action": {"shape": (ACTION,)}}
    return SimpleNamespace(features=features)


def test_another_robot_is_refused_with_flags_that_work(tmp_path):
    """The statistics of the dataset were taken already: advice to take them would lead in a circle."""
    Pi0Policy(tiny_config()).save_pretrained(tmp_path)
    stats = statistics()
    stats["observation.state"] = {name: torch.arange(7.0) + 1 for name in stats["observation.state"]}
    with pytest.raises(
        UserError,
        match=r"'observation.state' has 7 dimensions in the dataset and 5.*"
        r"--policy.type=lerobot_pi0 --policy.pretrained_path=",
    ):
        Pi0Policy.from_pretrained(
            tmp_path, config=tiny_config(), dataset_stats=stats, dataset_meta=dataset_of(7)
        )
    # Those flags: a new config, with the dataset's features.
    inputs = dict(tiny_config().input_features or {})
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (7,))
    config = tiny_config(input_features=inputs, pretrained_path=tmp_path)
    policy = Pi0Policy.from_pretrained(
        tmp_path, config=config, dataset_stats=stats, dataset_meta=dataset_of(7)
    )
    assert policy.config.robot_state_feature == inputs["observation.state"]


def test_lerobots_average_of_the_weights_is_refused_beside_the_policys(monkeypatch, tmp_path):
    (tmp_path / "train_config.json").write_text('{"ema": {"enable": true}}')
    for flags in (["--ema.enable=true"], [f"--config_path={tmp_path / 'train_config.json'}"]):
        monkeypatch.setattr("sys.argv", ["lerobot-train", *flags])
        with pytest.raises(UserError, match=r"--ema.enable.*--policy.ema_decay=0"):
            Pi0Policy(tiny_config(), statistics(), dataset_of(5))
        Pi0Policy(tiny_config(ema_decay=0.0), statistics(), dataset_of(5))
    monkeypatch.setattr("sys.argv", ["lerobot-train", *flags, "--ema.enable=false"])
    Pi0Policy(tiny_config(), statistics(), dataset_of(5))


def test_statistics_of_a_checkpoint_whose_weights_come_later(tmp_path):
    """A run on shards that is resumed: LeRobot after 0.6.1 builds the policy and then puts the weights in."""
    save_pipelines(tmp_path, statistics())
    stats = statistics()
    stats["action"]["std"] += 1
    config = tiny_config(statistics="checkpoint", pretrained_path=tmp_path)
    dataset = dataset_of(5)
    Pi0Policy(config, stats, dataset)
    np.testing.assert_allclose(
        dataset.stats["action"]["std"], statistics()["action"]["std"] + 1e-6, rtol=1e-6
    )


def test_renamed_state_and_actions_are_found_in_the_dataset(monkeypatch, tmp_path):
    """LeRobot after 0.6.1 renames the features that it gives the policy, and what is in the batches."""
    renamed = {"observation.qpos": "observation.state", "actions": "action"}
    monkeypatch.setattr("sys.argv", ["lerobot-train", f"--rename_map={json.dumps(renamed)}"])
    features = {
        "observation.qpos": {"dtype": "float32", "shape": (STATE,), "names": list("abcde")},
        "actions": {"dtype": "float32", "shape": (ACTION,), "names": list("abcd")},
    }
    (folder := tmp_path / "data" / "chunk-000").mkdir(parents=True)
    states, actions = np.arange(3 * STATE).reshape(3, STATE), np.arange(3 * ACTION).reshape(3, ACTION)
    columns = {
        "observation.qpos": (states / 10).tolist(),
        "actions": (actions / 10).tolist(),
        "index": range(3),
        "episode_index": [0] * 3,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "file-000.parquet")
    stats = {
        old: {name: np.asarray(x) for name, x in statistics()[new].items()} for old, new in renamed.items()
    }
    config = tiny_config(relative_actions=True, absolute_joints=[])
    config.set_dataset_feature_metadata(features)
    dataset = SimpleNamespace(features=features, stats=stats, root=tmp_path)
    Pi0Policy(config, stats, dataset)
    assert config.state_feature_names == list("abcde")
    assert config.reference_state is not None
    assert config.action_limits is not None
    assert config.action_limits.high == pytest.approx([0.8, 0.9, 1.0, 1.1])
    # As LeRobot renames them: what the policy left is under its own names.
    assert {renamed.get(key, key) for key in dataset.stats} == {"observation.state", "action"}


def test_statistics_of_a_checkpoint_are_refused_where_there_is_none():
    with pytest.raises(ValueError, match=r"starts from random weights.*--policy.path.*statistics=dataset"):
        Pi0Policy(tiny_config(statistics="checkpoint"), statistics(), SimpleNamespace())


# Those of a checkpoint.


def save_pipelines(folder: Path, stats: Any, **changes: Any) -> None:
    for pipeline in make_pre_post_processors(tiny_config(**changes), dataset_stats=stats):
        pipeline.save_pretrained(folder)
    tiny_config(**changes).save_pretrained(folder)


def test_statistics_of_our_checkpoints_are_prepared_and_taken_as_they_are(tmp_path):
    stats = statistics()
    stats["action"]["std"][0] = 0
    save_pipelines(tmp_path, stats)
    found = read_statistics(tmp_path)
    assert isinstance(found, NormalizationStatistics)
    config, others = tiny_config(statistics="checkpoint"), statistics()
    others["action"]["mean"] += 7
    taken = prepare_statistics(config, others, None, tmp_path)
    for key in ("action", "observation.state"):
        for name, value in prepare_statistics(tiny_config(), stats)[key].items():
            np.testing.assert_array_equal(taken[key][name], value)
    assert taken.raw is others


def test_statistics_of_our_checkpoints_from_before_they_were_prepared_get_what_they_lack(tmp_path):
    save_pipelines(tmp_path, NormalizationStatistics(statistics()))
    file = tmp_path / "policy_preprocessor.json"
    saved = json.loads(file.read_text())
    for step in saved["steps"]:
        if step["registry_name"] == "normalizer_processor":
            step["config"]["eps"] = 1e-6
    file.write_text(json.dumps(saved))
    assert not isinstance(read_statistics(tmp_path), NormalizationStatistics)
    taken = prepare_statistics(tiny_config(statistics="checkpoint"), statistics(), None, tmp_path)
    np.testing.assert_allclose(taken["action"]["std"], statistics()["action"]["std"] + 1e-6, rtol=1e-6)


def test_policy_leaves_its_statistics_where_lerobot_takes_them_from():
    dataset = SimpleNamespace(stats=statistics())
    Pi0Policy(tiny_config(), dataset.stats, dataset)
    assert isinstance(dataset.stats, NormalizationStatistics)
    # A second policy for the same dataset starts from the dataset's own again.
    Pi0Policy(tiny_config(), dataset.stats, dataset)
    np.testing.assert_allclose(
        dataset.stats["action"]["std"], statistics()["action"]["std"] + 1e-6, rtol=1e-6
    )
    assert dataset.stats["action"]["std"].shape == (ACTION,)
