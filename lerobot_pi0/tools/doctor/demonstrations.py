"""Demonstrations: what they cannot teach a policy that sees one observation and predicts a chunk.

Columns decide; pictures are decoded for the few frames that columns make suspicious, because what the state
does not show a camera may.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from lerobot_pi0.tools.columns import Columns, grippers
from lerobot_pi0.tools.doctor.finding import Finding, fine, listed, warning
from lerobot_pi0.tools.doctor.inputs import Inputs
from lerobot_pi0.tools.doctor.motion import moving, runs

SOON = 0.5  # seconds from a gripper's last change to the end of the episode; and at most a chunk
OFTEN = 0.3  # of the episodes
# A pause: of a policy's n_action_steps and more, no dimension of the state leaves a hundredth of its range.
STILL, SHORTEST_PAUSE = 0.01, 0.25  # of the range; seconds
DIFFERENT = 1.0  # standard deviations of some dimension, from the commands of a pause to what follows
PAUSED = 0.1  # of the episodes
# Pictures are compared as averages over this many squares a side; the largest difference of a square decides.
SQUARES, SAME = 24, 8 / 255
PAIRS = 8  # of frames, whose pictures are decoded
NEIGHBOURS, QUERIES = 8, 1200
# Root mean square over the dimensions, in standard deviations. Two frames drawn at random differ by √2.
CONTRARY = 1.25
DISAGREE, CONTRADICTED = 0.25, 0.05  # of the neighbours; of the frames that have any
NARROW, FEWEST = 0.02, 5  # of the range of the states; episodes
MOMENTS = np.linspace(0.05, 0.95, 10)


def grippers_change_before_the_end(inputs: Inputs) -> Iterator[Finding]:
    """What the gripper does last is followed by frames in which it is learnt."""
    columns, config = inputs.columns, inputs.config
    assert inputs.metadata is not None
    fps, found = inputs.metadata.fps, []
    enough = min(config.chunk_size, max(1, round(SOON * fps)))
    names = inputs.recorded.action_feature_names
    for joint in grippers(columns.action, names):
        values = columns.action[:, joint]
        middle = (values.min() + values.max()) / 2
        margin = 0.1 * np.ptp(values)
        ends = []
        for episode in columns.episodes:
            level = values[episode]
            sure = np.flatnonzero(np.abs(level - middle) > margin)
            changes = sure[1:][np.diff((level[sure] > middle).astype(int)) != 0]
            if changes.size:
                ends.append((episode.start + int(changes[-1]), len(level) - int(changes[-1])))
        late = [(row, left) for row, left in ends if left < enough]
        if len(late) > OFTEN * len(ends):
            found.append((joint, late, len(ends)))
    for joint, late, of in found:
        name = names[joint] if names else joint
        left = int(np.median([left for _, left in late]))
        yield warning(
            f"{len(late)} of {of} episodes end as soon as the gripper (action {name}) has changed",
            f"{_places(columns, [row for row, _ in late])}: it changes, and {left} frames "
            f"({left / fps:.2f} s) later the episode is over (median). Actions beyond the end are not "
            f"learnt: hardly any of the chunks of {config.chunk_size} teaches this change",
            f"record on for {enough} frames at least, better for a second: `lerobot-pi0 record "
            "--after_success=N`, or a longer --dataset.episode_time_s of lerobot-record",
        )
    if not found:
        yield fine("grippers have time after their last change")


def pauses_show_when_they_end(inputs: Inputs) -> Iterator[Finding]:
    """Where everything stands still for longer than the policy plans, nothing different follows."""
    columns, config = inputs.columns, inputs.config
    assert inputs.metadata is not None
    fps = inputs.metadata.fps
    window = max(config.n_action_steps, round(SHORTEST_PAUSE * fps))
    state, command = _scaled(columns.state, np.ptp), _scaled(_commands(inputs), np.std)
    pauses = []  # the first and the last row of each
    for episode in columns.episodes:
        if len(state[episode]) <= window:
            continue
        views = np.lib.stride_tricks.sliding_window_view(state[episode], window + 1, axis=0)
        still = (np.ptp(views, axis=-1) < STILL).all(1)
        follows = _mean_ahead(command[episode], window)
        for start, length in runs(still):
            last = start + length - 1 + window
            before = command[episode][start:last].mean(0)
            if last + 1 < len(follows) and np.abs(follows[last] - before).max(initial=0) > DIFFERENT:
                pauses.append((episode.start + start, episode.start + last))
    chosen = _spread(pauses, PAIRS)
    if chosen:
        shown = inputs.pictures_at([row for pause in chosen for row in pause])
        apart = _largest_difference(shown, [(2 * i, 2 * i + 1) for i in range(len(chosen))])
        chosen = [pause for pause, change in zip(chosen, apart, strict=True) if change < SAME]
    episodes = {int(columns.episode[first]) for first, _ in pauses}
    if chosen and len(episodes) > PAUSED * len(columns.episodes):
        length = int(np.median([last - first + 1 for first, last in pauses]))
        longer = f": --policy.n_action_steps={length}" if length <= config.chunk_size else ""
        yield warning(
            f"{len(episodes)} of {len(columns.episodes)} episodes pause, and nothing shows when they go on: "
            "the policy may wait for ever",
            f"{_places(columns, [first for first, _ in chosen])}: for {length} frames "
            f"({length / fps:.2f} s, median) state and pictures stay the same, then another action follows. "
            f"A policy of one observation that plans every {config.n_action_steps} frames does not know how "
            "long it has waited",
            "record again, and go on when something can be seen (the fingers rest), not after a time; or "
            f"execute more of each chunk{longer}",
        )
    else:
        yield fine(f"no pause of {window} frames or more that does not show when it ends")


def same_states_get_the_same_actions(inputs: Inputs) -> Iterator[Finding]:
    """Frames of one instruction that look alike, in state and pictures, ask for similar actions."""
    frames = Neighbourhood.of(inputs)
    if not frames.compared:
        return
    share = len(frames.contradicted) / frames.compared
    if share > CONTRADICTED:
        pairs = _spread(frames.contradicted, PAIRS)
        shown = inputs.pictures_at([row for a, b in pairs for row in (a, b, _next(inputs, a))])
        apart = _largest_difference(shown, [(3 * i, 3 * i + 1) for i in range(len(pairs))])
        # States may differ by a frame's movement, and so may pictures.
        moved = _largest_difference(shown, [(3 * i, 3 * i + 2) for i in range(len(pairs))])
        alike = apart < max(SAME, float(np.median(moved)))
        share *= alike.mean()
        if share > CONTRADICTED and alike.mean() >= 0.5:
            same = [pair for pair, one in zip(pairs, alike, strict=True) if one]
            columns, task = inputs.columns, inputs.tasks.get(int(inputs.columns.task[same[0][0]]), "")
            yield warning(
                f"in {share:.0%} of comparable frames, near-identical observations get contradictory actions",
                listed((f"{columns.place(a)} and {columns.place(b)}" for a, b in same), 3, "; ")
                + f": one instruction ({task!r}), state and picture as near as two frames in a row, actions "
                "as far apart as any two",
                "look at both (`lerobot-dataset-viz`). Of two ways to do it, keep one, or give each its "
                "instruction (lerobot-edit-dataset --operation.type=modify_tasks); episodes recorded with "
                "another sign, delete (--operation.type=delete_episodes)",
            )
            return
    yield fine(
        f"similar observations get similar actions ({frames.compared} frames with near ones elsewhere)"
    )


def episodes_differ(inputs: Inputs) -> Iterator[Finding]:
    """The episodes of an instruction are not all the same path, beside which the policy has seen nothing."""
    columns, narrow, widths = inputs.columns, [], []
    task_of = np.array([columns.task[episode.start] for episode in columns.episodes])
    for task in np.unique(task_of).tolist():
        episodes = [columns.episodes[i] for i in np.flatnonzero(task_of == task)]
        if len(episodes) < FEWEST:
            continue
        rows = np.array([e.start + np.round(MOMENTS * (e.stop - e.start - 1)).astype(int) for e in episodes])
        states = columns.state[np.isin(columns.episode, columns.episode[rows[:, 0]])]
        chosen = moving(states)
        spread = _rms(columns.state[rows][..., chosen].std(0) / np.ptp(states[:, chosen], axis=0))
        widths.append(float(np.median(spread)))
        if widths[-1] < NARROW:
            narrow.append((task, columns.episode[rows[:, 0]], rows[0, spread.argmin()], widths[-1]))
    for task, episodes, row, width in narrow:
        yield warning(
            f"the {len(episodes)} episodes of {inputs.tasks.get(task, '')!r} are one narrow tube",
            f"at equal progress their states spread by {width:.1%} of their range (median), least at "
            f"{columns.place(row)}; episodes {listed(episodes)}. A policy that drifts out of it has seen no "
            "way back",
            "record from other starting places, move what the task moves, and push the arm aside on the way "
            "(`lerobot-pi0 record --noise=0.2` does)",
        )
    if widths and not narrow:
        yield fine(f"at equal progress the episodes of a task spread by {min(widths):.1%} of its range")


@dataclass(frozen=True)
class Neighbourhood:
    """Frames beside the most similar states of other episodes with the same instruction."""

    compared: int  # frames that have a near one
    contradicted: list[tuple[int, int]]  # rows of a frame and of the near one whose actions differ most

    @classmethod
    def of(cls, inputs: Inputs) -> "Neighbourhood":
        """Near: no farther than two frames in a row, in the mean of the task.

        Commands are averaged over the actions that are executed of a chunk.
        """
        columns, ahead = inputs.columns, inputs.config.n_action_steps
        commands = _commands(inputs)
        commands = np.concatenate([_mean_ahead(commands[episode], ahead) for episode in columns.episodes])
        tasks, compared, contradicted = np.unique(columns.task), 0, []
        for task in tasks:
            rows = np.flatnonzero(columns.task == task)
            state, action = _scaled(columns.state[rows], np.std), _scaled(commands[rows], np.std)
            episode = columns.episode[rows]
            if state.shape[1] == 0 or action.shape[1] == 0:
                continue
            within = np.diff(episode) == 0
            steps = _rms(np.diff(state, axis=0))[within]
            near = float(steps.mean()) if len(steps) else 0.0
            for i in _spread(range(len(rows)), max(50, QUERIES // len(tasks))):
                others = np.flatnonzero(episode != episode[i])
                distance = _rms(state[others] - state[i])
                nearest = (
                    np.argpartition(distance, NEIGHBOURS)[:NEIGHBOURS] if len(others) > NEIGHBOURS else ...
                )
                nearest = others[nearest][distance[nearest] <= near]
                if not len(nearest):
                    continue
                compared += 1
                apart = _rms(action[nearest] - action[i])
                if (apart > CONTRARY).mean() > DISAGREE:
                    contradicted.append((int(rows[i]), int(rows[nearest[apart.argmax()]])))
        return cls(compared, contradicted)


def _commands(inputs: Inputs) -> np.ndarray:
    """Actions (n, dims); positions as seen from where the joint is, as what moves it is the difference."""
    pair, commands = inputs.pairing, inputs.columns.action.astype(np.float64)
    if pair.kind == "absolute":
        commands[:, pair.actions] -= inputs.columns.state[:, pair.states]
    return commands


def _scaled(values: np.ndarray, by: Callable[..., np.ndarray]) -> np.ndarray:
    """The dimensions that move (n, moving), over their range (np.ptp) or deviation (np.std)."""
    chosen = values[:, moving(values)].astype(np.float64)
    return chosen / by(chosen, axis=0)


def _rms(values: np.ndarray) -> np.ndarray:
    """Root mean square over the last axis."""
    return np.sqrt(np.square(values).mean(-1))


def _mean_ahead(values: np.ndarray, steps: int) -> np.ndarray:
    """Of each row and those after it, up to `steps` in all: their mean."""
    total = np.concatenate((np.zeros((1, values.shape[1])), values.cumsum(0)))
    start = np.arange(len(values))
    stop = np.minimum(start + steps, len(values))
    return (total[stop] - total[start]) / (stop - start)[:, None]


def _spread[T](things: Sequence[T], most: int) -> list[T]:
    """Some of them, evenly spread, in their order."""
    chosen = np.linspace(0, len(things) - 1, min(most, len(things))).astype(int)
    return [things[i] for i in dict.fromkeys(chosen.tolist())]


def _places(columns: Columns, rows: list[int]) -> str:
    return listed(map(columns.place, rows), separator="; ")


def _next(inputs: Inputs, row: int) -> int:
    """The row after it or, at the end of an episode, before it."""
    episode = inputs.columns.episode
    return row + 1 if row + 1 < len(episode) and episode[row + 1] == episode[row] else row - 1


def _largest_difference(pictures: dict[str, Tensor], pairs: list[tuple[int, int]]) -> np.ndarray:
    """The largest difference of a square in any camera's picture, for each pair of frames (pairs,)."""
    found = [torch.zeros(len(pairs))]
    for images in pictures.values():
        squares = adaptive_avg_pool2d(images, SQUARES)
        found.append(torch.stack([(squares[a] - squares[b]).abs().amax() for a, b in pairs]))
    return torch.stack(found).amax(0).numpy()
