"""Movement in the data: pauses, spikes, limits, and the lag between actions and states."""

from collections.abc import Iterator

import numpy as np

from lerobot_pi0.data.normalization import NEARLY_CONSTANT
from lerobot_pi0.tools.columns import named_grippers
from lerobot_pi0.tools.doctor.finding import Finding, error, fine, listed, note, warning
from lerobot_pi0.tools.doctor.inputs import Inputs

DELETE = (
    "drop these episodes: lerobot-edit-dataset --operation.type=delete_episodes "
    "--operation.episode_indices='{}'"
)

# Idle: over half a second no joint moves by a hundredth of its range.
IDLE_SECONDS, IDLE_RANGE = 0.5, 0.01
LONG_START, LONG_END, LONG_PAUSE = 1.0, 2.0, 3.0  # seconds
PAUSED = 0.1  # of the episodes
SPIKE, SELDOM, BRIEF = 3.0, 0.005, 3  # ranges beyond the 99th percentile; share of frames; frames in a row
MOVES = 0.05  # of what the other joints move
COPY = 1e-4  # of a joint's range
LATE = 0.3  # seconds from an action to the movement
AGREE = 0.5  # correlation from which a lag means something
AT_LIMIT = {"absolute": 0.3, "relative": 0.7, "unknown": 0.7}  # share of frames
DISCRETE = 20  # values: an open-or-shut gripper stands at its limits


def frames_are_here(inputs: Inputs) -> Iterator[Finding]:
    """States and actions of all frames are on this disk."""
    assert inputs.metadata is not None
    here, total = len(inputs.columns.episode), inputs.metadata.total_frames
    if here < total:
        yield note(
            f"{here:,} of {total:,} frames are on this disk; the others are not examined",
            "",
            "train on the dataset once, or `hf download` it, to have them all",
        )
    elif here > total:
        yield error(
            f"the dataset holds {here:,} frames and says that it has {total:,}",
            "total_frames of meta/info.json, and data/*/*.parquet",
            "an edit or a recording was interrupted: take a copy from before it",
        )


def values_are_finite(inputs: Inputs) -> Iterator[Finding]:
    """No NaN and no infinity among states and actions."""
    for key, values, names in _vectors(inputs):
        wrong = ~np.isfinite(values)
        if wrong.any():
            rows = np.flatnonzero(wrong.any(1))
            episodes = sorted({int(inputs.columns.episode[row]) for row in rows})
            yield error(
                f"'{key}' holds NaN or infinite values in {listed(_of(names, np.any(wrong, axis=0)))}",
                f"NaN or infinity in {len(rows)} frames, first in {inputs.columns.place(rows[0])}",
                DELETE.format(episodes),
            )


def values_have_no_spikes(inputs: Inputs) -> Iterator[Finding]:
    """No single frames far outside of what a joint does otherwise."""
    for key, values, names in _vectors(inputs):
        low, high = np.nanquantile(values, [0.01, 0.99], axis=0)
        width = high - low
        rests = width < NEARLY_CONSTANT
        width[rests] = max(MOVES * np.median(width), NEARLY_CONSTANT)
        far = (values < low - SPIKE * width) | (values > high + SPIKE * width)
        for joint in np.flatnonzero(far.any(0) & (far.mean(0) < SELDOM)):
            rows = np.flatnonzero(far[:, joint])
            if max(length for _, length in runs(far[:, joint])) > BRIEF:
                continue  # a rare movement
            if rests[joint] and len(rows) > 1 and len(np.unique(values[rows, joint])) == 1:
                continue  # a switch, such as an episode's last frame
            worst = rows[np.abs(values[rows, joint] - np.median(values[:, joint])).argmax()]
            yield warning(
                f"'{key}' has a spike in {names[joint]}: {values[worst, joint]:.4g} in "
                f"{inputs.columns.place(worst)}",
                f"{len(rows)} frames; 98 % of all lie between {low[joint]:.4g} and {high[joint]:.4g}. "
                "Statistics stretch to such values, and everything else becomes small",
                DELETE.format(sorted({int(inputs.columns.episode[row]) for row in rows})),
            )


def joints_move(inputs: Inputs) -> Iterator[Finding]:
    """Every joint moves in the data, the gripper above all, and where the state moves the action does too."""
    pair, columns = inputs.pairing, inputs.columns
    if pair.by_name:
        # Of all frames: those of the pairing are a sample.
        action, state = columns.action[:, pair.actions], columns.state[:, pair.states]
        still_action, still_state = _still(action), _still(state)
        one_moves = (moving(action) & still_state) | (moving(state) & still_action)
        for joint in np.flatnonzero(one_moves):
            moves, stays = ("state", "action") if still_action[joint] else ("action", "state")
            span = np.ptp((state if still_action[joint] else action)[:, joint])
            yield warning(
                f"'{pair.names[joint]}' moves in the {moves} and stays the same in the {stays}",
                f"range {span:.4g} in the {moves}, none in the {stays}",
                "the recording lost one of the two: check the leader arm or the recorder, and record again",
            )
        still = _of(pair.names, still_action & still_state)
    else:
        still = [name for _, values, names in _vectors(inputs) for name in _of(names, _still(values))]
    grippers = [still[i] for i in named_grippers(still)]
    if grippers:
        yield warning(
            f"the gripper never moves in the data ({listed(grippers)})",
            "it has one value in all frames, so the policy cannot learn to grasp",
            "check the gripper's motor and the teleoperator, and record again",
        )
    if others := [name for name in still if name not in grippers]:
        yield note(
            f"{listed(others)} never {'moves' if len(others) == 1 else 'move'} in the data",
            "one value in all frames; the policy will keep it there",
        )


def actions_are_no_copies(inputs: Inputs) -> Iterator[Finding]:
    """Actions say where to go, not where the robot already is."""
    pair = inputs.pairing
    if pair.kind != "absolute":
        return
    span = np.ptp(pair.state, axis=0)[pair.smooth]
    apart = np.abs(pair.action - pair.state)[:, pair.smooth].mean(0) / span
    if (apart < COPY).all():
        yield error(
            "actions are copies of the state of the same frame: a policy learns to stay where it is",
            f"they differ by {apart.max():.1e} of a joint's range on average",
            "record the leader's positions (or the next frame's state) as action; a dataset that has "
            "neither can be shifted: action of frame t = state of frame t + 1",
        )


def actions_come_before_movement(inputs: Inputs) -> Iterator[Finding]:
    """Joints do what actions say, and soon: neither column is shifted in time."""
    pair = inputs.pairing
    if pair.kind == "unknown":
        return
    lag, agreement = pair.lag, pair.agreements[pair.lag]
    if agreement < AGREE:
        yield note(f"joints do not follow the actions closely (correlation {agreement:.2f} at most)")
        return
    frames = f"{abs(lag)} frame{'s' if abs(lag) > 1 else ''} ({abs(lag) / pair.fps:.2f} s)"
    numbers = f"correlation {agreement:.2f} there, {pair.agreements[0]:.2f} at the same frame"
    if lag < 0:
        yield error(
            f"actions are recorded {frames} after the movement that they cause",
            numbers,
            "the policy would learn what was done already: shift the actions by as many frames, or record "
            "again with state and action read at one time",
        )
    elif lag / pair.fps > LATE:
        yield warning(
            f"joints follow the actions only after {frames}",
            numbers,
            "if the robot is not that slow, states are recorded late: look for a buffer between robot and "
            "recorder",
        )
    else:
        yield fine(f"actions are {pair.kind}; joints follow after {frames}, correlation {agreement:.2f}")


def actions_leave_their_limits(inputs: Inputs) -> Iterator[Finding]:
    """No action stands at the end of its range for most of the time."""
    kind = inputs.pairing.kind
    _, values, names = _vectors(inputs)[1]
    for joint, name in enumerate(names):
        column = values[:, joint]
        if named_grippers([name]) or len(np.unique(column)) <= DISCRETE:
            continue
        for end in (column.min(), column.max()):
            share = float((column == end).mean())
            if share > AT_LIMIT[kind]:
                yield warning(
                    f"the action of {name} stands at its limit in {share:.0%} of the frames",
                    f"the limit is {end:.4g}; range {column.min():.4g} to {column.max():.4g}",
                    "what was meant beyond the limit is lost: check the calibration of leader and follower",
                )


def episodes_are_no_waiting(inputs: Inputs) -> Iterator[Finding]:
    """Episodes do not begin or end with the robot standing still, nor pause for long."""
    columns, fps = inputs.columns, inputs.pairing.fps
    window = max(2, round(IDLE_SECONDS * fps))
    span = np.ptp(columns.state, axis=0)
    span = np.maximum(span, max(MOVES * np.median(span), NEARLY_CONSTANT))
    # Noise of a joint that rests hides no pause.
    moves = moving(columns.state) | ~_trembles(columns.state, columns.episode, window)
    episodes, starts, ends, pauses, idle_frames = [], [], [], [], 0
    for episode in columns.episodes:
        state = (columns.state[episode] / span)[:, moves]
        if len(state) <= window:
            continue
        episodes.append(int(columns.episode[episode][0]))
        still = (np.abs(state[window:] - state[:-window]) < IDLE_RANGE).all(1)
        idle = runs(still)
        idle_frames += sum(length + window for _, length in idle)
        starts.append(idle[0][1] + window if idle and idle[0][0] == 0 else 0)
        last = idle[-1] if idle else (0, 0)
        ends.append(last[1] + window if idle and sum(last) == len(still) else 0)
        inner = [length + window for start, length in idle if start and start + length < len(still)]
        pauses.append(max(inner, default=0))
    if not starts:
        return
    share = min(1.0, idle_frames / columns.lengths.sum())
    start, end = np.median(starts) / fps, np.median(ends) / fps
    paused = float((np.array(pauses) / fps > LONG_PAUSE).mean())
    fix = (
        "cut them: record from the first movement to the last one. A policy that starts in a pause learns "
        "to pause (it sees a still robot and predicts a still robot)"
    )
    numbers = f"{share:.0%} of all frames are idle: no joint moves by 1 % of its range in half a second"

    def longer(lengths: list[int], limit: float) -> str:
        those = [name for name, length in zip(episodes, lengths, strict=True) if length / fps > limit]
        return f"for more than {limit:g} s in episodes {listed(those, most=10)}; {numbers}"

    if start > LONG_START:
        yield warning(
            f"episodes begin with a pause of {start:.1f} s (median)", longer(starts, LONG_START), fix
        )
    if end > LONG_END:
        yield warning(f"episodes end with a pause of {end:.1f} s (median)", longer(ends, LONG_END), fix)
    if paused > PAUSED:
        yield warning(
            f"{paused:.0%} of the episodes pause for more than {LONG_PAUSE:g} s in between",
            f"the longest for {max(pauses) / fps:.1f} s; {longer(pauses, LONG_PAUSE)}",
            "a policy of one observation cannot know how long it has waited: cut the pauses",
        )
    yield fine(
        f"idle for {share:.0%} of the time; at the start {start:.1f} s, at the end {end:.1f} s (median)"
    )


def _vectors(inputs: Inputs) -> list[tuple[str, np.ndarray, list[str]]]:
    columns, recorded = inputs.columns, inputs.recorded
    return [
        (key, values, names or [str(i) for i in range(values.shape[1])])
        for key, values, names in (
            ("observation.state", columns.state, recorded.state_feature_names),
            ("action", columns.action, recorded.action_feature_names),
        )
    ]


def _still(values: np.ndarray) -> np.ndarray:
    return np.ptp(values, axis=0) < NEARLY_CONSTANT


def moving(values: np.ndarray) -> np.ndarray:
    """Which dimensions (dims,) of the values (n, dims) move, beside the others."""
    span = np.ptp(values, axis=0)
    return span > np.maximum(MOVES * np.median(span), NEARLY_CONSTANT)


def _trembles(values: np.ndarray, episode: np.ndarray, window: int) -> np.ndarray:
    """Which dimensions (dims,) are noise: they change as much in one frame as in all of a window."""

    def change(frames: int) -> np.ndarray:
        same = episode[frames:] == episode[:-frames]
        return np.square(values[frames:] - values[:-frames], dtype=np.float64)[same].sum(0) / max(
            1, same.sum()
        )

    return change(1) > 0.5 * change(window)


def _of(names: list[str], chosen: np.ndarray) -> list[str]:
    return [name for name, take in zip(names, chosen, strict=True) if take]


def runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """(start, length) of each run of True."""
    edges = np.diff(np.concatenate(([0], flags.astype(np.int8), [0])))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return list(zip(starts.tolist(), (stops - starts).tolist(), strict=True))
