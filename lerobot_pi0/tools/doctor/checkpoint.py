"""The checkpoint: is everything there that it needs, does it load, and was it trained?"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from lerobot.configs import NormalizationMode
from lerobot.utils.constants import ACTION, OBS_STATE
from safetensors import safe_open
from torch import Tensor

from lerobot_pi0.checkpoints.files import ADAPTER_CONFIG, Checkpoint
from lerobot_pi0.checkpoints.processors import PIPELINES
from lerobot_pi0.data.normalization import NEEDED
from lerobot_pi0.data.statistics import read_statistics
from lerobot_pi0.tools.doctor.finding import Finding, error, fine, listed, warning
from lerobot_pi0.tools.doctor.inputs import Inputs

ADAPTER_WEIGHTS = "adapter_model.safetensors"
COPY_AGAIN = (
    "copy the whole folder again (lerobot-train: outputs/…/checkpoints/last/pretrained_model): LeRobot's "
    "files belong together"
)
# Of the loss that is reached without looking.
NO_BETTER, HARDLY = 1.1, 0.85


def files_are_there(inputs: Inputs) -> Iterator[Finding]:
    """Processors, tokenizer and statistics travel with the weights."""
    folder = inputs.folder
    missing = [name for name in PIPELINES if not (folder / name).is_file()]
    steps = [
        step
        for name in PIPELINES
        if name not in missing
        for step in json.loads((folder / name).read_text(encoding="utf-8"))["steps"]
    ]
    states = {step["registry_name"]: step.get("state_file") for step in steps if "registry_name" in step}
    for needs, what in (
        ("lerobot_pi0_tokenizer", "tokenizer"),
        ("normalizer_processor", "statistics to normalise by"),
        ("unnormalizer_processor", "statistics to give actions back their unit"),
    ):
        file = states.get(needs)
        if (needs in states and not file) or (file and not (folder / file).is_file()):
            missing.append(f"the {what} ({file or needs})")
    if not missing and "lerobot_pi0_tokenizer" not in states:
        missing.append("the tokenizer's step in policy_preprocessor.json")
    if missing:
        yield error(
            f"the checkpoint lacks {listed(missing)}",
            f"{folder} holds {listed(sorted(path.name for path in folder.iterdir()), 8)}",
            COPY_AGAIN,
        )


def statistics_are_whole(inputs: Inputs) -> Iterator[Finding]:
    """Statistics are finite and of this policy's size, and what normalises is undone by what comes after."""
    folder, config = inputs.folder, inputs.config
    carried = read_statistics(folder)
    for kind, key, feature in (
        ("STATE", OBS_STATE, config.robot_state_feature),
        ("ACTION", ACTION, config.action_feature),
    ):
        mode = config.normalization_mapping.get(kind, NormalizationMode.IDENTITY)
        if mode is NormalizationMode.IDENTITY:
            continue
        of = carried.get(key, {})
        missing = [name for name in NEEDED[mode] if name not in of]
        if missing:
            yield error(
                f"the checkpoint has no {listed(missing)} of '{key}'",
                f"it normalises by {mode.value}, and LeRobot would pass the values on as they are",
                "train it again with a dataset, or take the processors' files of its last checkpoint",
            )
            continue
        sizes = {np.asarray(of[name]).size for name in NEEDED[mode]}
        if feature and sizes != {feature.shape[0]}:
            yield error(
                f"the checkpoint's statistics of '{key}' are those of another robot",
                f"{listed(NEEDED[mode])} have {' and '.join(map(str, sorted(sizes)))} dimensions, in "
                f"config.json it has {feature.shape[0]}",
                "the processors' files are of another checkpoint: " + COPY_AGAIN,
            )
            continue
        wrong = [name for name in NEEDED[mode] if not np.isfinite(np.asarray(of[name], np.float64)).all()]
        low, high = (np.asarray(of[name], np.float64) for name in NEEDED[mode])
        spread = high if mode is NormalizationMode.MEAN_STD else high - low
        if wrong or (spread <= 0).any():
            yield error(
                f"the checkpoint's statistics of '{key}' cannot be divided by",
                f"{listed(wrong) + ' not finite; ' if wrong else ''}the smallest spread is "
                f"{np.nanmin(spread):.3g}",
                "mend the dataset's statistics (lerobot-edit-dataset --operation.type=recompute_stats) and "
                "train again",
            )
    undone = _statistics_of(folder, "policy_postprocessor.json", "unnormalizer_processor")
    differ = [
        name
        for name, value in undone.items()
        if name.startswith("action.")
        and name.removeprefix("action.") in carried.get("action", {})
        and not _alike(value, carried["action"][name.removeprefix("action.")])
    ]
    if differ:
        name = differ[0].removeprefix("action.")
        yield error(
            "actions are normalised by other statistics than they are given back by",
            f"{listed(differ)}: {np.ravel(carried['action'][name])[:3]} before, "
            f"{np.ravel(undone[differ[0]])[:3]} after the policy",
            "the two processors' files are of different checkpoints: " + COPY_AGAIN,
        )


def weights_are_numbers(inputs: Inputs) -> Iterator[Finding]:
    """No weight is NaN or infinite."""
    wrong = [
        name
        for name, tensor in _weights(inputs.folder).items()
        if not tensor.sum(dtype=torch.float64).isfinite()
    ]
    if wrong:
        yield error(
            f"{len(wrong)} tensors hold values that are no numbers",
            listed(wrong),
            "training diverged: go back to an earlier checkpoint, and lower --policy.optimizer_lr",
        )


def weights_are_trained(inputs: Inputs) -> Iterator[Finding]:
    """Weights are not what they start from."""
    weights = _weights(inputs.folder)
    norms = [name for name in weights if name.startswith("expert.") and name.endswith("norm.weight")]
    # Where random weights begin; every step of an optimizer moves them.
    if norms and not any(weights[name].any() for name in norms):
        yield error(
            "the action expert was never trained: its weights are random",
            f"all {len(norms)} norms of the expert stand where they start",
            "name a trained checkpoint; training starts from one with "
            "--policy.pretrained_path=lerobot/pi0_base",
        )
    if "action_out_proj.weight" in weights and not weights["action_out_proj.weight"].any():
        yield error(
            "the layer that gives actions is zero: nothing that the policy sees reaches them",
            "action_out_proj.weight holds zeros alone",
            "the file was made without this layer: take the checkpoint of the training itself",
        )


def policy_loads(inputs: Inputs) -> Iterator[Finding]:
    """Every parameter comes from the file."""
    if inputs.load_error:
        yield error("the policy cannot be loaded", inputs.load_error, COPY_AGAIN)
        return
    policy = inputs.loaded.policy
    total = sum(parameter.numel() for parameter in policy.parameters())
    adapters = (inputs.folder / ADAPTER_CONFIG).is_file()
    print_of = (
        "adapters over a base"
        if adapters
        else f"fingerprint {Checkpoint(inputs.folder).fingerprint_of_heads()[:12]}"
    )
    yield fine(f"{total:,} parameters, all of them from the checkpoint; {print_of}")


def loss_is_below_baseline(inputs: Inputs) -> Iterator[Finding]:
    """On frames of the dataset the policy does better than one that looks at nothing."""
    trial = inputs.trial
    share = trial.loss / trial.baseline_loss
    numbers = (
        f"flow-matching loss {trial.loss:.3f} on {len(trial.state)} frames; knowing the mean and spread of "
        f"each joint alone gives {trial.baseline_loss:.3f}"
    )
    if not share < HARDLY:
        yield (error if not share < NO_BETTER else warning)(
            "on this dataset the policy is no better than one that looks at nothing"
            if not share < NO_BETTER
            else "on this dataset the policy is hardly better than one that looks at nothing",
            numbers,
            "it was trained on something else, for too few steps, or sees other cameras: name its own "
            "dataset to tell",
        )
    else:
        yield fine(numbers)


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-4, equal_nan=True)


def _weights(folder: Path) -> Mapping[str, Tensor]:
    """The checkpoint's tensors; of adapters, theirs."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return Checkpoint(folder)
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _statistics_of(folder: Path, pipeline: str, step_name: str) -> dict[str, np.ndarray]:
    for step in json.loads((folder / pipeline).read_text(encoding="utf-8"))["steps"]:
        if step.get("registry_name") == step_name and step.get("state_file"):
            with safe_open(folder / step["state_file"], framework="np") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return {}
