"""`lerobot-pi0 bench`: this π0 or π0.5 beside LeRobot's in-tree one, row by row.

Each side runs in a process of its own. This is the coordinator: which rows there are, in which order they are
measured, and what is made of the figures. It computes nothing with a model itself.
"""

import itertools
import json
import logging
import os
import platform
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lerobot_pi0.errors import CommandError, UserError
from lerobot_pi0.tables import format_table

from .flags import BenchConfig, Model
from .inputs import write_checkpoint
from .worker import Measurement, Setup, Worker, WorkerError

logger = logging.getLogger("lerobot_pi0.bench")


# The two sides differ by one rounding of the time, which the fastest sinusoid turns into 1e-4; in π0.5 it is
# in every norm.
SAME_ACTIONS = {"pi0": 2e-4, "pi05": 1e-3}


@dataclass(frozen=True)
class Goal:
    """A figure of a row and its limit."""

    figure: str
    limit: float
    at_least: bool = True

    def judge(self, figures: Mapping[str, float]) -> dict[str, Any]:
        """As it stands in the JSON; `met` is None where the figure was not measured."""
        value = figures.get(self.figure)
        met = None if value is None else (value >= self.limit if self.at_least else value <= self.limit)
        limit = {"at_least" if self.at_least else "at_most": self.limit}
        return {"figure": self.figure, **limit, "value": value, "met": met}

    def __str__(self) -> str:
        return f"{self.figure} {'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True)
class Side:
    """A task, what its setup has of its own, and the memory that it takes at full size."""

    task: str
    gigabytes: float = 1
    changes: Mapping[str, Any] = field(default_factory=dict)
    once: bool = False  # takes minutes, or counts: nothing is gained by repeating it


@dataclass(frozen=True)
class Row:
    """A comparison. `ratio` is theirs / ours where less is better, or as `inverse` says."""

    id: str
    what: str
    ours: Side
    theirs: Side | None
    goals: tuple[Goal, ...]
    figure: str = "seconds"
    unit: str = "s"
    inverse: bool = False  # ratio = ours / theirs
    fresh: bool = False  # every measurement is the first of its process, which runs alone; no warm-up
    quotients: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # further figures: a / b
    also: Side | None = None  # measured after the comparison; its figures belong to the row


def _goal(limit: float, figure: str = "ratio", at_least: bool = True) -> Goal:
    return Goal(figure, limit, at_least)


_OURS = Side("ours:chunk", 7)
_IN_TREE = Side("intree:chunk", 9.5)
_IN_TREE_FLOAT32 = replace(_IN_TREE, gigabytes=14, changes={"dtype": "float32"})
_OURS_LOAD = Side("ours:load", 9)
_IN_TREE_LOAD = Side("intree:load", 19, once=True)
_IN_TREE_EXPERT_ONLY = Side("training:expert_only_in_tree", 12)
_SMALL = {"language_model": "gemma_300m", "dtype": "float32"}

ROWS = (
    Row("chunk_bf16", "chunk, bf16, 2 cameras", _OURS, _IN_TREE, (_goal(1.7),)),
    Row(
        "chunk_bf16_absent_camera",
        "chunk, bf16, 3 cameras configured, 1 absent",
        replace(_OURS, changes={"absent_cameras": 1}),
        replace(_IN_TREE, changes={"absent_cameras": 1}),
        (_goal(2.2),),
    ),
    Row(
        "chunk_bf16_vs_float32", "chunk, bf16, against in-tree float32", _OURS, _IN_TREE_FLOAT32, (_goal(4),)
    ),
    Row(
        "chunk_int8_vs_float32",
        "chunk, int8, against in-tree float32",
        replace(_OURS, changes={"int8": True}),
        _IN_TREE_FLOAT32,
        (_goal(6), _goal(0.99, "ours_cosine"), _goal(0.999, "also_cosine_mean")),
        also=Side("ours:int8_on_demo", 3, once=True),
    ),
    Row(
        "roofline_share_bf16",
        "least operations at the measured GEMM rate / chunk, bf16",
        _OURS,
        Side("roofline:bound", 3),
        (_goal(0.85),),
        quotients={"share_of_plain_gemm": ("theirs_seconds_plain", "ours_seconds")},
    ),
    Row(
        "replan",
        "another chunk from an encoded observation, bf16, against a full one",
        Side("ours:replan", 9),
        _IN_TREE,
        (_goal(8), _goal(1, "ours_identical")),
    ),
    Row(
        "queue_pop",
        "select_action that only takes from the queue",
        Side("ours:queue_pop"),
        Side("intree:queue_pop", 2),
        (_goal(50), _goal(50, "ours_microseconds", at_least=False)),
        figure="microseconds",
        unit="µs",
    ),
    Row(
        "load",
        "from_pretrained to the first chunk, bf16, file in the page cache",
        _OURS_LOAD,
        _IN_TREE_LOAD,
        (_goal(15),),
        fresh=True,
    ),
    Row(
        "memory_bf16",
        "peak memory of loading and the first chunk, bf16",
        _OURS_LOAD,
        _IN_TREE_LOAD,
        (_goal(0.75, at_least=False), _goal(0.45, "of_float32_weights", at_least=False)),
        figure="peak_bytes",
        unit="bytes",
        inverse=True,
        fresh=True,
        quotients={"of_float32_weights": ("ours_peak_bytes", "theirs_float32_weight_bytes")},
    ),
    Row(
        "expert_only_step",
        "forward and backward, expert only, bf16",
        Side("training:expert_only_ours", 10),
        _IN_TREE_EXPERT_ONLY,
        (_goal(1.8), _goal(0.4, "activation_share", at_least=False)),
        quotients={"activation_share": ("ours_activation_bytes", "theirs_activation_bytes")},
    ),
    Row(
        "expert_only_step_gemma_300m",
        "the same with a Gemma 300M as language model, float32",
        Side("training:expert_only_ours", 6, _SMALL),
        Side("training:expert_only_in_tree", 8, _SMALL),
        (_goal(1.35),),
        quotients={"activation_share": ("ours_activation_bytes", "theirs_activation_bytes")},
    ),
    Row(
        "expert_only_flow_samples",
        "expert only, 8 flow samples per observation, against one",
        Side("training:flow_samples_ours", 10),
        _IN_TREE_EXPERT_ONLY,
        (_goal(10),),
        figure="samples_per_second",
        unit="flow samples/s",
        inverse=True,
    ),
    Row(
        "checkpointed_step",
        "forward and backward of everything, gradient checkpointing, Gemma 300M, float32",
        Side("training:checkpointed_ours", 13, _SMALL),
        Side("training:checkpointed_in_tree", 13, _SMALL),
        (_goal(1.2),),
    ),
    Row(
        "operations",
        "kernel-like operations of a chunk, bf16, 2 cameras; ours compiled",
        Side("operations:in_chunks", changes={"size": "narrow"}, once=True),
        Side("operations:in_tree_chunks", changes={"size": "narrow"}, once=True),
        (_goal(2500, "ours_operations", at_least=False), _goal(200, "ours_per_step", at_least=False)),
        figure="operations",
        unit="operations",
        fresh=True,
    ),
    Row(
        "static_sample",
        "graph breaks + recompilations + host synchronisations of `sample`, compiled",
        Side("operations:static_sample", changes={"size": "tiny"}, once=True),
        None,
        tuple(
            _goal(0, f"ours_{figure}", at_least=False)
            for figure in ("graph_breaks", "recompilations", "host_synchronisations")
        ),
        figure="total",
        unit="events",
        fresh=True,
    ),
)


# In-tree pads every prompt of π0.5 to 200 tokens.
_GOALS_OF_PI05 = {"chunk_bf16": (_goal(2),), "chunk_bf16_absent_camera": (_goal(2.4),)}


def main(config: BenchConfig) -> str:
    """Measure, and give back the table; figures and picture go where the config says.

    Raises ValueError for a row that does not exist, RuntimeError when the two sides do not agree.
    """
    if config.device is not None or config.sections:
        from . import gpu  # which runs both sides in this process, and imports LeRobot's policies

        return gpu.main(config)
    if config.budget is not None or config.size == "small":
        raise UserError("--budget and --size=small are for sections: give --device or --sections too")
    rows = select(config.rows, config.model)
    bench = Bench(config)
    report = {
        "machine": machine(),
        "versions": {name: version(name) for name in ("lerobot", "torch", "transformers")},
        "model": config.model,
        "size": config.size,
        "threads": bench.threads,
        "repetitions": config.repetitions,
        "checks": bench.checks(),
        "rows": [],
    }
    for row in rows:
        logger.info("%s: %s", row.id, row.what)
        report["rows"].append(bench.row(row))
        logger.info("    %s", summary(report["rows"][-1]))
        # After every row: a run that is interrupted has lost nothing.
        if config.json is not None:
            config.json.parent.mkdir(parents=True, exist_ok=True)
            config.json.write_text(json.dumps(report, indent=1) + "\n")
    if config.plot is not None:
        plot(report, config.plot)
    return table(report)


def select(names: str, model: Model = "pi0") -> list[Row]:
    """Rows of a model by their ids, separated by commas; all for an empty string."""
    goals = _GOALS_OF_PI05 if model == "pi05" else {}
    known = {row.id: replace(row, goals=goals.get(row.id, row.goals)) for row in ROWS}
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(f"--rows names {unknown}; there are {', '.join(known)}")
    return [known[name] for name in wanted]


class Bench:
    """Runs the workers that rows ask for."""

    def __init__(self, config: BenchConfig) -> None:
        self.config = config
        self.threads = config.threads or torch.get_num_threads()
        self.reference: torch.Tensor | None = None
        self._fresh: dict[tuple[str, Setup], list[Measurement]] = {}

    def checks(self) -> dict[str, Any]:
        """What has to hold before any timing, and what the figures are read against.

        Both sides give the same actions in float32 at a tiny size. Then our float32 actions at the size of
        the run, the reference of all cosines; and how many operations each side's chunk takes.
        """
        tiny = {"size": "tiny", "dtype": "float32"}
        ours, theirs = (
            self._alone(Side(task, changes=tiny, once=True))[0].actions
            for task in ("ours:chunk", "intree:chunk")
        )
        assert ours is not None
        assert theirs is not None
        apart = (ours - theirs).abs().max().item()
        if not apart <= SAME_ACTIONS[self.config.model]:
            raise CommandError(
                f"the two sides differ by {apart:.1e} in the same actions (float32, tiny size; "
                f"{SAME_ACTIONS[self.config.model]:.0e} is rounding): nothing was timed"
            )
        checks: dict[str, Any] = {"same_actions_float32": apart}
        try:
            (reference,) = self._alone(Side("ours:chunk", 15, {"dtype": "float32"}, once=True))
            self.reference = reference.actions
            checks |= self._alone(Side("operations:flops", once=True))[0].figures
            del checks["peak_bytes"]
        except WorkerError as error:
            checks["skipped"] = str(error)
        logger.info("%s", checks)
        return checks

    def row(self, row: Row) -> dict[str, Any]:
        """A row of the report: figures, or why there are none."""
        said = {"id": row.id, "what": row.what, "unit": row.unit}
        try:
            if row.fresh:
                order = "one after the other"
                ours = self._alone(row.ours)
                theirs = self._alone(row.theirs) if row.theirs else []
            else:
                assert row.theirs is not None
                order, ours, theirs = self._compare(row.ours, row.theirs)
        except WorkerError as error:
            return said | {"skipped": str(error)}
        if row.figure == "samples_per_second":
            ours, theirs = ([_with_rate(m) for m in side] for side in (ours, theirs))
        figures = self._figures("ours", ours) | self._figures("theirs", theirs)
        result: dict[str, Any] = {
            **said,
            "ours": figures[f"ours_{row.figure}"],
            "theirs": None,
            "ratio": None,
        }
        if theirs:
            own, other = ([m.figures[row.figure] for m in side] for side in (ours, theirs))
            if row.inverse:
                own, other = other, own
            # Neighbours in time: a machine that slows down for a while slows both.
            middle, spread = median_and_quartiles(
                [b / a for a, b in zip(own, itertools.cycle(other), strict=False)]
                if len(own) >= len(other)
                else [b / a for a, b in zip(itertools.cycle(own), other, strict=False)]
            )
            result |= {"theirs": figures[f"theirs_{row.figure}"], "ratio": middle, "spread": spread}
            figures["ratio"] = middle
        for name, (a, b) in row.quotients.items():
            if figures.get(a) is not None and figures.get(b):
                figures[name] = figures[a] / figures[b]
        if row.also is not None:
            try:
                figures |= self._figures("also", self._alone(row.also))
            except WorkerError as error:
                result["not_measured"] = str(error)
        judged = [goal.judge(figures) for goal in row.goals]
        verdicts = [goal["met"] for goal in judged]
        met = False if False in verdicts else None if None in verdicts else True
        return result | {
            "goal": row.goals[0].limit,
            "met": met if self.config.size == "full" else None,
            "goals": judged,
            "order": order,
            "repetitions": {"ours": len(ours), "theirs": len(theirs)},
            "figures": figures,
        }

    def _compare(self, ours: Side, theirs: Side) -> tuple[str, list[Measurement], list[Measurement]]:
        """Warm-up of both, then ours, theirs, ours, theirs, …; one after the other where memory is short."""
        if self._fits(ours.gigabytes + theirs.gigabytes):
            with ExitStack() as stack:
                workers = [stack.enter_context(self._worker(side)) for side in (ours, theirs)]
                for worker in workers:
                    worker.measure()
                pairs = [[worker.measure() for worker in workers] for _ in range(self.config.repetitions)]
            return "interleaved", [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        return "one after the other", self._in_a_row(ours), self._in_a_row(theirs)

    def _in_a_row(self, side: Side) -> list[Measurement]:
        """Warm-up, then measurements, while the other side is not there."""
        self._require(side)
        with self._worker(side) as worker:
            worker.measure()
            return [worker.measure() for _ in range(self.config.repetitions)]

    def _alone(self, side: Side) -> list[Measurement]:
        """First measurements of new processes. Rows that read different figures of a side share them."""
        key = side.task, self._setup(side)
        if key not in self._fresh:
            self._require(side)
            measured = []
            for _ in range(1 if side.once else self.config.repetitions):
                with self._worker(side) as worker:
                    measured.append(worker.measure())
            self._fresh[key] = measured
        return self._fresh[key]

    def _worker(self, side: Side) -> Worker:
        setup = self._setup(side)
        write_checkpoint(setup)
        log = self.config.workdir / f"{side.task.replace(':', '_')}.log"
        return Worker(side.task, setup, log, timeout=1800)

    def _setup(self, side: Side) -> Setup:
        setup = Setup(self.config.size, Path(), self.config.demo, self.threads, self.config.model)
        setup = replace(setup, **side.changes)
        name = f"{setup.model}_{setup.size}_{setup.language_model}"
        return replace(setup, checkpoint=self.config.workdir / name)

    def _fits(self, gigabytes: float) -> bool:
        return self.config.size != "full" or gigabytes <= available_gigabytes()

    def _require(self, side: Side) -> None:
        if not self._fits(side.gigabytes):
            raise WorkerError(
                f"{side.task} needs {side.gigabytes:g} GB of memory, {available_gigabytes():.1f} GB are free"
            )

    def _figures(self, side: str, measurements: list[Measurement]) -> dict[str, float]:
        """Medians of a side's figures, by "side_name"; and how its actions compare with the reference."""
        figures = {
            f"{side}_{name}": statistics.median(m.figures[name] for m in measurements)
            for name in (measurements[0].figures if measurements else ())
        }
        actions = measurements[0].actions if measurements else None
        if actions is not None and self.reference is not None:
            cosine = F.cosine_similarity(actions.flatten().double(), self.reference.flatten().double(), dim=0)
            figures[f"{side}_cosine"] = cosine.item()
        return figures


def median_and_quartiles(values: list[float]) -> tuple[float, list[float]]:
    """The median, and the first and third quartile."""
    if len(values) == 1:
        return values[0], values * 2
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return middle, [first, third]


def available_gigabytes() -> float:
    """Memory that a new process can have without swapping; infinite where the system does not say."""
    file = Path("/proc/meminfo")
    if not file.exists():
        return float("inf")
    return next(
        int(line.split()[1]) / 2**20
        for line in file.read_text().splitlines()
        if line.startswith("MemAvailable")
    )


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo")
    models = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return {
        "processor": models[0].partition(":")[2].strip() if models else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "free_memory_gigabytes": round(available_gigabytes(), 1),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def summary(row: dict[str, Any]) -> str:
    """A row in a line."""
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    cells = [f"ours {number(row['ours'])}"]
    if row["ratio"] is not None:
        first, third = row["spread"]
        cells += [f"theirs {number(row['theirs'])} {row['unit']}"]
        cells += [f"ratio {row['ratio']:.2f} ({first:.2f} to {third:.2f})"]
    return ", ".join(cells)


def number(value: float | None) -> str:
    """Three digits, with a suffix for millions and more."""
    if value is None:
        return "–"
    for size, suffix in ((1e9, " G"), (1e6, " M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    machine, versions = report["machine"], report["versions"]
    lines = [
        f"{machine['processor']}, {machine['instructions']}, {report['threads']} threads; "
        + ", ".join(f"{name} {number}" for name, number in versions.items()),
        f"checks: {', '.join(f'{name} {_short(value)}' for name, value in report['checks'].items())}",
        "",
    ]
    cells = [("row", "ours", "theirs", "unit", "ratio", "quartiles", "goals", "met")]
    notes = []
    for row in report["rows"]:
        if "skipped" in row:
            cells.append((row["id"], "skipped", "", "", "", "", "", ""))
            notes.append(f"{row['id']}: {row['skipped']}")
            continue
        has_ratio = row["ratio"] is not None
        cells.append(
            (
                row["id"],
                number(row["ours"]),
                number(row["theirs"]),
                row["unit"],
                f"{row['ratio']:.2f}" if has_ratio else "–",
                "{:.2f} to {:.2f}".format(*row["spread"]) if has_ratio else "",
                "; ".join(_goal_text(goal) for goal in row["goals"]),
                {True: "yes", False: "NO", None: "–"}[row["met"]],
            )
        )
        if "not_measured" in row:
            notes.append(f"{row['id']}: {row['not_measured']}")
        figures = {name: value for name, value in row["figures"].items() if name != "ratio"}
        notes.append(
            f"{row['id']}: {', '.join(f'{name} {_short(value)}' for name, value in figures.items())}"
        )
    return "\n".join([*lines, format_table(cells), "", *notes])


def plot(report: dict[str, Any], file: Path) -> None:
    """Ratios as bars, goals as marks, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if row.get("ratio") is not None]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.4 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        colour = {True: "tab:green", False: "tab:red", None: "tab:grey"}[row["met"]]
        axes.barh(place, row["ratio"], color=colour, height=0.6)
        axes.plot(row["spread"], [place, place], color="black", linewidth=1)
        for goal in row["goals"]:
            if goal["figure"] == "ratio":
                limit = goal.get("at_least", goal.get("at_most"))
                axes.plot([limit, limit], [place - 0.4, place + 0.4], color="black", linewidth=2)
    axes.set_yticks(range(len(rows)), [row["id"] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.5)
    axes.set_xlabel(f"ratio to LeRobot's in-tree {report['model']} (thick mark: goal; thin line: quartiles)")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _with_rate(measurement: Measurement) -> Measurement:
    rate = measurement.figures["samples"] / measurement.figures["seconds"]
    return replace(measurement, figures=measurement.figures | {"samples_per_second": rate})


def _goal_text(goal: dict[str, Any]) -> str:
    sign, limit = ("≥", goal["at_least"]) if "at_least" in goal else ("≤", goal["at_most"])
    value = "not measured" if goal["value"] is None else number(goal["value"])
    return f"{goal['figure']} {value} {sign} {limit:,g}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
