"""The checkpoint: it is complete, it loads, and it was trained."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from lerobot.configs import NormalizationMode
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from lerobot_pi0.checkpoints.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint
from lerobot_pi0.checkpoints.processors import PIPELINES, tokenizer_step
from lerobot_pi0.checkpoints.published import training_of
from lerobot_pi0.checkpoints.reading import read_steps, read_tensors
from lerobot_pi0.configuration_pi05 import Pi05Config
from lerobot_pi0.data.normalization import NEEDED
from lerobot_pi0.data.statistics import unnormalizer_differences
from lerobot_pi0.tools.doctor.finding import TRAIN_LONGER, Finding, error, fine, listed, note, warning
from lerobot_pi0.tools.doctor.inputs import Inputs

COPY_FOLDER_AGAIN = (
    "copy the whole folder again (lerobot-train: outputs/…/checkpoints/last/pretrained_model): LeRobot's "
    "files belong together"
)
# Share of the loss of a predictor that ignores the observation.
NO_BETTER, HARDLY = 1.1, 0.85


def files_are_there(inputs: Inputs) -> Iterator[Finding]:
    """Processors, tokenizer and statistics travel with the weights."""
    folder = inputs.folder
    missing = [name for name in PIPELINES if not (folder / name).is_file()]
    steps = [step for name in PIPELINES if name not in missing for step in read_steps(folder / name)]
    states = {step["registry_name"]: step.get("state_file") for step in steps if "registry_name" in step}
    for needs, what in (
        (tokenizer_step(inputs.config), "tokenizer"),
        ("normalizer_processor", "statistics to normalize by"),
        ("unnormalizer_processor", "statistics to give actions back their unit"),
    ):
        file = states.get(needs)
        if (needs in states and not file) or (file and not (folder / file).is_file()):
            missing.append(f"the {what} ({file or needs})")
    if not missing and tokenizer_step(inputs.config) not in states:
        missing.append("the tokenizer's step in policy_preprocessor.json")
    if missing:
        yield error(
            f"the checkpoint lacks {listed(missing)}",
            f"{folder} holds {listed(sorted(path.name for path in folder.iterdir()), 8)}",
            COPY_FOLDER_AGAIN,
        )


def statistics_are_whole(inputs: Inputs) -> Iterator[Finding]:
    """Statistics are finite and of this policy's size, and what normalizes is undone by what comes after."""
    folder, config = inputs.folder, inputs.config
    carried = inputs.statistics
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
                f"it normalizes by {mode.value}, and LeRobot would pass the values on as they are",
                "train it again with a dataset, or take the processors' files of its last checkpoint",
            )
            continue
        sizes = {np.asarray(of[name]).size for name in NEEDED[mode]}
        if feature and sizes != {feature.shape[0]}:
            yield error(
                f"the checkpoint's statistics of '{key}' are those of another robot",
                f"{listed(NEEDED[mode])} have {' and '.join(map(str, sorted(sizes)))} dimensions, in "
                f"config.json it has {feature.shape[0]}",
                "the processors' files are of another checkpoint: " + COPY_FOLDER_AGAIN,
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
    if differences := unnormalizer_differences(folder):
        yield error(
            "actions are not unnormalized as they were normalized",
            listed(differences),
            "the two processors' files are of different checkpoints: " + COPY_FOLDER_AGAIN,
        )


def state_is_in_the_prompt(inputs: Inputs) -> Iterator[Finding]:
    """π0.5 sees the state in the prompt alone, in steps over [-1, 1]."""
    config = inputs.config
    if not isinstance(config, Pi05Config):
        return
    mode = config.normalization_mapping["STATE"]
    if not config.state_in_prompt:
        yield note(
            "the policy does not see the state: its prompts have none",
            "state_in_prompt=false, as openpi trained pi05_libero; pictures alone say where the joints are",
        )
    elif mode in (NormalizationMode.MEAN_STD, NormalizationMode.IDENTITY):
        yield warning(
            "the prompt cannot say where the joints are when they are far from their mean"
            if mode is NormalizationMode.MEAN_STD
            else "the state is written into the prompt as it is, not normalized",
            f"prompts have steps over [-1, 1] alone, and the state is normalized by {mode.value}",
            "train with quantiles, π0.5's default: leave STATE out of --policy.normalization_mapping",
        )
    else:
        yield fine(f"the state is in the prompt, normalized by {mode.value}")


def horizon_is_that_of_the_base(inputs: Inputs) -> Iterator[Finding]:
    """A policy from published π0.5 weights predicts as many actions as these were trained on."""
    config = inputs.config
    named = training_of(config.base_checkpoint or "")
    if named and (trained := named[1].chunk_size) != config.chunk_size:
        yield note(
            f"chunks have {config.chunk_size} actions, those of '{config.base_checkpoint}' {trained}",
            "no file of those weights says so; with another number their own actions are of no use, and a "
            "fine-tuning has to learn it",
        )


def weights_are_numbers(inputs: Inputs) -> Iterator[Finding]:
    """All weights are finite."""
    wrong = [
        name
        for name, tensor in _weights(inputs.folder).items()
        if not tensor.sum(dtype=torch.float64).isfinite()
    ]
    if wrong:
        yield error(
            f"{len(wrong)} tensors hold NaN or infinite values",
            listed(wrong),
            "training diverged: go back to an earlier checkpoint, and lower --policy.optimizer_lr",
        )


def weights_are_trained(inputs: Inputs) -> Iterator[Finding]:
    """Weights are not what they start from."""
    weights = _weights(inputs.folder)
    ends = ("norm.weight", "norm.dense.weight")  # plain norms, and adaptive ones
    norms = [name for name in weights if name.startswith("expert.") and name.endswith(ends)]
    # Where random weights begin; every step of an optimizer moves them.
    if norms and not any(weights[name].any() for name in norms):
        yield error(
            "the action expert was never trained: its weights are random",
            f"all {len(norms)} norms of the expert stand where they start",
            "name a trained checkpoint; training starts from one with "
            f"--policy.pretrained_path={inputs.config.published_base}",
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
        yield error("the policy cannot be loaded", inputs.load_error, COPY_FOLDER_AGAIN)
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
    """On frames of the dataset the loss is below that of a predictor that ignores the observation."""
    trial = inputs.trial
    if not trial.baseline_loss:  # no joint moves
        return
    share = trial.loss / trial.baseline_loss
    numbers = (
        f"flow-matching loss {trial.loss:.3f} on {len(trial.state)} frames; a predictor that knows only "
        f"mean and variance of each joint reaches {trial.baseline_loss:.3f}"
    )
    if not share < HARDLY:
        yield (error if not share < NO_BETTER else warning)(
            "on this dataset the policy is no better than one that ignores the observation"
            if not share < NO_BETTER
            else "on this dataset the policy is hardly better than one that ignores the observation",
            numbers,
            TRAIN_LONGER
            if inputs.is_trained_dataset
            else "it was trained on other data, for too few steps, or with other cameras: run the doctor on "
            "its own dataset to find out",
        )
    else:
        yield fine(numbers)


def _weights(folder: Path) -> Mapping[str, Tensor]:
    """The checkpoint's tensors; of adapters, theirs."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return Checkpoint(folder)
    return read_tensors(folder / ADAPTER_WEIGHTS)
