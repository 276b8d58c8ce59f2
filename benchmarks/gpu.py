"""`lerobot-pi0 bench --device=cuda`: is it right on this device, how fast, and how is LeRobot's π0 there?

One process with random weights, made on the device, in sections that have a share of the time each. The
report is written after every section; one that fails has its error, as a row has, and the next goes on.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lerobot_pi0.errors import UserError
from lerobot_pi0.tools.step_time import name_of

from .context import Context, Row, described, time_limit
from .correctness import correctness
from .device import attention, ceilings, start
from .flags import BenchConfig
from .inference import batches, chunk, in_tree, optional, pieces, rtc
from .scaling import plot, scaling, sentence
from .training_steps import training
from .worker import Setup

logger = logging.getLogger("lerobot_pi0.bench")


@dataclass(frozen=True)
class Section:
    """Writes rows into a context. `seconds` is its share of the budget; what it leaves is for later ones."""

    run: Callable[[Context], None]
    seconds: float


# In order. The shares are those of a check of an H200 in six minutes, in proportion.
SECTIONS = {
    "start": Section(start, 15),
    "ceilings": Section(ceilings, 25),
    "attention": Section(attention, 25),
    "correctness": Section(correctness, 100),
    "chunk": Section(chunk, 80),
    "pieces": Section(pieces, 50),
    "batch": Section(batches, 25),
    "rtc": Section(rtc, 40),
    "in-tree": Section(in_tree, 45),
    "training": Section(training, 120),
    "optional": Section(optional, 75),
}
# Minutes by itself, and asked for by name.
ON_REQUEST = {"scaling": Section(scaling, 300)}
BUDGET = 600.0


@dataclass(frozen=True)
class DeviceGoal:
    """A figure of a row, and its limit on an H200. `anywhere`: it does not depend on the device's speed."""

    what: str
    section: str
    row: str
    figure: str
    limit: float | bool
    at_least: bool = False
    anywhere: bool = False

    def judge(self, sections: dict[str, dict[str, Row]], device: str) -> dict[str, Any]:
        """As it stands in the report; `met` is None where it was not measured, or on another device."""
        value = sections.get(self.section, {}).get(self.row, {}).get(self.figure)
        judged = value is not None and (self.anywhere or "H200" in device)
        met = (value >= self.limit if self.at_least else value <= self.limit) if judged else None
        return {
            "goal": self.what,
            "at_least" if self.at_least else "at_most": self.limit,
            "value": value,
            "met": met,
        }


def _right(
    what: str, section: str, row: str, figure: str, limit: float | bool, at_least: bool = True
) -> DeviceGoal:
    return DeviceGoal(what, section, row, figure, limit, at_least, anywhere=True)


_FULL = "full, 2 cameras, batch 32"
_FULL_3 = "full, 3 cameras, batch 16"
GOALS = (
    _right("golden values that fail", "correctness", "golden values", "failed", 0, at_least=False),
    _right("float32 actions, cosine", "correctness", "float32 vs CPU", "actions", 1 - 1e-6),
    _right("float32 gradients, cosine", "correctness", "float32 vs CPU", "worst_gradient", 0.99),
    _right("bf16 actions, cosine", "correctness", "bf16 vs CPU", "actions", 0.9999),
    _right("bf16 gradients, cosine", "correctness", "bf16 vs CPU", "worst_gradient", 0.99),
    _right("difference to in-tree", "correctness", "vs in-tree, tiny", "largest_difference", 1e-3, False),
    _right("graph = eager", "correctness", "auto vs eager", "identical", True),
    _right("two threads", "correctness", "threads, compile", "identical", True),
    _right("further compilations", "correctness", "threads, compile", "compilations", 0, False),
    _right("gradients finite", "training", "full, 2 cameras, batch 8", "gradients_finite", True),
    _right("peak over plan", "training", "full, 2 cameras, batch 8", "peak_over_plan", 1.05, False),
    _right("in-tree eager / ours", "in-tree", "bf16, eager", "ratio", 4),
    _right("in-tree compiled / ours", "optional", "in-tree, compiled", "ratio", 2),
    DeviceGoal("chunk, ms", "chunk", "auto", "p50_ms", 20),
    DeviceGoal("chunk, compiled, ms", "chunk", "compile", "p50_ms", 20),
    DeviceGoal("chunk, 3 cameras, ms", "chunk", "auto, 3 cameras", "p50_ms", 24),
    DeviceGoal("p99 - p50, ms", "chunk", "auto", "spread_ms", 1),
    DeviceGoal("host's share, ms", "chunk", "auto", "host_ms", 1),
    DeviceGoal("first chunk, s", "chunk", "auto", "first_s", 5),
    DeviceGoal("first chunk, compiled, s", "chunk", "compile", "first_s", 60),
    DeviceGoal("peak of a chunk, GB", "chunk", "auto", "peak_gb", 8),
    DeviceGoal("plan ×1, ms", "rtc", "plan ×1", "p50_ms", 10),
    DeviceGoal("guided chunk, ms", "rtc", "guided, auto", "p50_ms", 25),
    DeviceGoal("batches of 8, chunks/s", "batch", "batch 8", "chunks_per_s", 150, at_least=True),
    DeviceGoal("batches of 32, chunks/s", "batch", "batch 32", "chunks_per_s", 180, at_least=True),
    DeviceGoal("full, batch 32, samples/s", "training", _FULL, "samples_per_s", 45, at_least=True),
    DeviceGoal("full, 3 cameras, samples/s", "training", _FULL_3, "samples_per_s", 30, at_least=True),
    DeviceGoal(
        "expert only, 3 cameras, samples/s", "training", "expert only, 3 cameras, batch 32", "samples_per_s",
        120, at_least=True,
    ),
    DeviceGoal(
        "expert only, 2 cameras, samples/s", "training", "expert only, 2 cameras, batch 32", "samples_per_s",
        170, at_least=True,
    ),
    DeviceGoal("LoRA, samples/s", "training", "LoRA, 2 cameras, batch 8", "samples_per_s", 30, at_least=True),
)  # fmt: skip


def main(config: BenchConfig) -> str:
    """Run the sections, and give back the table. Raises UserError for one that is not there, or no device."""
    chosen, device = select(config.sections), config.device or "cpu"
    check(device, config)
    if config.threads:
        torch.set_num_threads(config.threads)
    setup = Setup(config.size, Path(), config.demo, torch.get_num_threads(), config.model, device=device)
    report = run(Context(setup), chosen, config.budget or BUDGET, config.json)
    if config.plot is not None and "scaling" in chosen:
        plot(report["sections"]["scaling"]["rows"], config.plot)
    return table(report)


def select(names: str) -> dict[str, Section]:
    """Sections by their names, separated by commas; all but those on request for an empty string."""
    known = SECTIONS | ON_REQUEST
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(SECTIONS)
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(f"--sections names {unknown}; there are {', '.join(known)}")
    return {name: section for name, section in known.items() if name in wanted}


def check(device: str, config: BenchConfig) -> None:
    """Raises UserError for flags that do not go together, or a device that is not there."""
    if config.rows:
        raise UserError("--rows is for the comparison on a CPU: on a device there are --sections")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device is cuda, cuda:1, … or cpu, got '{device}'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device={device}: this torch ({torch.__version__}) finds no CUDA device. `nvidia-smi` says "
            "whether there is one, and pytorch.org/get-started how to install a torch with CUDA"
        )
    if config.size == "small" and kind == "cuda":
        raise UserError("--size=small is for a CPU: a GPU needs --size=full")
    if config.budget is not None and config.budget <= 0:
        raise UserError(f"--budget is in seconds and above 0, got {config.budget}")


def run(
    context: Context, chosen: dict[str, Section], budget: float, file: Path | None = None
) -> dict[str, Any]:
    """The report: sections with their rows, and the goals. It is written to `file` after each section."""
    scale = budget / sum(section.seconds for section in chosen.values())
    last = time.perf_counter() + budget
    report: dict[str, Any] = {
        "model": context.setup.model,
        "size": context.setup.size,
        "device": context.setup.device,
        "machine": name_of(context.setup.device),
        "versions": {name: version(name) for name in ("torch", "lerobot", "transformers")},
        "budget_s": budget,
        "sections": {},
    }
    waiting = list(chosen.values())
    for name, section in chosen.items():
        waiting.remove(section)
        later = scale * sum(section.seconds for section in waiting)
        begin = time.perf_counter()
        context.rows, context.ends = {}, last - later
        logger.info("%s (at most %.0f s)", name, context.left())
        said: dict[str, Any] = {}
        try:
            with time_limit(context.left()):
                section.run(context)
        except Exception as error:  # noqa: BLE001  # the sections after it go on
            said["error"] = described(error)
        context.done[name] = context.rows
        report["sections"][name] = {"seconds": time.perf_counter() - begin, **said, "rows": context.rows}
        report["goals"] = judged(report)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(report, indent=1) + "\n")
    return report


def judged(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals; none of them at another size, or on a CPU."""
    if report["size"] != "full" or report["device"] == "cpu":
        return []
    rows = {name: section["rows"] for name, section in report["sections"].items()}
    return [goal.judge(rows, report["machine"]) for goal in GOALS]


def table(report: dict[str, Any]) -> str:
    """The report in Markdown, to be pasted."""
    sections = report["sections"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [f"**{report['model']}, {report['size']} size, on {report['machine']}** ({versions})", ""]
    if report["goals"]:
        lines += ["| goal | limit | here | met |", "|---|---|---|---|"]
        for goal in report["goals"]:
            sign, limit = ("≥", goal["at_least"]) if "at_least" in goal else ("≤", goal["at_most"])
            met = {True: "yes", False: "**no**", None: "–"}[goal["met"]]
            limit = "yes" if limit is True else f"{sign} {limit:g}"
            lines.append(f"| {goal['goal']} | {limit} | {cell(goal['value'])} | {met} |")
        lines.append("")
        lines += ["Limits in ms, s, GB and per second are of an H200, and judged on it alone.", ""]
    lines += ["| section | row | result |", "|---|---|---|"]
    for name, section in sections.items():
        for row, figures in section["rows"].items():
            lines.append(f"| {name} | {row} | {result(figures)} |")
        if "error" in section:
            lines.append(f"| {name} | | **{section['error']}** |")
    if "scaling" in sections:
        rows = sections["scaling"]["rows"].items()
        lines += ["", *(f"- {sentence(name, row)}" for name, row in rows if len(row.get("values", ())) > 1)]
    return "\n".join(lines)


def result(figures: Row) -> str:
    """A row's figures in a line."""
    for name in ("error", "skipped"):
        if name in figures:
            return f"{name}: {figures[name]}".replace("|", "/")
    return ", ".join(f"{name} {cell(value)}" for name, value in figures.items()).replace("|", "/")


def cell(value: Any) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.{7 if 0.99 <= value < 1 else 4}g}"
        case list():
            return " ".join(map(cell, value))
        case dict():
            return "; ".join(f"{name} {cell(of)}" for name, of in value.items())
    return str(value)
