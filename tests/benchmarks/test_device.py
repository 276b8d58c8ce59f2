"""The benchmark on a device, on the CPU at a tiny size: the same sections, and what becomes of failures."""

import json
import math
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import bench, gpu, inputs, roofline, scaling, training_steps
from benchmarks.context import Context, OutOfTimeError, time_limit
from benchmarks.flags import BenchConfig
from benchmarks.gpu import GOALS, SECTIONS, Section
from benchmarks.operations import CostCounter
from benchmarks.worker import Setup
from lerobot_pi0.errors import UserError


def context(**changes: Any) -> Context:
    return Context(Setup("tiny", Path(), Path(), threads=1, **changes))


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def report(request, tmp_path_factory) -> dict[str, Any]:
    """Of all sections but the slow one, as the command writes it; the text is in "text"."""
    file = tmp_path_factory.mktemp("bench") / "gpu.json"
    with pytest.MonkeyPatch.context() as patch:
        few = ("full, 2 cameras, batch 8", "LoRA, 2 cameras, batch 8")
        patch.setattr(training_steps, "CASES", {name: training_steps.CASES[name] for name in few})
        text = bench.main(BenchConfig(device="cpu", size="tiny", model=request.param, json=file, threads=1))
    return json.loads(file.read_text()) | {"text": text}


@pytest.mark.slow
def test_every_section_has_rows_and_none_fails(report):
    assert list(report["sections"]) == list(SECTIONS)
    for name, section in report["sections"].items():
        assert section["rows"], name
        assert "error" not in section, section
        for row, figures in section["rows"].items():
            assert figures, (name, row)
            assert "error" not in figures, (name, row, figures)
            assert f"| {name} | {row} | " in report["text"]


@pytest.mark.slow
def test_actions_and_gradients_are_right_and_finite(report):
    rows = {name: section["rows"] for name, section in report["sections"].items()}
    correct = rows["correctness"]
    assert correct["float32 vs CPU"]["actions"] > 1 - 1e-6
    assert correct["float32 vs CPU"]["worst_gradient"] > 1 - 1e-6
    assert correct["bf16 vs CPU"]["worst_gradient"] > 0.9
    assert correct["vs in-tree, tiny"]["largest_difference"] < 1e-3
    assert rows["in-tree"]["bf16, eager"]["cosine"] > 0.999
    trained = [row for name, row in rows["training"].items() if not name.startswith("in-tree")]
    assert trained
    assert all(row["gradients_finite"] for row in trained)
    assert all(row["finite"] for name, row in rows["rtc"].items() if name.startswith("guided"))
    probes = [row for name, row in rows["attention"].items() if name.startswith("finite gradients")]
    assert probes
    assert all(value in (True, "none") for row in probes for value in row.values())


@pytest.mark.slow
def test_goals_are_of_rows_that_there_are_and_not_judged_here(report):
    rows = {name: section["rows"] for name, section in report["sections"].items()}
    for goal in GOALS:
        # On a GPU, at the full size, and of recipes that the fixture leaves out.
        if "compile" in goal.row or goal.section == "batch" or goal.row in training_steps.CASES:
            continue
        figures = rows[goal.section][goal.row]
        on_gpu = {"failed", "peak_over_plan"}
        assert goal.figure in figures or goal.figure in on_gpu or "skipped" in figures, goal
    assert report["goals"] == []


def fails(_: Context) -> Any:
    raise RuntimeError("no such kernel\nand much more")


def one_fails(of: Context) -> None:
    of.row("bad", partial(fails, of))
    of.row("good", lambda: {"ms": 1.0})


def sleeps(of: Context) -> None:
    of.row("first", lambda: {"ms": 1.0})
    of.row("long", lambda: {"ms": time.sleep(60)})
    of.row("later", lambda: {"ms": 1.0})


def test_what_fails_is_a_row_and_not_the_end(tmp_path):
    file = tmp_path / "new" / "out.json"
    chosen = {"fails": Section(fails, 1), "one_fails": Section(one_fails, 1)}
    report = gpu.run(context(), chosen, budget=60, file=file)
    assert json.loads(file.read_text()) == report
    assert report["sections"]["fails"]["error"] == "RuntimeError: no such kernel"
    rows = report["sections"]["one_fails"]["rows"]
    assert rows == {"bad": {"error": "RuntimeError: no such kernel"}, "good": {"ms": 1.0}}
    text = gpu.table(report)
    assert "| one_fails | bad | error: RuntimeError: no such kernel |" in text
    assert "| fails | | **RuntimeError: no such kernel** |" in text


def test_a_section_that_takes_too_long_is_cut_and_the_next_one_runs():
    chosen = {"sleeps": Section(sleeps, 3), "one_fails": Section(one_fails, 10_000)}
    report = gpu.run(context(), chosen, budget=10_000, file=None)
    rows = report["sections"]["sleeps"]["rows"]
    assert rows["first"] == {"ms": 1.0}
    assert rows["long"]["error"].startswith("OutOfTimeError: took longer than the 3 s")
    assert "--budget" in rows["later"]["skipped"]
    assert report["sections"]["one_fails"]["rows"]["good"] == {"ms": 1.0}


def test_time_that_is_left_over_is_the_next_sections():
    seen: list[float] = []
    chosen = {name: Section(lambda of: seen.append(of.left()), 1000) for name in "abc"}
    gpu.run(context(), chosen, budget=3000, file=None)
    assert seen == pytest.approx([1000, 2000, 3000], abs=100)


def test_the_limit_is_off_when_the_time_was_enough():
    handler = signal.getsignal(signal.SIGALRM)
    with time_limit(600):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGALRM) is handler
    with pytest.raises(OutOfTimeError), time_limit(0.01):
        time.sleep(60)


def test_limits_in_milliseconds_are_judged_on_the_card_that_they_are_of():
    rows = {"chunk": {"auto": {"p50_ms": 25.0}}, "in-tree": {"bf16, eager": {"ratio": 5.0}}}

    def met(device: str) -> dict[str, Any]:
        return {goal.what: goal.judge(rows, device)["met"] for goal in GOALS}

    here, there = met("NVIDIA H200"), met("NVIDIA GeForce RTX 4090")
    assert (here["chunk, ms"], there["chunk, ms"]) == (False, None)
    assert here["in-tree eager / ours"] is there["in-tree eager / ours"] is True
    assert here["gradients finite"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sections": "chunk,speed"}, r"--sections names \['speed'\]; there are start, .*scaling"),
        ({"device": "cpu", "rows": "load"}, "--rows is for the comparison on a CPU"),
        ({"device": "tpu"}, "--device is cuda"),
        ({"device": "cuda"}, "finds no CUDA device"),
        ({"device": "cpu", "budget": 0}, "--budget is in seconds and above 0"),
        ({"budget": 60}, "--budget and --size=small are for sections"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, message):
    if flags.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=message):
        bench.main(BenchConfig(**flags))


def test_the_least_time_is_that_of_operations_or_of_bytes():
    """An H200 by its data sheet: prefill is bound by operations, denoising by reading the weights."""
    stages = roofline.stages(Setup("full", Path(), Path(), threads=1))
    least = {name: 1e3 * stage.seconds(989e12, 4.8e12, 2) for name, stage in stages.items()}
    assert least == pytest.approx({"vision": 0.45, "prefill": 2.02, "denoising": 1.32}, rel=0.02)


def test_cost_of_an_operation_is_of_its_operations_or_its_bytes():
    x, y = torch.ones(8, 8, device="meta"), torch.ones(8, 8, device="meta")

    def cost(flops: float, num_bytes: float, *calls: Any) -> float:
        with CostCounter(flops, num_bytes) as counter:
            for call in calls:
                call()
        return counter.seconds

    assert cost(1, math.inf, lambda: x @ y) == 2 * 8**3
    assert cost(math.inf, 1, lambda: x @ y) == 3 * 8 * 8 * 4
    assert cost(math.inf, 1, lambda: x.T.view(8, 8).expand(4, 8, 8)) == 0
    assert cost(math.inf, 1, lambda: x + x[:1].expand(8, 8)) == (8 * 8 + 8 * 8 + 8 * 8) * 4
    assert cost(1, 1, lambda: x @ y, lambda: x + y) == 2 * 8**3 + 3 * 8 * 8 * 4


def test_cost_grows_with_each_axis_by_the_count(monkeypatch):
    monkeypatch.setattr(scaling, "chunk_ms", lambda _, point: 1.0 + point.setup.cameras)
    monkeypatch.setattr(scaling, "step_ms", lambda _, point: 2.0)
    of = context()
    rates = {"flop_per_s": 1e11, "bytes_per_s": 1e10}
    setup = of.setup
    for axis in scaling.axes(of):
        for kind in ("chunk", "training") if axis.trains else ("chunk",):
            row = scaling.along(of, setup, axis, rates, kind)
            assert row["values"] == list(axis.values)
            assert row["counted_ms"][1] > row["counted_ms"][0] > 0, axis
            assert row["ms_per_unit"] == pytest.approx(
                float(kind == "chunk" and axis.name == "cameras"), abs=1e-6
            )


@pytest.mark.slow
def test_scaling_ends_in_sentences_and_a_picture(monkeypatch, tmp_path):
    def axes(_: Context) -> list[scaling.Axis]:
        return [
            scaling.Axis("batch", "observation", (1, 2)),
            scaling.Axis("denoising steps", "step", (1, 2), False),
        ]

    monkeypatch.setattr(scaling, "axes", axes)
    picture = tmp_path / "scaling.png"
    text = bench.main(BenchConfig(sections="scaling", size="tiny", plot=picture, threads=1))
    assert picture.stat().st_size > 0
    assert "- batch: a chunk takes " in text
    assert "- batch: a training step takes " in text
    assert "- denoising steps: a chunk takes " in text
    assert "denoising steps: a training step" not in text


def test_weights_in_memory_are_those_of_the_file(tmp_path):
    setup = Setup("tiny", tmp_path, tmp_path, threads=1)
    inputs.write_checkpoint(setup)
    stored: dict[str, Tensor] = load_file(tmp_path / "model.safetensors")
    made = inputs.weights(setup)
    assert stored.keys() == made.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in made.items())
