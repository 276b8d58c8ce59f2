"""The benchmark at a tiny size: what it reports, how it forms ratios, and that it survives its workers."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import FORKS, Program, script

from benchmarks import bench, inputs, roofline, worker
from benchmarks.bench import Bench, BenchConfig, Goal, Row, Side, main, select
from benchmarks.operations import compiled_events, count, count_compiled
from benchmarks.worker import Measurement, Setup, Worker, WorkerError
from lerobot_pi0.checkpoints.files import Checkpoint


def setup(**changes) -> Setup:
    return replace(Setup("tiny", Path(), Path(), threads=1), **changes)


def fake(monkeypatch, config: BenchConfig, **figures: list[dict[str, float]]) -> Bench:
    """A bench whose workers give these figures, by the task's name, one after the other."""
    measured = {name: iter(values) for name, values in figures.items()}

    class FakeWorker:
        def __init__(self, task: str, *_: object, **__: object) -> None:
            self.task = task.partition(":")[2]

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def measure(self) -> Measurement:
            if self.task not in measured:
                raise WorkerError(f"{self.task} is dead")
            return Measurement(next(measured[self.task]))

    monkeypatch.setattr(bench, "Worker", FakeWorker)
    monkeypatch.setattr(bench, "write_checkpoint", lambda _: None)
    return Bench(config)


@pytest.fixture
def forked(monkeypatch) -> None:
    """Workers need not import LeRobot."""
    monkeypatch.setattr(worker, "CONTEXT", FORKS)


ROW = Row("a_row", "what", Side("x:mine"), Side("x:other"), (Goal("ratio", 2.0),))


def seconds(*values: float) -> list[dict[str, float]]:
    return [{"seconds": value} for value in values]


def test_ratio_is_the_median_of_ratios_of_neighbours_and_the_warm_up_is_left_out(monkeypatch):
    config = BenchConfig(repetitions=3)
    # Ratios of neighbours 4, 2.5, 3; the ratio of the medians is 2.5.
    measured = fake(monkeypatch, config, mine=seconds(99, 1, 2, 4), other=seconds(1, 4, 5, 12))
    row = measured.row(ROW)
    assert row["ratio"] == 3
    assert row["spread"] == [2.75, 3.5]
    assert (row["ours"], row["theirs"], row["order"]) == (2, 5, "interleaved")
    assert row["met"] is True


def test_rates_are_compared_the_other_way_round(monkeypatch):
    row = replace(ROW, figure="samples_per_second", inverse=True, fresh=True)
    mine, other = {"seconds": 2.0, "samples": 8.0}, {"seconds": 1.0, "samples": 1.0}
    result = fake(monkeypatch, BenchConfig(repetitions=1), mine=[mine], other=[other]).row(row)
    assert (result["ours"], result["theirs"], result["ratio"]) == (4, 1, 4)


def test_one_slow_measurement_of_theirs_stands_beside_each_of_ours(monkeypatch):
    row = replace(ROW, fresh=True, theirs=Side("x:other", once=True))
    config = BenchConfig(repetitions=3)
    result = fake(monkeypatch, config, mine=seconds(1, 2, 4), other=seconds(8)).row(row)
    assert result["ratio"] == 4
    assert result["repetitions"] == {"ours": 3, "theirs": 1}


def test_goal_that_was_not_measured_is_neither_met_nor_missed(monkeypatch):
    row = replace(ROW, goals=(Goal("ratio", 2.0), Goal("also_cosine_min", 0.999)), also=Side("x:demo"))
    figures = {"mine": seconds(1, 1), "other": seconds(3, 3)}
    result = fake(monkeypatch, BenchConfig(repetitions=1), **figures).row(row)
    assert [goal["met"] for goal in result["goals"]] == [True, None]
    assert result["met"] is None
    assert result["not_measured"] == "demo is dead"
    result = fake(monkeypatch, BenchConfig(repetitions=1), **figures, demo=[{"cosine_min": 0.9}]).row(row)
    assert result["met"] is False


def test_sides_run_apart_when_they_do_not_fit_together_and_not_at_all_when_one_does_not_fit(monkeypatch):
    figures = {"mine": seconds(9, 1), "other": seconds(9, 3)}
    row = replace(ROW, ours=Side("x:mine", 10), theirs=Side("x:other", 14))
    monkeypatch.setattr(bench, "available_gigabytes", lambda: 20.0)
    result = fake(monkeypatch, BenchConfig(repetitions=1), **figures).row(row)
    assert (result["order"], result["ratio"]) == ("one after the other", 3)
    monkeypatch.setattr(bench, "available_gigabytes", lambda: 12.0)
    result = fake(monkeypatch, BenchConfig(repetitions=1), **figures).row(row)
    assert result["skipped"] == "x:other needs 14 GB of memory, 12.0 GB are free"


def test_unknown_row_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"names \['chunk'\].*chunk_bf16"):
        select("chunk")


def test_every_row_of_the_table_has_a_goal_and_an_id_of_its_own():
    ids = [row.id for row in select("")]
    assert len(ids) == len(set(ids))
    assert all(row.goals for row in select(""))


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_worker_that_fails_makes_a_skipped_row_with_its_last_words(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "write_checkpoint", lambda _: None)
    config = BenchConfig(workdir=tmp_path, size="tiny", threads=1)
    row = Bench(config).row(replace(ROW, ours=Side("ours:chunk"), theirs=Side("intree:chunk")))
    assert row["id"] == "a_row"
    assert row["skipped"].startswith("ours:chunk died while it should prepare: ")
    assert f"MissingFileError: there is no folder {tmp_path}" in row["skipped"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_worker_that_is_killed_or_late_is_an_error_that_says_so(tmp_path):
    quick = Worker("ours:queue_pop", setup(), tmp_path / "log", timeout=300)
    with quick:
        assert quick.measure().figures["microseconds"] > 0
        (process,) = multiprocessing.active_children()
        process.kill()
        with pytest.raises(WorkerError, match=r"died .*SIGKILL, out of memory perhaps"):
            quick.measure()
    late = Worker("ours:queue_pop", setup(), tmp_path / "log", timeout=0.01)
    with pytest.raises(WorkerError, match="did not prepare within"), late:
        pass
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_tiny_run_end_to_end(model, tmp_path):
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    config = BenchConfig(
        model=model,
        json=file,
        plot=picture,
        rows="replan",
        repetitions=2,
        threads=1,
        workdir=tmp_path,
        demo=tmp_path / "none",
        size="tiny",
    )
    text = main(config)
    report = json.loads(file.read_text())
    assert {"machine", "versions", "threads", "repetitions", "checks", "rows"} <= report.keys()
    assert report["checks"]["same_actions_float32"] < bench.SAME_ACTIONS[model]
    assert [row["id"] for row in report["rows"]] == ["replan"]
    for row in report["rows"]:
        assert {"ours", "theirs", "unit", "ratio", "goal", "met", "spread"} <= row.keys()
        assert row["ours"] > 0
        assert row["met"] is None  # goals are of the full size
        assert row["figures"]["ours_cosine"] > 0.999
        assert row["figures"]["theirs_cosine"] > 0.999
        assert row["id"] in text
    assert report["rows"][0]["figures"]["ours_identical"] == 1
    assert picture.stat().st_size > 0


@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_checkpoint_is_the_same_each_time_and_whole(model, tmp_path):
    first, second = (setup(model=model, checkpoint=tmp_path / name) for name in ("a", "b"))
    inputs.write_checkpoint(first)
    inputs.write_checkpoint(second)
    (ours, again) = (Checkpoint(of.checkpoint) for of in (first, second))
    for name, tensor in ours.items():
        assert torch.equal(tensor, again[name])
        spread = (tensor.numel() / len(tensor)) ** -0.5 if tensor.ndim > 1 else 0.1
        assert 0.5 * spread < tensor.float().square().mean().sqrt() < 2 * spread
        assert tensor.ndim == 1 or len(tensor.unique(dim=0)) == len(tensor), "rows repeat"


@pytest.mark.parametrize(("cameras", "gflop"), [(1, 1570), (2, 2796), (3, 4041)])
def test_exact_minimum_of_operations_is_that_of_the_cost_model(cameras, gflop):
    stages = roofline.stages(setup(size="full", cameras=cameras)).values()
    assert sum(stage.flops * stage.repeats for stage in stages) / 1e9 == pytest.approx(gflop, abs=1)


def test_views_and_allocations_are_no_operations():
    x, y = torch.ones(4, 4), torch.ones(4, 4)
    assert count(lambda: x.view(16).unsqueeze(0)) == 0
    assert count(lambda: torch.empty_like(x)) == 0
    assert count(lambda: (x + y).T @ y) == 2
    assert count(lambda: x.mul_(2)) == 1


def test_compiled_operations_are_kernels_after_fusion():
    x = torch.ones(8, 8)
    assert count_compiled(lambda x: ((x + 1).sin() * 2) @ x, x) == 2


@pytest.mark.slow
def test_compiled_chunk_of_the_published_depths_has_at_most_2500_operations_and_200_per_step(
    tmp_path,
):
    # In a process of its own: in this one every function of the network is wrapped in a check of its shapes.
    count = (
        "from pathlib import Path; from benchmarks.operations import sampler_operations; "
        "from benchmarks.worker import Setup; "
        "print(*sampler_operations(Setup('narrow', Path(), Path(), threads=1)))"
    )
    done = Program(tmp_path / "log.txt", script, count).succeed()
    whole, step = map(int, done.output.splitlines()[-1].split())
    assert 100 < step <= 200
    assert 10 * step < whole <= 2500


def test_graph_breaks_recompilations_and_host_synchronisations_are_found():
    x = torch.ones(4)

    def static(x, _):
        return x.sin() + 1

    def breaks(x, _):
        torch._dynamo.graph_break()
        return x.sin()

    def recompiles(x, number):
        return x * number

    def synchronises(x, _):
        return x + torch.tensor([1.0, 2.0, 3.0, 4.0])

    calls = [(x, 1), (x + 1, 2)]
    found = {f.__name__: compiled_events(f, calls) for f in (static, breaks, recompiles, synchronises)}
    assert sum(found["static"].values()) == 0
    assert found["breaks"]["graph_breaks"] > 0
    assert found["recompiles"]["recompilations"] > 0
    assert found["synchronises"]["host_synchronisations"] > 0
