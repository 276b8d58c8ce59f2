"""Time: evenly spaced frames, and chunks of a length that fits the episodes."""

from collections.abc import Iterator

import numpy as np

from lerobot_pi0.tools.doctor.finding import Finding, error, fine, listed, note, warning
from lerobot_pi0.tools.doctor.inputs import Inputs

UNEVEN = 0.1  # of the time between two frames
MANY, SOME = 0.5, 0.1  # of the episodes, shorter than a chunk
CHUNK_SECONDS = (0.1, 5.0)  # that a chunk covers; openpi's are of one second


def frames_are_evenly_spaced(inputs: Inputs) -> Iterator[Finding]:
    """Timestamps are frame numbers over fps, in every episode, and frame numbers go up by one."""
    assert inputs.metadata is not None
    columns, fps = inputs.columns, inputs.metadata.fps
    inside = np.diff(columns.episode) == 0
    steps = np.diff(columns.timestamp.astype(np.float64))
    uneven = inside & (np.abs(steps * fps - 1) > UNEVEN)
    jumps = inside & (np.diff(columns.frame) != 1)
    if jumps.any():
        rows = np.flatnonzero(jumps)
        yield error(
            f"frames are missing in {len(np.unique(columns.episode[rows]))} episodes",
            f"{len(rows)} gaps, the first after {columns.place(rows[0])}: chunks across a gap are "
            "discontinuous in time",
            "drop these episodes, or build the dataset again without gaps in frame_index",
        )
    elif uneven.any():
        rows = np.flatnonzero(uneven)
        median = float(np.median(steps[inside]))
        rate = (
            f"frames are {median * 1000:.1f} ms apart in the middle, {1000 / fps:.1f} ms at {fps} per second"
        )
        yield error(
            f"timestamps do not fit {fps} frames per second",
            f"{len(rows):,} of {int(inside.sum()):,} steps are off, the first after "
            f"{columns.place(rows[0])}; {rate}",
            f"if it was recorded at {1 / median:.0f} per second, write that as fps into meta/info.json; "
            "otherwise record again: the loop did not keep its rate",
        )
    else:
        yield fine(f"{fps} frames per second, evenly spaced")


def chunks_fit_episodes(inputs: Inputs) -> Iterator[Finding]:
    """Episodes are longer than a chunk, and a chunk covers a time in which something happens."""
    assert inputs.metadata is not None
    config, fps, lengths = inputs.config, inputs.metadata.fps, inputs.columns.lengths
    seconds, run = config.chunk_size / fps, config.n_action_steps / fps
    short = float((lengths < config.chunk_size).mean())
    covers = f"a chunk of {config.chunk_size} actions covers {seconds:.2f} s at {fps} per second"
    better = max(1, min(round(fps), int(lengths.min())))
    executed = min(config.n_action_steps, better)
    fix = f"train with --policy.chunk_size={better} --policy.n_action_steps={executed}"
    if short > SOME:
        yield (warning if short > MANY else note)(
            f"{short:.0%} of the episodes are shorter than a chunk",
            f"{covers}; episodes have {lengths.min()} to {lengths.max()} frames",
            fix,
        )
    if not CHUNK_SECONDS[0] <= seconds <= CHUNK_SECONDS[1]:
        yield warning(
            f"a chunk covers {seconds:.2f} s, which is {'little' if seconds < 1 else 'long'}",
            f"{covers}; openpi's cover about 1 s",
            fix + ", or check the dataset's fps",
        )
    yield fine(f"{covers}; {config.n_action_steps} are executed ({run:.2f} s) before the next is predicted")


def cameras_keep_up(inputs: Inputs) -> Iterator[Finding]:
    """The robot's cameras give as many pictures per second as the dataset has."""
    assert inputs.metadata is not None
    cameras = getattr(getattr(inputs.robot, "config", None), "cameras", None) or {}
    rates = {name: camera.fps for name, camera in cameras.items() if getattr(camera, "fps", None)}
    slow = {name: rate for name, rate in rates.items() if rate < inputs.metadata.fps}
    if slow:
        yield warning(
            f"cameras of the robot are slower than the dataset: {listed(slow)}",
            f"{listed(f'{name} {rate} per second' for name, rate in slow.items())}; recorded at "
            f"{inputs.metadata.fps}",
            f"--robot.cameras='{{{next(iter(slow))}: {{…, fps: {inputs.metadata.fps}}}}}', or run at the "
            "lower rate that the data was recorded with",
        )
    elif rates:
        yield fine(
            f"the robot's cameras give {listed(f'{n}: {r}' for n, r in rates.items())} pictures per second"
        )
