"""What the demo shows, from made-up results."""

import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from lerobot_pi0.demo.page import write_page
from lerobot_pi0.demo.report import (
    Table,
    TaskResult,
    Tile,
    contact_sheet,
    failure_tiles,
    plot_losses,
    read_evaluation,
    success_table,
    success_tiles,
    training_losses,
)
from lerobot_pi0.demo.suites import Evaluation


def film(path: Path, frames: list[np.ndarray]) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=80)
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {
        shade: film(folder / f"{shade}.mp4", [np.full((128, 128, 3), shade, np.uint8)] * 60)
        for shade in (30, 120, 220)
    }


def test_the_evaluation_is_read_by_task(tmp_path):
    metrics = {"successes": [True, False], "video_paths": ["a/0.mp4"]}
    info = {"per_task": [{"task_group": "reach-v3", "task_id": 0, "metrics": metrics}]}
    (tmp_path / "eval_info.json").write_text(json.dumps(info))
    evaluation = read_evaluation(tmp_path)
    assert evaluation["reach-v3"].rate == 0.5
    assert [str(path) for path in evaluation["reach-v3"].videos] == ["a/0.mp4"]


def evaluation(name: str, column: str) -> Evaluation:
    return Evaluation(name, column, "what it means", (), ())


def test_the_table_shows_each_task_beside_its_baselines_and_marks_what_is_not_above():
    evaluations = [evaluation("evaluate", "success"), evaluation("evaluate_swapped", "opposite instruction")]
    plain = {
        "faucet-open-v3": TaskResult([True] * 9 + [False], []),
        "plate-slide-v3": TaskResult([True] * 5 + [False] * 5, []),
    }
    swapped = {"faucet-open-v3": TaskResult([False] * 10, [])}
    table = success_table(evaluations, [plain, swapped], [{"faucet-open-v3": 0.8, "plate-slide-v3": 0.5}, {}])
    assert table.header == ("task", "success", "open-loop", "opposite instruction")
    # Wilson's intervals as R's prop.test(correct = FALSE) gives them.
    assert table.rows == [
        ("faucet-open-v3", "90% (60%–98%)", "80%", "0% (0%–28%)"),
        ("plate-slide-v3", "50% (24%–76%) *", "50%", ""),
        ("mean", "70%", "65%", "0%"),
    ]
    assert "opposite instruction: what it means" in str(table)
    assert "*: not above the open-loop baseline" in str(table)


def test_a_table_without_marks_does_not_explain_them():
    table = str(reach_table())
    assert "*" not in table
    assert "opposite instruction:" not in table


def reach_table() -> Table:
    return success_table(
        [evaluation("evaluate", "success")], [{"reach-v3": TaskResult([True], [])}], [{"reach-v3": 0.1}]
    )


def test_the_page_shows_the_table_the_pictures_and_the_commands(tmp_path):
    commands = ["lerobot-pi0 report --a='<b>'"]
    path, title = tmp_path / "index.html", "π0.5 in Meta-World"
    pictures = ("failures.gif", "loss.png")
    page = write_page(path, title, reach_table(), "Read me so.", *pictures, commands, quick=False)
    text = page.read_text(encoding="utf-8")
    assert "<td>reach-v3</td><td>100% (21%–100%)</td><td>10%</td>" in text
    assert re.findall(r'src="(.*?)"', text) == ["failures.gif", "policy.gif", "loss.png"]
    assert "lerobot-pi0 report --a=&#39;&lt;b&gt;&#39;" in text
    assert "<h1>A small π0.5 in Meta-World</h1>" in text
    assert "Read me so." in text
    assert "quick run" not in text


def test_losses_of_a_resumed_training_continue_at_its_checkpoint(tmp_path):
    log = tmp_path / "train.log"
    lines = [
        "# from step 0: lerobot-train",
        *(f"INFO step:1K smpl:2K loss:{loss} grdn:1.0" for loss in (0.9, 0.8, 0.7, 0.6, 0.5)),
        "# from step 20: lerobot-train --resume=true",
        *(f"INFO step:1K smpl:2K loss:{loss} grdn:1.0" for loss in (0.65, 0.55)),
    ]
    log.write_text("\n".join(lines))
    assert training_losses(log, log_freq=10) == [(10, 0.9), (20, 0.8), (30, 0.65), (40, 0.55)]


def test_the_loss_plot_is_an_image(tmp_path):
    plot_losses([(10, 0.9), (20, 0.5)], tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size[0] > 300


def test_the_contact_sheet_has_a_tile_per_task_and_prefers_a_success(tmp_path, videos):
    evaluation = {
        "faucet-open-v3": TaskResult([False, True, True], [videos[30], videos[220]]),
        "reach-v3": TaskResult([False, False], [videos[120], videos[30]]),
    }
    instructions = {"faucet-open-v3": "Rotate the faucet counter-clockwise", "reach-v3": "Reach a goal"}
    contact_sheet(success_tiles(evaluation, instructions), tmp_path / "sheet.gif")
    sheet = Image.open(tmp_path / "sheet.gif")
    assert sheet.size[0] == 2 * 128
    left, right = (np.asarray(sheet.convert("L"))[-64:, column : column + 64] for column in (32, 160))
    assert abs(left.mean() - 220) < 15
    assert abs(right.mean() - 120) < 15


def test_a_contact_sheet_of_four_moving_tiles_stays_small(tmp_path):
    generator = np.random.default_rng(0)
    scene = np.kron(generator.integers(0, 256, (16, 16, 3), np.uint8), np.ones((8, 8, 1), np.uint8))

    def moved(step: int) -> np.ndarray:
        """A third of the picture moves."""
        return np.concatenate([scene[:40], np.roll(scene[40:80], step, axis=1), scene[80:]])

    video = film(tmp_path / "episode.mp4", [moved(step) for step in range(120)])
    contact_sheet([Tile("Do it", True, video)] * 4, tmp_path / "sheet.gif")
    assert (tmp_path / "sheet.gif").stat().st_size < 1.5e6


def test_failures_are_those_that_were_filmed_with_the_number_of_the_episode():
    videos = [Path(f"{number}.mp4") for number in range(5)]
    results = {
        "reach-v3": TaskResult([True, False, True, False, False, False], videos),
        "push-v3": TaskResult([True] * 6, videos),
    }
    tiles = failure_tiles(results, {"reach-v3": "Reach a goal", "push-v3": "Push"})
    assert [(tile.caption, tile.success, tile.video) for tile in tiles] == [
        ("episode 1: Reach a goal", False, videos[1]),
        ("episode 3: Reach a goal", False, videos[3]),
    ]
    moved = failure_tiles(results, {"reach-v3": "Reach a goal", "push-v3": "Push"}, "moved")
    assert moved[0].caption == "moved, episode 1: Reach a goal"


def test_many_tiles_and_large_pictures_stay_a_sheet_for_a_screen(tmp_path):
    video = film(tmp_path / "episode.mp4", [np.zeros((480, 640, 3), np.uint8)] * 300)
    contact_sheet([Tile("Do it", False, video)] * 7, tmp_path / "sheet.gif")
    sheet = Image.open(tmp_path / "sheet.gif")
    assert sheet.size[0] == 5 * 160
    assert sheet.size[1] > 2 * 120
    assert getattr(sheet, "n_frames", 1) <= 70
