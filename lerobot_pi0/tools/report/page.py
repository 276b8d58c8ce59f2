"""The page of `lerobot-pi0 report`: one HTML file with its pictures in it, readable on a phone."""

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from lerobot_pi0.tools.open_loop import HOLD, MEAN, NEAREST, Recording, Selection
from lerobot_pi0.tools.report.evaluation import PHASES, Report, executed

COLOURS = {"policy": "#1f5fbf", HOLD: "#b35900", MEAN: "#8a8a8a", NEAREST: "#7a3fa0"}
RECORDED, SPREAD = "#111111", "#a9c4ea"
WIDTH, DPI = 4.8, 150  # inches: text of 9 points is 10 pixels high where the page is 390 wide
PICTURE = 200  # pixels: the longer side of a key frame

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
  max-width: 720px; padding: 1rem; }
p, h3 { overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .4rem 0; }
.verdict { border-left: .4rem solid; padding: .6rem .9rem; margin: 1rem 0; background: #f6f8fa; }
.verdict p:first-child { font-size: 1.15rem; font-weight: 600; }
.good { border-color: #1a7f37; } .bad { border-color: #b35900; }
.warning { background: #fff6e0; border: 1px solid #e0b84c; padding: .5rem .9rem; }
.note { color: #555; font-size: .9rem; }
img { display: block; max-width: 100%; height: auto; margin: .5rem auto; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .4rem; text-align: right; border-bottom: 1px solid #e5e5e5; vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.bar { height: .5rem; min-width: 2px; margin-top: .15rem; }
@media (max-width: 480px) { table { font-size: .72rem; } th, td { padding: .3rem .2rem; } }
"""


def write_page(
    folder: Path,
    policy: str,
    report: Report,
    recording: Recording,
    frames: np.ndarray,
    planned: np.ndarray,
    selection: Selection,
    pictures: dict[int, dict[str, Tensor]],
) -> Path:
    """Write report.html and, beside it, its pictures; returns the page's path.

    `pictures`: camera frames (3, height, width) in [0, 1] by row of the recording and camera.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = report.verdict()
    mood = "good" if all(c.is_beaten for c in report.comparisons) else "bad"
    count = f"{report.num_chunks} chunks of {len(report.episodes)} episodes"
    body = [
        "<h1>Open-loop report</h1>",
        f'<p class="note">{escape(policy)}<br>{count}, one every {report.stride} frames</p>',
        f'<div class="verdict {mood}">' + "".join(f"<p>{escape(line)}</p>" for line in lines) + "</div>",
        f'<p class="{"note" if selection.trained_on is False else "warning"}">{escape(selection.note)}</p>',
        "<h2>Against guesses that need no policy</h2>",
        _comparison(report),
        "<h2>Error against the horizon</h2>",
        _inline(_png(_horizon(report)), folder / "horizon.png", "Error at each step of a chunk"),
        "<p>How far the chunks are from the recorded actions, and how far the policy's own samples are from "
        f"their mean: {report.spread:.2f} on average. Samples far apart say that the policy is not sure, or "
        "knows several ways; samples close together where the error is large, that it is sure and wrong.</p>",
        "<h2>Joint by joint</h2>",
        _joints(report),
        *_grippers(report),
        "<h2>Episodes</h2>",
        '<p class="note">Black: recorded. Coloured: chunks, each from its dot on, as planned from one noise '
        "sample. Shaded: the standard deviation of all samples, over the steps that a robot executes.</p>",
    ]
    for episode in report.episodes:
        own = np.flatnonzero(recording.episode[frames] == episode)
        instruction = recording.instructions.get(int(recording.task[frames[own[0]]]), "")
        body.append(f"<h3>Episode {episode}: {escape(instruction)}</h3>")
        shown = [pictures[int(frame)] for frame in frames[own] if int(frame) in pictures]
        if shown:
            alt = f"Episode {episode}: first, middle and last frame looked at"
            body.append(_inline(_strip(shown), folder / f"episode_{episode}_frames.png", alt))
        figure = _episode(report, recording, frames, planned, episode)
        alt = f"Episode {episode}: chunks over recorded actions"
        body.append(_inline(_png(figure), folder / f"episode_{episode}.png", alt))
    body += [
        "<h2>How it was measured</h2>",
        '<p class="note">Every chunk is planned from a recorded observation (open loop): errors do not add '
        "up as they do on a robot, and a policy that does well here may still fail there. Errors are mean "
        "absolute differences over the steps within the episode, averaged over the noise samples, each joint "
        "divided by the standard deviation of its actions in the dataset. Holding still repeats the last "
        "action: an arm that is told positions then stands still. The mean action is the dataset's. The "
        "nearest demonstration is what followed the nearest state (not picture) of the same task in another "
        "episode. Intervals: 95 %, whole episodes resampled. The numbers are in report.json.</p>",
    ]
    page = folder / "report.html"
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Open-loop report</title><style>{STYLE}</style></head>\n<body>\n"
    )
    page.write_text(head + "\n".join(body) + "\n</body></html>\n", encoding="utf-8")
    return page


def _comparison(report: Report) -> str:
    most = max(report.error, *(c.error for c in report.comparisons))
    rows = [("this policy", "policy", report.error, "")]
    for c in report.comparisons:
        interval = "" if c.low is None else f"<br>{c.low:.2f} to {c.high:.2f}"
        rows.append((c.baseline, c.baseline, c.error, f"{c.ratio:.2f}{interval}"))
    cells = "".join(
        f'<tr><td>{escape(name)}<div class="bar" style="width:{100 * error / (most or 1):.0f}%;'
        f'background:{COLOURS[key]}"></div></td><td>{error:.3f}</td><td>{ratio}</td></tr>'
        for name, key, error, ratio in rows
    )
    return (
        '<div class="table"><table><tr><th>from</th><th>error</th><th>policy&nbsp;/ guess</th></tr>'
        f"{cells}</table></div>"
        '<p class="note">Error in standard deviations of the data.</p>'
    )


def _joints(report: Report) -> str:
    head = "".join(
        f"<th>{name}</th>" for name in ("joint", "error", "of&nbsp;σ", *PHASES, "best guess", "seam")
    )
    most = max(joint.normalised for joint in report.joints)
    rows = []
    for joint in report.joints:
        values = [joint.normalised, *joint.by_phase, min(joint.baselines.values()), joint.seam]
        shades = [_shade(value, most) for value in values[:-2]] + ["", ""]
        cells = "".join(
            f"<td{shade}>{'–' if value is None else f'{value:.2f}'}</td>"
            for value, shade in zip(values, shades, strict=True)
        )
        rows.append(f"<tr><td>{escape(joint.name)}</td><td>{joint.error:.3g}</td>{cells}</tr>")
    seam = ""
    if report.seams:
        s = report.seams
        seam = (
            f"Seam: the jump to the next chunk, over {s.count} seams; {s.jump:.2f} on average, where a step "
            f"within a chunk is {s.step:.2f} and a recorded one {s.recorded:.2f}."
        )
    return (
        f'<div class="table"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
        '<p class="note">Error in the robot\'s units; all else in standard deviations (σ) of the joint in '
        f"the data: over all steps, in the first, middle and last third of episodes. {seam}</p>"
    )


def _shade(value: float | None, most: float) -> str:
    if value is None or not most:
        return ""
    return f' style="background:rgba(179,89,0,{0.45 * min(value / most, 1):.2f})"'


def _grippers(report: Report) -> list[str]:
    moving = [g for g in report.grippers if g.recorded or g.extra]
    if not moving:
        return []
    rows = "".join(
        f"<tr><td>{escape(g.name)}</td><td>{g.recorded}</td><td>{len(g.offsets)}</td>"
        f"<td>{f'{np.median(g.offsets):+.2f} s' if g.offsets else '–'}</td>"
        f"<td>{g.missed}</td><td>{g.extra}</td></tr>"
        for g in moving
    )
    head = "".join(
        f"<th>{name}</th>" for name in ("gripper", "recorded", "made", "late by", "missed", "extra")
    )
    return [
        "<h2>Openings and closings</h2>",
        f'<div class="table"><table><tr>{head}</tr>{rows}</table></div>',
        '<p class="note">Crossings of the middle of the recorded range. One of the policy\'s belongs to the '
        "nearest recorded one of its direction, at most a chunk away.</p>",
    ]


def _horizon(report: Report) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3), layout="constrained")
    axes = figure.add_subplot()
    for name, errors in report.horizon.items():
        values = [np.nan if error is None else error for error in errors]
        label = "this policy" if name == "policy" else name
        width = 2 if name == "policy" else 1.2
        axes.plot(values, color=COLOURS[name], label=label, linewidth=width)
    spread = [np.nan if value is None else value for value in report.spread_by_step]
    axes.plot(spread, color=COLOURS["policy"], linestyle=":", label="spread of its samples")
    axes.axvline(min(report.stride, len(spread)) - 0.5, color="#cccccc", linewidth=1, zorder=0)
    axes.set(xlabel="step of the chunk (line: where the next one begins)", ylabel="standard deviations")
    axes.set_ylim(0)
    _plain(axes)
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.45, 1), ncols=2)
    return figure


def _episode(
    report: Report, recording: Recording, frames: np.ndarray, planned: np.ndarray, episode: int
) -> Any:
    from matplotlib.figure import Figure

    rows = recording.frames(episode)
    size = len(recording.joints)
    figure = Figure(figsize=(WIDTH, 0.5 + 1.15 * size), layout="constrained")
    all_axes = figure.subplots(size, 1, sharex=True, squeeze=False)[:, 0]
    at, _ = executed(recording, frames, planned, episode, report.stride)
    own = np.flatnonzero(recording.episode[frames] == episode)
    # The chunk that is under way at each executed frame, and how old it is.
    chunk = own[np.searchsorted(frames[own], at, side="right") - 1]
    samples = planned[chunk, :, at - frames[chunk]]  # (n, K, D)
    mean, spread = samples.mean(1), samples.std(1)
    for j, axes in enumerate(all_axes):
        axes.fill_between(
            at - rows[0], (mean - spread)[:, j], (mean + spread)[:, j], color=SPREAD, alpha=0.6, linewidth=0
        )
        axes.plot(recording.actions[rows, j], color=RECORDED, linewidth=1.4)
        for n, i in enumerate(own):
            length = min(planned.shape[2], rows[-1] + 1 - frames[i])
            start, colour = frames[i] - rows[0], ("#1f5fbf", "#c2410c")[n % 2]
            axes.plot(
                np.arange(start, start + length),
                planned[i, 0, :length, j],
                color=colour,
                linewidth=0.8,
                alpha=0.8,
            )
            axes.plot(start, planned[i, 0, 0, j], ".", color=colour, markersize=4)
        axes.set_title(recording.joints[j], fontsize=9, loc="left", pad=2)
        _plain(axes)
    all_axes[-1].set_xlabel("frame")
    return figure


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_size(9)
    axes.yaxis.label.set_size(9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _strip(shown: list[dict[str, Tensor]]) -> Image.Image:
    """Key frames side by side, a row for each camera."""
    rows = []
    for camera in shown[0]:
        row = []
        for pictures in shown:
            array = (pictures[camera].float().clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
            picture = Image.fromarray(array)
            ratio = PICTURE / max(picture.size)
            row.append(picture.resize((round(picture.width * ratio), round(picture.height * ratio))))
        rows.append(row)
    width = max(sum(picture.width for picture in row) + 6 * (len(row) - 1) for row in rows)
    strip = Image.new("RGB", (width, sum(row[0].height for row in rows) + 6 * (len(rows) - 1)), "white")
    top = 0
    for row in rows:
        for n, picture in enumerate(row):
            strip.paste(picture, (n * (picture.width + 6), top))
        top += row[0].height + 6
    return strip


def _png(figure: Any) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI, format="png")
    return Image.open(file).convert("RGB").quantize(64, dither=Image.Dither.NONE)


def _inline(picture: Image.Image, file: Path, alt: str) -> str:
    """An image element with the picture in it, which is also saved as a file."""
    if picture.mode == "RGB":
        picture = picture.quantize(256)
    picture.save(file, optimize=True)
    data = base64.b64encode(file.read_bytes()).decode()
    return (
        f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}" width="{picture.width}" '
        f'height="{picture.height}">'
    )
