"""What the demo shows at its end: success beside the baselines, the training loss, the policy at work."""

import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import av
from PIL import Image, ImageDraw

from lerobot_pi0.demo.command import START, TRAINING_LOSS
from lerobot_pi0.demo.suites import Evaluation
from lerobot_pi0.tables import format_table

START_LINE = re.compile(START.format(step=r"(\d+)"))

# A contact sheet.
FRAMES_PER_SECOND, HOLD_FRAMES, MOST_FRAMES = 10, 8, 60
TILE_WIDTH, TILES_PER_ROW, FAILURES_PER_TASK = 160, 5, 2
CAPTION_LINES, CAPTION_HEIGHT = 3, 44
BASELINE = "open-loop"
BACKGROUND, SUCCESS, FAILURE = "#ffffff", "#1a7f37", "#b35900"


@dataclass(frozen=True)
class TaskResult:
    """The result of lerobot-eval for one task."""

    successes: list[bool]
    videos: list[Path]  # of the first episodes

    @property
    def rate(self) -> float:
        """Share of episodes that succeeded."""
        return sum(self.successes) / len(self.successes)


def read_evaluation(
    folder: Path, task_name: Callable[[str, int], str] = lambda group, _: group
) -> dict[str, TaskResult]:
    """The `eval_info.json` that lerobot-eval left in its output folder: {task: result}.

    `task_name` gives the task's name for LeRobot's group and number, as `Suite.task_name` does.
    """
    info = json.loads((folder / "eval_info.json").read_text(encoding="utf-8"))
    return {
        task_name(task["task_group"], task["task_id"]): TaskResult(
            [bool(success) for success in task["metrics"]["successes"]],
            [Path(video) for video in task["metrics"]["video_paths"]],
        )
        for task in info["per_task"]
    }


@dataclass(frozen=True)
class Table:
    """Success per task beside the baselines: rows of text and what the columns mean."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]

    def __str__(self) -> str:
        return "\n".join([format_table([self.header, *self.rows]), "", *self.notes])


def success_table(
    evaluations: Sequence[Evaluation],
    results: Sequence[Mapping[str, TaskResult]],
    baselines: Sequence[Mapping[str, float]],
) -> Table:
    """Success per task with its interval, beside the open-loop baseline, for each evaluation.

    A task that is not above its baseline is marked.

    Args:
        evaluations: what was evaluated, the tasks as instructed first.
        results: for each evaluation, by task.
        baselines: for each evaluation, by task; empty where none was computed.
    """
    header, columns, notes = ["task"], [], []
    for evaluation, by_task, baseline in zip(evaluations, results, baselines, strict=True):
        header.append(evaluation.column)
        notes.append(f"{evaluation.column}: {evaluation.meaning}")
        columns.append({task: _percent(result, baseline.get(task)) for task, result in by_task.items()})
        columns[-1]["mean"] = f"{mean([result.rate for result in by_task.values()]):.0%}"
        if baseline:
            header.append(BASELINE if evaluation is evaluations[0] else f"{BASELINE}, {evaluation.column}")
            columns.append({task: f"{rate:.0%}" for task, rate in baseline.items()})
            columns[-1]["mean"] = f"{mean(baseline.values()):.0%}"
    rows: list[tuple[str, ...]] = [
        (task, *(column.get(task, "") for column in columns)) for task in [*results[0], "mean"]
    ]
    episodes = len(next(iter(results[0].values())).successes)
    notes.append(
        f"{BASELINE}: the average demonstration, replayed without observations, in the same episodes"
    )
    notes.append(f"{episodes} episodes of each task; in brackets 95 % intervals (Wilson)")
    if any("*" in cell for row in rows for cell in row):
        notes.append(f"*: not above the {BASELINE} baseline")
    return Table(tuple(header), rows, notes)


def _percent(result: TaskResult, baseline: float | None) -> str:
    low, high = wilson_interval(sum(result.successes), len(result.successes))
    mark = " *" if baseline is not None and result.rate <= baseline else ""
    return f"{result.rate:.0%} ({low:.0%}–{high:.0%}){mark}"


def wilson_interval(successful: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    share, z = successful / of, 1.96
    middle, width = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    low, high = ((middle + sign * width) / (1 + z * z / of) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)  # rounding leads out by 1e-17


def training_losses(log: Path, log_freq: int) -> list[tuple[int, float]]:
    """(step, loss) from the log of lerobot-train, which prints a loss every `log_freq` steps.

    A log may hold several runs, each resumed from an earlier step than the last one reached; the later run
    counts.
    """
    losses: dict[int, float] = {}
    step = 0
    for line in log.read_text(encoding="utf-8").splitlines():
        if start := START_LINE.match(line):
            step = int(start[1]) // log_freq * log_freq
            losses = {earlier: loss for earlier, loss in losses.items() if earlier <= step}
        elif found := TRAINING_LOSS.search(line):
            step += log_freq
            losses[step] = float(found[1])
    return sorted(losses.items())


def plot_losses(losses: Sequence[tuple[int, float]], path: Path) -> None:
    """Draw (step, loss) into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([step for step, _ in losses], [loss for _, loss in losses], linewidth=1)
    axes.set(xlabel="training step", ylabel="flow-matching loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


@dataclass(frozen=True)
class Tile:
    """A filmed episode of a contact sheet."""

    caption: str
    success: bool
    video: Path


def success_tiles(results: Mapping[str, TaskResult], instructions: Mapping[str, str]) -> list[Tile]:
    """One tile per task: the first filmed success, or the first episode if none was filmed."""
    tiles = []
    for task, result in results.items():
        filmed = result.successes[: len(result.videos)]
        shown = filmed.index(True) if True in filmed else 0
        tiles.append(Tile(instructions[task], filmed[shown], result.videos[shown]))
    return tiles


def failure_tiles(
    results: Mapping[str, TaskResult], instructions: Mapping[str, str], evaluation: str = ""
) -> list[Tile]:
    """The first filmed failures of each task; evaluation and number of the episode stand in the caption."""
    start = f"{evaluation}, episode" if evaluation else "episode"
    tiles = []
    for task, result in results.items():
        failures = [index for index in range(len(result.videos)) if not result.successes[index]]
        tiles += [
            Tile(f"{start} {index}: {instructions[task]}", False, result.videos[index])
            for index in failures[:FAILURES_PER_TASK]
        ]
    return tiles


def contact_sheet(tiles: Sequence[Tile], path: Path) -> None:
    """A GIF of episodes side by side; a caption shows success or failure by its colour at the end."""
    episodes = [list(_frames(tile.video)) for tile in tiles]
    # Every fourth frame (as many as the policy looks at) of Meta-World is half the real speed at 10 per
    # second, which the eye can follow. Longer episodes go faster.
    stride = max(4, math.ceil(max(map(len, episodes)) / MOST_FRAMES))
    episodes = [[*frames[:-1:stride], frames[-1]] for frames in episodes]
    width = min(episodes[0][0].width, TILE_WIDTH)
    height = width * episodes[0][0].height // episodes[0][0].width
    columns = min(len(tiles), TILES_PER_ROW)
    tall = height + CAPTION_HEIGHT
    pages = []
    for index in range(max(map(len, episodes)) + HOLD_FRAMES):
        page = Image.new("RGB", (width * columns, tall * math.ceil(len(tiles) / columns)), BACKGROUND)
        draw = ImageDraw.Draw(page)
        for number, (tile, frames) in enumerate(zip(tiles, episodes, strict=True)):
            left, top = number % columns * width, number // columns * tall
            frame = frames[min(index, len(frames) - 1)]
            page.paste(frame.resize((width, height)), (left, top + CAPTION_HEIGHT))
            over = index >= len(frames) - 1
            colour = (SUCCESS if tile.success else FAILURE) if over else "black"
            caption = "\n".join(textwrap.wrap(tile.caption, width=max(8, width // 6))[:CAPTION_LINES])
            draw.multiline_text((left + 4, top + 2), caption, fill=colour, spacing=2)
        pages.append(page)
    # One palette for all pages: otherwise still regions flicker, and no page can be stored as a difference.
    palette = pages[0].quantize(256, dither=Image.Dither.NONE)
    indexed = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    indexed[0].save(
        path,
        save_all=True,
        append_images=indexed[1:],
        duration=1000 // FRAMES_PER_SECOND,
        loop=0,
        optimize=True,
    )


def _frames(video: Path) -> Iterator[Image.Image]:
    with av.open(str(video)) as container:
        yield from (frame.to_image() for frame in container.decode(video=0))
