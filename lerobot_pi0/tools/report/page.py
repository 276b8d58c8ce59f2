"""The page of `lerobot-pi0 report`: one HTML file with its pictures in it, readable on a phone."""

import base64
import io
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image
from torch import Tensor

from lerobot_pi0.tools.open_loop import HOLD, MEAN, NEAREST, Recording, Selection
from lerobot_pi0.tools.report.evaluation import Report, executed

COLOURS = {"policy": "#1f5fbf", HOLD: "#b35900", MEAN: "#8a8a8a", NEAREST: "#7a3fa0"}
RECORDED, SPREAD = "#111111", "#a9c4ea"
WIDTH, DPI = 4.8, 150  # inches: text of 9 points is 10 pixels high where the page is 390 wide
PICTURE = 200  # pixels: the longer side of a key frame


@dataclass(frozen=True)
class Picture:
    """A PNG as the page embeds it."""

    data: str  # base64
    alt: str
    width: int
    height: int


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    second_line: str = ""
    shade: float = 0.0
    bar: float | None = None  # per cent of the width
    colour: str = ""


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
    episodes = []
    for episode in report.episodes:
        own = np.flatnonzero(recording.episode[frames] == episode)
        shown = [pictures[int(frame)] for frame in frames[own] if int(frame) in pictures]
        figure = _png(_episode(report, recording, frames, planned, episode))
        drawn = [
            *([(_strip(shown), "_frames", "first, middle and last frame evaluated")] if shown else []),
            (figure, "", "chunks over recorded actions"),
        ]
        episodes.append(
            {
                "number": episode,
                "instruction": recording.instructions.get(int(recording.task[frames[own[0]]]), ""),
                "pictures": [
                    _save(picture, folder / f"episode_{episode}{suffix}.png", f"Episode {episode}: {alt}")
                    for picture, suffix, alt in drawn
                ],
            }
        )
    template = files("lerobot_pi0.tools.report").joinpath("page.html").read_text("utf-8")
    text = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            policy=policy,
            report=report,
            selection=selection,
            beats_all=all(c.is_beaten for c in report.comparisons),
            comparison=_comparison(report),
            joints=_joints(report),
            grippers=_grippers(report),
            horizon=_save(_png(_horizon(report)), folder / "horizon.png", "Error at each step of a chunk"),
            episodes=episodes,
        )
    )
    page = folder / "report.html"
    page.write_text(text + "\n", encoding="utf-8")
    return page


def _comparison(report: Report) -> list[list[Cell]]:
    most = max(report.error, *(c.error for c in report.comparisons)) or 1

    def row(name: str, key: str, error: float, ratio: Cell) -> list[Cell]:
        return [
            Cell(name, bar=round(100 * error / most), colour=COLOURS[key]),
            Cell(f"{error:.3f}"),
            ratio,
        ]

    rows = [row("this policy", "policy", report.error, Cell(""))]
    for c in report.comparisons:
        interval = "" if c.low is None else f"{c.low:.2f} to {c.high:.2f}"
        rows.append(row(c.baseline, c.baseline, c.error, Cell(f"{c.ratio:.2f}", interval)))
    return rows


def _joints(report: Report) -> list[list[Cell]]:
    most = max(joint.normalized for joint in report.joints) or 1
    rows = []
    for joint in report.joints:
        errors = [joint.normalized, *joint.by_phase]
        shades = [round(0.45 * min(value / most, 1), 2) if value is not None else 0.0 for value in errors]
        cells = [Cell(_number(value), shade=shade) for value, shade in zip(errors, shades, strict=True)]
        others = min(joint.baselines.values()), joint.discontinuity
        rows.append([Cell(joint.name), Cell(f"{joint.error:.3g}"), *cells, *map(Cell, map(_number, others))])
    return rows


def _grippers(report: Report) -> list[list[Cell]]:
    rows = []
    for g in report.grippers:
        if g.recorded or g.extra:
            late = f"{np.median(g.offsets):+.2f} s" if g.offsets else "–"
            numbers = str(g.recorded), str(len(g.offsets)), late, str(g.missed), str(g.extra)
            rows.append([Cell(text) for text in (g.name, *numbers)])
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


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


def _save(picture: Image.Image, file: Path, alt: str) -> Picture:
    """Save a picture, and give it as the page embeds it."""
    if picture.mode == "RGB":
        picture = picture.quantize(256)
    picture.save(file, optimize=True)
    return Picture(base64.b64encode(file.read_bytes()).decode(), alt, picture.width, picture.height)
