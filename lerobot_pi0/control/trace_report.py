"""`lerobot-pi0 trace RUN`: how a run went, from the trace that it left: numbers, and RUN/trace.png."""

import itertools
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lerobot_pi0.control.flags import TraceReportConfig
from lerobot_pi0.control.loop_timing import LoopTiming, loop_timing, spread
from lerobot_pi0.control.trace import read_trace
from lerobot_pi0.errors import CommandError

Event = dict[str, Any]

ABOUT_EVENT = ("event", "t", "file", "writer", "opened")  # not about the run
DELAYS = {
    "given": "the delay that the policy was given",
    "dropped": "that were left out of the new chunk",
    "consumed": "that were sent meanwhile",
}


@dataclass(frozen=True)
class Run:
    """The events of a trace, by what they are; those of several processes put together."""

    start: Event  # what is said of the run
    episodes: list[list[Event]]  # its actions; `chunk` is there where it is known or follows from the time
    observations: list[Event]
    inferences: dict[int, Event]  # by the number of the chunk
    fps: float  # actions per second that were wanted, those between two of the policy's included
    fps_is_known: bool
    others: int = 0  # runs of the robot that the trace holds besides, and nothing here is of them

    @property
    def actions(self) -> list[Event]:
        return [action for episode in self.episodes for action in episode]

    @property
    def joints(self) -> list[str]:
        return list(self.actions[0]["values"])


@dataclass(frozen=True)
class Jump:
    """Change of a joint's action from one to the next, in the robot's units."""

    boundary: dict[str, float]  # where a chunk follows another: p50, max
    within: dict[str, float]  # within a chunk
    std: float | None  # of the training data's actions


@dataclass(frozen=True)
class Report:
    """Times are in seconds, delays in control steps. What is not known from the trace is empty or None."""

    start: Event
    loop_timing: LoopTiming
    first_action: float | None  # after the first observation
    empty_ticks: int | None  # the loop ran, and had no action
    blocked_ticks: int | None  # the loop waited, for the policy or for the robot
    chunks: int
    boundaries: int
    jumps: dict[str, Jump]
    worst: str | None  # the joint with the largest jump, as a share of its std (or of its range in this run)
    delays: dict[str, dict[str, float]]
    skipped: int | None  # actions that were dropped beyond those sent meanwhile
    used: float | None  # share of the generated actions that were sent
    age: dict[str, float]  # of the observation, when an action that comes from it is sent
    latency: dict[str, float]  # of a chunk, without the first
    first_latency: float | None
    others: int  # runs of the robot that the trace holds besides, and that are not in these figures


def main(config: TraceReportConfig) -> str:
    """Run `lerobot-pi0 trace`. Raises FileNotFoundError without a trace, RuntimeError without an action."""
    run = read_run(config.run)
    report = make_report(run)
    picture = config.run / "trace.png"
    plot(run, report, picture)
    if config.json:
        return json.dumps(asdict(report), indent=2)
    return f"{_as_text(run, report)}\n\nPlotted: {picture}"


def read_run(folder: Path) -> Run:
    """The trace in a folder. Where two processes recorded the same actions, the policy's side is taken; where
    one after the other sent some, the last one.

    Raises FileNotFoundError when there is none, RuntimeError when no action was sent.
    """
    events = list(read_trace(folder))
    count = Counter(event["file"] for event in events if event["event"] == "action")
    kinds = Counter(event["event"] for event in events)
    if not count and any(event.get("kind") == "async" for event in events):
        raise CommandError(
            f"{folder}: a policy server's trace, of {kinds['inference']} chunks. Which actions the robot was "
            "sent LeRobot's client does not record, so there is no report. The simulated robot does, by "
            "--robot.trace and the same folder"
        )
    if not count:
        why = [event["why"] for event in events if event["event"] == "stop" and event.get("why")]
        raise CommandError(
            f"{folder}: no action was sent to the robot ({kinds['observation']} observations, "
            f"{kinds['inference']} chunks). "
            + (f"The run ended: {why[-1]}. " if why else "")
            + "`lerobot-pi0 latency` says what this machine can hold"
        )
    source = "policy" if "policy" in count else count.most_common(1)[0][0]
    writers = {event["writer"] for event in events if event["file"] == source and event["event"] == "action"}
    events = [event for event in events if event["file"] != source or event["writer"] == max(writers)]
    starts = [event for event in events if event["event"] == "start"]
    start: Event = {}
    for event in sorted(starts, key=lambda event: event["file"] == source):
        start |= {key: value for key, value in event.items() if key not in ABOUT_EVENT}
    episodes: list[list[Event]] = [[]]
    for event in events:
        if event["file"] == source and event["event"] == "start":
            episodes.append([])
        elif event["file"] == source and event["event"] == "action":
            episodes[-1].append(dict(event))
    episodes = [episode for episode in episodes if episode]
    # A server's trace may be of other robots as well.
    times = [event["t"] for event in events if event["file"] == source]
    inferences = [event for event in events if event["event"] == "inference"]
    inferences = [event for event in inferences if times[0] <= event["ended"] <= times[-1]]
    by_chunk = {event.get("chunk") or number: event for number, event in enumerate(inferences, 1)}
    _place(episodes, by_chunk)
    observations = [event for event in events if event["event"] == "observation"]
    observations = [event for event in observations if event["file"] == source] or observations
    periods = np.concatenate([np.diff([action["t"] for action in episode]) for episode in episodes])
    fps = start["fps"] * start.get("interpolation", 1) if "fps" in start else None
    if fps is None and not len(periods):
        raise CommandError(f"{folder}: one action was sent, and nothing says how many per second were wanted")
    return Run(
        start,
        episodes,
        observations,
        by_chunk,
        fps or float(1 / np.median(periods)),
        fps_is_known=bool(fps),
        others=len(writers) - 1,
    )


def make_report(run: Run) -> Report:
    """All figures of a run."""
    times = [[action["t"] for action in episode] for episode in run.episodes]
    is_known = all("waited" in action for action in run.actions)
    waits = [[action["waited"] for action in episode] for episode in run.episodes] if is_known else None
    latencies = [event["ended"] - event["began"] for event in run.inferences.values()]
    empty, blocked = _ticks(run)
    first = [event["t"] for event in run.observations if event["t"] <= times[0][0]]
    jumps, boundaries = _jumps(run)
    delays = {
        key: spread([event[key] for event in run.inferences.values() if event.get(key) is not None], 50)
        for key in DELAYS
    }
    whole = [
        event for event in run.inferences.values() if None not in map(event.get, ("dropped", "consumed"))
    ]
    ages = [
        action["t"] - inference["observed"]
        for action in run.actions
        if (inference := run.inferences.get(action.get("chunk") or 0)) and inference.get("observed")
    ]
    return Report(
        start=run.start,
        loop_timing=loop_timing(times, run.fps, waits),
        first_action=times[0][0] - first[0] if first else None,
        empty_ticks=empty,
        blocked_ticks=blocked,
        chunks=len(run.inferences),
        boundaries=boundaries,
        jumps=jumps,
        worst=_worst(run, jumps) if boundaries else None,
        delays={key: delay for key, delay in delays.items() if delay},
        skipped=sum(event["dropped"] - event["consumed"] for event in whole) if whole else None,
        used=_used(run),
        age=spread(ages, 50, 95),
        latency=spread(latencies[1:], 50, 95),
        first_latency=latencies[0] if latencies else None,
        others=run.others,
    )


def _place(episodes: list[list[Event]], inferences: dict[int, Event]) -> None:
    """Give each action that does not know its chunk the last one that was there when it was sent."""
    ends = sorted((event["ended"], number) for number, event in inferences.items())
    for action in itertools.chain(*episodes):
        if action.get("chunk") is None:
            there = [number for ended, number in ends if ended <= action["t"]]
            action["chunk"] = there[-1] if there else None


def _ticks(run: Run) -> tuple[int | None, int | None]:
    """Between two actions the loop sees one observation: more are ticks without an action, and where there
    is no more in a stall, it waited within a tick."""
    if not run.observations:
        return None, None
    seen = np.array([event["t"] for event in run.observations])
    empty = blocked = 0
    for episode in run.episodes:
        times = np.array([action["t"] for action in episode])
        between = np.diff(np.searchsorted(seen, times))
        stalled = np.diff(times) >= 2 / run.fps
        empty += int((between[stalled] - 1).clip(min=0).sum())
        blocked += int((between[stalled] <= 1).sum())
    return empty, blocked


def _jumps(run: Run) -> tuple[dict[str, Jump], int]:
    """Of each joint, and at how many boundaries."""
    boundary, within = [], []
    for before, after in (pair for episode in run.episodes for pair in itertools.pairwise(episode)):
        change = [abs(after["values"][name] - before["values"][name]) for name in run.joints]
        if None in (before.get("chunk"), after.get("chunk")):
            continue
        (within if before["chunk"] == after["chunk"] else boundary).append(change)
    shape = (-1, len(run.joints))
    at, inside = np.array(boundary).reshape(shape), np.array(within).reshape(shape)
    std = run.start.get("std", {})
    return {
        name: Jump(spread(at[:, i], 50), spread(inside[:, i], 50), std.get(name))
        for i, name in enumerate(run.joints)
    }, len(boundary)


def _worst(run: Run, jumps: dict[str, Jump]) -> str:
    def share(name: str) -> float:
        values = [action["values"][name] for action in run.actions]
        return jumps[name].boundary["max"] / (jumps[name].std or (max(values) - min(values)) or 1.0)

    return max(jumps, key=share)


def _used(run: Run) -> float | None:
    generated = sum(len(event.get("actions", [])) for event in run.inferences.values())
    if not generated:
        return None
    places = {(action["chunk"], action["step"]) for action in run.actions if action.get("step") is not None}
    return (len(places) or len(run.actions)) / generated


def _position(joints: dict[str, float], action: str) -> float | None:
    """Where the joint of an action was, called as the action or without its ".pos"."""
    return joints.get(action, joints.get(action.removesuffix(".pos")))


def _as_text(run: Run, report: Report) -> str:
    start, periods = report.start, report.loop_timing.periods
    what = [str(start[key]) for key in ("robot", "kind", "policy") if start.get(key)]
    lines = [", ".join(what), ""] if what else []
    if report.others:
        lines += [f"The trace holds {report.others + 1} runs of the robot: this is the last one alone.", ""]
    lines.append(f"{report.loop_timing}.")
    if not run.fps_is_known:
        lines.append("The trace does not say which rate was wanted: the median period stands for it.")
    if report.first_action is not None:
        lines.append(f"The first action came {report.first_action:.2f} s after the first observation.")
    if periods:
        listed = ", ".join(f"{name} {1000 * value:.1f}" for name, value in periods.items())
        lines.append(
            f"Period in ms: {listed}; {100 * report.loop_timing.overruns:.1f} % are over 1.5 control steps."
        )
    if report.loop_timing.stalls and report.loop_timing.waits is not None:
        lines.append(f"{report.loop_timing.causes[0].upper()}{report.loop_timing.causes[1:]}.")
    if report.loop_timing.stalls and report.empty_ticks is not None:
        lines.append(
            f"In the stalls, {report.empty_ticks} ticks of the loop found no action, and "
            f"{report.blocked_ticks} times the loop itself waited."
        )
    if report.latency or report.first_latency is not None:
        listed = ", ".join(f"{name} {1000 * value:.0f}" for name, value in report.latency.items())
        lines.append(
            f"{report.chunks} chunks. Latency in ms: {listed or 'no second chunk'}; the first "
            f"{1000 * (report.first_latency or 0):.0f}."
        )
    if report.age:
        listed = ", ".join(f"{name} {1000 * value:.0f}" for name, value in report.age.items())
        lines.append(f"An action's observation was this old when it was sent, in ms: {listed}.")
    if report.used is not None:
        lines.append(f"{100 * report.used:.0f} % of the generated actions were sent.")
    if report.delays:
        lines += ["", "Control steps, per chunk:"]
        for key, delay in report.delays.items():
            lines.append(f"  {key:<9} p50 {delay['p50']:4.0f}, max {delay['max']:4.0f}   {DELAYS[key]}")
        if report.skipped is not None:
            lines.append(
                f"  skipped   {report.skipped} in all: dropped though nothing was sent in their stead"
            )
    lines += ["", *_jump_table(report)]
    return "\n".join(lines)


def _jump_table(report: Report) -> list[str]:
    if not report.boundaries:
        return ["No chunk follows another in the trace: nothing is known of jumps between them."]
    width = max(len("joint"), *map(len, report.jumps))
    lines = [
        f"Change of the action from one to the next, at {report.boundaries} changes of the chunk and within:",
        f"  {'joint':<{width}}  {'at p50':>9} {'at max':>9} {'within p50':>11} {'within max':>11}"
        + (f" {'at max / std':>13}" if any(jump.std for jump in report.jumps.values()) else ""),
    ]
    for name, jump in report.jumps.items():
        inside = jump.within or {"p50": float("nan"), "max": float("nan")}
        lines.append(
            f"  {name:<{width}}  {jump.boundary['p50']:9.3g} {jump.boundary['max']:9.3g} "
            f"{inside['p50']:11.3g} {inside['max']:11.3g}"
            + (f" {jump.boundary['max'] / jump.std:13.2f}" if jump.std else "")
            + ("   <- worst" if name == report.worst else "")
        )
    return lines


def plot(run: Run, report: Report, file: Path) -> None:
    """Joint by joint what was sent and where it was; chunks, stalls, and when the policy ran."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    began = min(event["t"] for event in (*run.observations[:1], run.actions[0]))
    rows = len(run.joints) + bool(run.inferences)
    heights = [1.0] * len(run.joints) + [0.35] * bool(run.inferences)
    figure, axes = plt.subplots(
        rows,
        sharex=True,
        squeeze=False,
        figsize=(11, 1.2 + 1.15 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
    )
    colours = ("#1f6fb4", "#e0812a")
    for axis, name in zip(axes[:, 0], run.joints, strict=False):
        seen = [(event["t"] - began, _position(event["joints"], name)) for event in run.observations]
        seen = [point for point in seen if point[1] is not None]
        if seen:
            axis.plot(*zip(*seen, strict=True), color="0.6", linewidth=2.5, label="observed")
        for episode in run.episodes:
            for number, (_, group) in enumerate(
                itertools.groupby(episode, key=lambda action: action.get("chunk"))
            ):
                points = [(action["t"] - began, action["values"][name]) for action in group]
                axis.plot(
                    *zip(*points, strict=True),
                    color=colours[number % 2],
                    linewidth=1.6,
                    marker=".",
                    markersize=2.5,
                )
        axis.set_ylabel(name.removesuffix(".pos"), rotation=0, ha="right", va="center", fontsize=9)
    for axis in axes[:, 0]:
        for episode in run.episodes:
            for before, after in itertools.pairwise(episode):
                if after["t"] - before["t"] >= 2 / run.fps:
                    axis.axvspan(
                        before["t"] - began, after["t"] - began, color="#d62728", alpha=0.18, linewidth=0
                    )
        axis.grid(axis="y", color="0.92")
        axis.tick_params(labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    if run.inferences:
        axis = axes[-1, 0]
        bars = [
            (event["began"] - began, event["ended"] - event["began"]) for event in run.inferences.values()
        ]
        for parity in (0, 1):
            axis.broken_barh(bars[parity::2], (0, 1), color=colours[parity])
        axis.set_yticks([])
        axis.set_ylabel("policy runs", rotation=0, ha="right", va="center", fontsize=9)
    axes[-1, 0].set_xlabel("seconds")
    figure.align_ylabels()
    handles = [
        plt.Line2D([], [], color="0.6", linewidth=2.5, label="observed"),
        plt.Line2D([], [], color=colours[0], marker=".", label="sent, one chunk"),
        plt.Line2D([], [], color=colours[1], marker=".", label="sent, the next chunk"),
        plt.Rectangle((0, 0), 1, 1, color="#d62728", alpha=0.18, label="stall"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    kind = f"{report.start['kind']}: " if report.start.get("kind") else ""
    figure.suptitle(f"{kind}{report.loop_timing}", fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)
