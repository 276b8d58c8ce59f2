"""The policy's predictions at frames of the dataset, compared with the demonstrated actions."""

from collections.abc import Iterator

import numpy as np

from lerobot_pi0.data.normalization import NEARLY_CONSTANT
from lerobot_pi0.tools.doctor.finding import TRAIN_LONGER, Finding, error, fine, listed, warning
from lerobot_pi0.tools.doctor.inputs import Inputs, Trial

MARGIN = 0.25  # of a joint's range, beyond the data
MANY, SOME = 0.3, 0.05  # of predicted actions outside of that
STILL = 0.3  # of the demonstrated movement, and of its variation
WORSE = 1.0  # mean error over that of always giving the average action


def actions_are_finite(inputs: Inputs) -> Iterator[Finding]:
    """Predicted actions and the loss are finite."""
    wrong = ~np.isfinite(inputs.trial.predicted)
    if wrong.any() or not np.isfinite(inputs.trial.loss):
        yield error(
            "the policy predicts NaN or infinite values",
            f"{wrong.mean():.0%} of the predicted values; the loss is {inputs.trial.loss:.3g}",
            "check weights and statistics (findings of the checkpoint); if --policy.dtype=float32 helps, the "
            "precision is the cause",
        )


def actions_stay_in_range(inputs: Inputs) -> Iterator[Finding]:
    """Predicted actions lie within the range of the dataset's, up to a margin."""
    data, predicted = inputs.columns.action, inputs.trial.predicted[inputs.trial.real]
    low, high = data.min(0), data.max(0)
    margin = MARGIN * np.maximum(high - low, NEARLY_CONSTANT)
    outside = (predicted < low - margin) | (predicted > high + margin)
    shares = outside.mean(0) * (high - low > NEARLY_CONSTANT)  # a joint that rests has no range
    if shares.max() > SOME:
        names = inputs.recorded.action_feature_names or [str(i) for i in range(len(shares))]
        worst = int(shares.argmax())
        yield (error if shares.max() > MANY else warning)(
            "predicted actions leave the range of the data: "
            + listed([name for name, share in zip(names, shares, strict=True) if share > SOME]),
            f"{shares[worst]:.0%} of {names[worst]}: {predicted[..., worst].min():.3g} to "
            f"{predicted[..., worst].max():.3g}, in the data {low[worst]:.3g} to {high[worst]:.3g}",
            f"{TRAIN_LONGER}; do not let it drive the robot before"
            if inputs.is_trained_dataset
            else "other units or statistics than in training, or a policy of another robot: see the findings "
            "above; do not let it drive the robot",
        )


def actions_move(inputs: Inputs) -> Iterator[Finding]:
    """The policy moves as much as was demonstrated, and not to the same place from everywhere."""
    trial = inputs.trial
    predicted, shown = (_average(trial, chunks) for chunks in (trial.predicted, trial.demonstrated))
    moving = shown.std(0) > NEARLY_CONSTANT
    if not moving.any():
        return
    spread = shown.std(0)[moving]
    varies = float(np.median(predicted.std(0)[moving] / spread))
    numbers = f"between frames its actions vary by {varies:.0%} of what was demonstrated"
    hold = _hold(inputs)
    if hold is not None:
        moved = [
            np.square((chunks - hold)[:, moving] / spread).mean() ** 0.5 for chunks in (predicted, shown)
        ]
        travel = float(moved[0] / max(moved[1], NEARLY_CONSTANT))
        numbers = f"a chunk moves the joints by {travel:.0%} of what was demonstrated; {numbers}"
        if travel < STILL:
            yield error(
                "the policy barely moves where the demonstrations move",
                numbers,
                "it learned pauses or copies of the state (is there a finding above?), or too little: "
                "train longer",
            )
            return
    if varies < STILL:
        yield error(
            "the policy does nearly the same wherever it is: the arm goes to one place and stays",
            numbers,
            TRAIN_LONGER
            if inputs.is_trained_dataset
            else "it does not see what it was trained on, or was trained too little: look at the pictures "
            "(--output=FOLDER), and at the loss",
        )
    else:
        yield fine(numbers)


def actions_are_those_demonstrated(inputs: Inputs) -> Iterator[Finding]:
    """At the dataset's own frames predictions are nearer to the demonstration than the average action is."""
    trial, data = inputs.trial, inputs.columns.action
    moving = data.std(0) > NEARLY_CONSTANT
    if not moving.any():
        return
    scale = data.std(0)[moving]
    error_of = {
        name: float(np.abs((chunk - trial.demonstrated)[..., moving] / scale)[trial.real].mean())
        for name, chunk in (("policy", trial.predicted), ("average", data.mean(0)[None, None]))
    }
    numbers = (
        f"mean error {error_of['policy']:.2f} standard deviations, of always giving the average action "
        f"{error_of['average']:.2f} ({len(trial.state)} frames)"
    )
    if not error_of["policy"] < WORSE * error_of["average"]:
        yield warning(
            "at the dataset's own frames the average action would be nearer to the demonstration",
            numbers,
            TRAIN_LONGER
            if inputs.is_trained_dataset
            else "is it the dataset that the policy was trained on? `lerobot-pi0 report` shows each joint "
            "along the chunk",
        )
    else:
        yield fine(numbers)


def _average(trial: Trial, chunks: np.ndarray) -> np.ndarray:
    """Over the steps of each chunk that are within the episode: (n, dims). Chance evens out."""
    real = trial.real[..., None]
    return (chunks * real).sum(1) / real.sum(1)


def _hold(inputs: Inputs) -> np.ndarray | None:
    """The actions (n, dims) by which the robot would stay where it is at each frame; None if not known."""
    pair, trial = inputs.pairing, inputs.trial
    if pair.kind == "relative":
        return np.zeros_like(trial.predicted[:, 0])
    states, actions = inputs.recorded.state_feature_names, inputs.recorded.action_feature_names
    if pair.kind == "unknown" or not states or not actions or not {*actions} <= {*states}:
        return None
    return trial.state[:, [states.index(name) for name in actions]]
