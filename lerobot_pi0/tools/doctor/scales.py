"""Scales: the normalization statistics of a policy belong to this data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from lerobot.configs import NormalizationMode
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_pi0.configuration_pi0 import Pi0Config, Statistics
from lerobot_pi0.data.aloha import policy_columns
from lerobot_pi0.data.normalization import NEARLY_CONSTANT, NEEDED, QUANTILES
from lerobot_pi0.data.relative_actions import relative_statistics
from lerobot_pi0.data.statistics import vector_statistics
from lerobot_pi0.tools.doctor.finding import Finding, error, fine, listed, warning
from lerobot_pi0.tools.doctor.inputs import Inputs

DEGREES = 180 / np.pi
# How many times wider or narrower the data may be than the statistics say, and how far off their centre, in
# their spread. Some episodes of a dataset are narrower than all of it.
WIDE, WIDER, NARROW = 3.0, 8.0, 1 / 8
OFF, FARTHER = 1.5, 3.0
STALE = 0.02  # difference of recorded and computed statistics, in standard deviations
MODES = (
    """--policy.normalization_mapping='{"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}'"""
)


def actions_are_of_the_policys_kind(inputs: Inputs) -> Iterator[Finding]:
    """Absolute actions for a policy that learned absolute ones, and none made relative twice."""
    pair, config = inputs.pairing, inputs.config
    if pair.kind == "unknown":
        return
    kind = f"the dataset's actions are {pair.kind} ({_evidence(inputs)})"
    if config.relative_actions and pair.kind == "relative":
        yield error(
            "the policy makes actions relative that are relative already",
            f"{kind}; the policy has relative_actions=true and subtracts the state once more",
            "train with --policy.relative_actions=false",
        )
    if config.relative_actions or not inputs.checkpoint or not pair.by_name:
        return
    of = inputs.statistics
    state, action = of.get(OBS_STATE, {}), of.get(ACTION, {})
    names = config.state_feature_names or []
    pairs = [
        (i, names.index(name)) for i, name in enumerate(config.action_feature_names or []) if name in names
    ]
    if not pairs or not {"mean", "std"} <= {*state, *action}:
        return
    (mean_a, std_a), (mean_s, std_s) = (
        (np.asarray(v["mean"], np.float64)[i], np.asarray(v["std"], np.float64)[i])
        for v, i in ((action, [a for a, _ in pairs]), (state, [s for _, s in pairs]))
    )
    alike = (np.abs(mean_a - mean_s) < std_s) & (np.abs(np.log(std_a / std_s)) < np.log(2))
    learned = "absolute" if alike.mean() > 0.5 else "relative"
    if learned != pair.kind:
        yield error(
            f"the policy learned {learned} actions, the dataset's are {pair.kind}",
            f"{kind}; by the policy's statistics {pair.names[0]} has mean {mean_a[0]:.3g} and deviation "
            f"{std_a[0]:.3g} as an action, {mean_s[0]:.3g} and {std_s[0]:.3g} as a state",
            "use the dataset that the policy was trained on, or train on this one; to learn relative "
            "actions from absolute data there is --policy.relative_actions=true",
        )


def pictures_have_statistics(inputs: Inputs) -> Iterator[Finding]:
    """lerobot-train replaces the statistics of every camera by ImageNet's, and stops where there are none."""
    assert inputs.metadata is not None
    missing = [key for key in inputs.metadata.camera_keys if key not in (inputs.metadata.stats or {})]
    if missing:
        yield error(
            "lerobot-train stops before its first step: pictures have no statistics",
            f"meta/stats.json does not mention {listed(missing)}",
            "train with --dataset.use_imagenet_stats=false (the policy does not normalize pictures)",
        )


def recorded_statistics_are_the_datas(inputs: Inputs) -> Iterator[Finding]:
    """`meta/stats.json` says what the data says."""
    assert inputs.metadata is not None
    if len(inputs.columns.episode) != inputs.metadata.total_frames:
        return  # some of the frames are on the hub alone
    stats: Statistics = inputs.metadata.stats or {}
    recompute = _recompute(inputs)
    wrong, averaged = [], []
    for key, values in ((OBS_STATE, inputs.columns.state), (ACTION, inputs.columns.action)):
        if key not in stats:
            yield error(
                f"the dataset has no statistics of '{key}'", "meta/stats.json does not mention it", recompute
            )
            continue
        names, found = _names(inputs.recorded, key, values.shape[1]), vector_statistics(values)
        spread = np.maximum(found["std"], NEARLY_CONSTANT)
        # LeRobot 0.6 averages quantiles over episodes: they count where they are used.
        used = {"mean", "std", "min", "max"}
        if not inputs.config.quantiles_of_frames:
            used |= {*NEEDED.get(_mode(inputs.config, key), ())}
        for name in sorted(used & stats[key].keys() & found.keys()):
            recorded = np.asarray(stats[key][name], np.float64).ravel()
            if recorded.shape != found[name].shape:
                wrong.append((np.inf, f"{key} has {recorded.size} dimensions in them, the data {names}"))
                continue
            for joint in np.flatnonzero(~(np.abs(recorded - found[name]) / spread < STALE)):
                apart = abs(recorded[joint] - found[name][joint]) / spread[joint]
                (averaged if name in QUANTILES else wrong).append(
                    (
                        apart if np.isfinite(apart) else np.inf,
                        f"{name} of {names[joint]} ({key}) is {recorded[joint]:.4g} there, "
                        f"{found[name][joint]:.4g} in the data",
                    )
                )
    if wrong:
        wrong.sort(reverse=True)
        say = error if wrong[0][0] > 1 else warning
        yield say(
            "the dataset's recorded statistics are not those of its data",
            listed([text for _, text in wrong], 3),
            recompute,
        )
    elif averaged:
        averaged.sort(reverse=True)
        yield warning(
            "the quantiles to normalize by are not those of all of the data: LeRobot 0.6 averages them over "
            "episodes",
            listed([text for _, text in averaged], 3),
            "its recompute_stats averages too. Train with mean and standard deviation, which it merges "
            f"exactly: {MODES} (docs/finetuning.md)",
        )
    elif stats:
        yield fine("the dataset's recorded statistics are those of its data")


def policy_has_the_datas_statistics(inputs: Inputs) -> Iterator[Finding]:
    """What the policy normalizes by fits this data: same unit, same range, joint by joint."""
    config, carried = inputs.config, inputs.statistics
    apart: list[Apart] = []
    for key, values in _learned_columns(inputs).items():
        mode = _mode(config, key)
        if mode is NormalizationMode.IDENTITY or key not in carried:
            continue
        data = vector_statistics(values)
        if key == ACTION and config.relative_actions:
            for joint, statistics in _relative(inputs).items():
                for name, value in statistics.items():
                    data[name][joint] = value
        names = _names(inputs.recorded, key, values.shape[1])
        apart += _compare(key, names, mode, carried[key], data)
    if not apart:
        return
    wide = [a for a in apart if not NARROW < a.ratio < WIDE]
    off = [a for a in apart if abs(a.offset) > OFF]
    yield from _units(apart)
    if wide or off:
        worst = sorted({*wide, *off}, key=lambda a: -max(a.ratio, 1 / a.ratio, abs(a.offset)))
        bad = any(a.ratio > WIDER or abs(a.offset) > FARTHER for a in worst)
        yield (error if bad else warning)(
            "the policy normalizes by statistics of other data than this: "
            + listed([f"{a.name} ({a.key})" for a in worst], 3),
            listed([a.text for a in worst], 3),
            "run it on the robot and in the units that it was trained with. To train on this data: "
            "--policy.statistics=dataset",
        )
    else:
        widest = max(apart, key=lambda a: max(a.ratio, 1 / a.ratio))
        yield fine(
            f"the policy's statistics fit the data; the spread differs most in {widest.name} "
            f"({widest.key}), by a factor of {widest.ratio:.2f}"
        )


@dataclass(frozen=True)
class Apart:
    """A joint's data beside the statistics of a policy: how much wider, and how far off in their spread."""

    key: str
    name: str
    ratio: float
    offset: float
    text: str


def _compare(
    key: str, names: list[str], mode: NormalizationMode, carried: dict[str, Any], data: dict[str, np.ndarray]
) -> list[Apart]:
    low, high = NEEDED[mode]
    ends = [
        (np.asarray(of[low], np.float64).ravel(), np.asarray(of[high], np.float64).ravel())
        for of in (carried, data)
    ]
    if mode is NormalizationMode.MEAN_STD:
        (centre, spread), (data_centre, data_spread) = ends
    else:
        (centre, spread), (data_centre, data_spread) = (((a + b) / 2, (b - a) / 2) for a, b in ends)
    found = []
    for joint, name in enumerate(names):
        if not np.isfinite(data_spread[joint]) or data_spread[joint] < NEARLY_CONSTANT:
            continue  # a joint that rests here says nothing of units
        ratio = data_spread[joint] / max(spread[joint], NEARLY_CONSTANT)
        offset = (data_centre[joint] - centre[joint]) / max(
            spread[joint], data_spread[joint], NEARLY_CONSTANT
        )
        text = (
            f"{name}: {centre[joint]:.3g} ± {spread[joint]:.3g} at the policy, {data_centre[joint]:.3g} ± "
            f"{data_spread[joint]:.3g} in the data"
        )
        found.append(Apart(key, name, ratio, offset, text))
    return found


def _units(apart: list[Apart]) -> Iterator[Finding]:
    """Whether most joints are off by the factor between degrees and radians."""
    for factor, here, there in ((DEGREES, "degrees", "radians"), (1 / DEGREES, "radians", "degrees")):
        matching = [a for a in apart if 0.6 < a.ratio / factor < 1.6]
        if len(matching) * 2 > len(apart):
            yield error(
                f"the data looks as if in {here}, the policy learned {there}",
                f"{len(matching)} of {len(apart)} joints are "
                f"{listed([f'{a.ratio:.3g}' for a in matching], 3)} times as wide as in training; 180/π is "
                f"{DEGREES:.1f}. {matching[0].text}",
                f"run the robot in {there} (so101_follower: --robot.use_degrees), or train on data in one "
                "unit",
            )


def _learned_columns(inputs: Inputs) -> dict[str, np.ndarray]:
    """State and actions (frames, dims) of the dataset as the policy's normalizer is given them."""
    return policy_columns(inputs.config, {OBS_STATE: inputs.columns.state, ACTION: inputs.columns.action})


def _relative(inputs: Inputs) -> dict[int, dict[str, float]]:
    """Statistics of each relative joint: dimension of the action → its values."""
    columns, config = _learned_columns(inputs), inputs.config
    reference = config.reference_state
    assert reference is not None  # of every checkpoint with relative actions; names are not
    joints = list(zip(reference.actions, reference.states, strict=True))
    found = relative_statistics(
        np.ascontiguousarray(columns[ACTION][:, [a for a, _ in joints]].T),
        np.ascontiguousarray(columns[OBS_STATE][:, [s for _, s in joints]].T),
        np.array([episode.start for episode in inputs.columns.episodes]),
        config.chunk_size,
    )
    return {action: {name: value[i] for name, value in found.items()} for i, (action, _) in enumerate(joints)}


def _recompute(inputs: Inputs) -> str:
    """The command that computes the dataset's statistics where it is; LeRobot writes a copy otherwise."""
    assert inputs.metadata is not None
    assert inputs.dataset_flags is not None
    name, root = inputs.metadata.repo_id, inputs.dataset_flags.root
    place = f"--repo_id={name} --new_repo_id={name}" + (f" --root={root} --new_root={root}" if root else "")
    return f"lerobot-edit-dataset {place} --operation.type=recompute_stats --operation.overwrite=true"


def _evidence(inputs: Inputs) -> str:
    pair = inputs.pairing
    what = "positions that joints reach" if pair.kind == "absolute" else "movements that joints make"
    return f"they are {what}, correlation {pair.agreements[pair.lag]:.2f}"


def _mode(config: Pi0Config, key: str) -> NormalizationMode:
    kind = "ACTION" if key == ACTION else "STATE"
    return config.normalization_mapping.get(kind, NormalizationMode.IDENTITY)


def _names(config: Pi0Config, key: str, size: int) -> list[str]:
    names = config.action_feature_names if key == ACTION else config.state_feature_names
    return names or [str(i) for i in range(size)]
