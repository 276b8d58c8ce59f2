"""`lerobot-pi0 rollout` on a robot without hardware: what it refuses, what it counts, what it leaves."""

import itertools
import logging
import re
import sys
import time
from pathlib import Path

import lerobot.rollout.inference.rtc as engine
import pytest
from arm import ACTIONS, Arm, save_checkpoint
from lerobot.robots import Robot

from lerobot_pi0 import cli
from lerobot_pi0.control import rollout
from lerobot_pi0.control.trace import read_trace
from lerobot_pi0.control.trace_report import make_report, read_run
from lerobot_pi0.modeling_pi0 import Pi0Policy

RTC = ["--inference.type=rtc", "--inference.queue_threshold=10", "--inference.rtc.execution_horizon=8"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("policy"), chunk_size=20, n_action_steps=8)


@pytest.fixture(autouse=True)
def arms(monkeypatch, tmp_path) -> list[Robot]:
    """Those that were connected, in the order in which they were."""
    Arm.connected.clear()
    monkeypatch.setattr(rollout, "init_logging", lambda: None)  # it would take pytest's handlers away
    return Arm.connected


@pytest.fixture
def delayed(monkeypatch):
    """Let each chunk take so many seconds longer."""
    predict = Pi0Policy.predict_action_chunk

    def delay(seconds: float) -> None:
        def slow(self, *args, **kwargs):
            time.sleep(seconds)
            return predict(self, *args, **kwargs)

        monkeypatch.setattr(Pi0Policy, "predict_action_chunk", slow)

    return delay


def run(checkpoint: Path, tmp_path: Path, *flags: str, fps: int = 50, duration: float = 1.0) -> str:
    return rollout.main(
        [
            f"--policy.path={checkpoint}",
            "--robot.type=test_arm",
            f"--robot.calibration_dir={tmp_path / 'calibration'}",
            "--task=wave",
            f"--fps={fps}",
            f"--duration={duration}",
            "--return_to_initial_position=false",
            "--play_sounds=false",
            *flags,
        ]
    )


def test_a_run_leaves_each_action_with_its_chunk_and_step(checkpoint, tmp_path, arms):
    said = run(checkpoint, tmp_path, f"--trace={tmp_path / 'run'}")
    actions = read_run(tmp_path / "run").actions
    assert [action["values"] for action in actions] == [
        pytest.approx(values, abs=1e-4) for values in arms[0].sent
    ]
    assert [action["step"] for action in actions[:9]] == [*range(8), 0]
    assert [action["chunk"] for action in actions[:9]] == [1] * 8 + [2]
    assert f"{len(actions)} actions in " in said
    report = make_report(read_run(tmp_path / "run"))
    assert report.start["kind"] == "sync"
    assert report.start["joints"] == ACTIONS
    assert 0 < report.age["p50"] < 1
    assert report.used == pytest.approx(8 / 20, abs=0.1)
    # In robot units: the chunk's first action is the one that was sent.
    first = next(event for event in read_trace(tmp_path / "run") if event["event"] == "inference")
    assert first["actions"][0] == pytest.approx([*actions[0]["values"].values()], abs=1e-4)


def test_the_way_back_to_where_the_robot_was_is_not_the_policys(checkpoint, tmp_path, arms):
    run(
        checkpoint, tmp_path, "--return_to_initial_position=true", f"--trace={tmp_path / 'run'}", duration=0.5
    )
    assert len(arms[0].sent) == len(read_run(tmp_path / "run").actions) + 150


def test_real_time_chunking_leaves_its_three_delays(checkpoint, tmp_path, delayed, monkeypatch):
    monkeypatch.setattr(Pi0Policy, "supports_rtc", lambda self: True)
    monkeypatch.setattr(Pi0Policy, "init_rtc_processor", lambda self: None, raising=False)
    delayed(0.1)
    run(checkpoint, tmp_path, *RTC, f"--trace={tmp_path / 'run'}", fps=40, duration=2)
    events = [*read_trace(tmp_path / "run")]
    chunks = [event for event in events if event["event"] == "inference"]
    assert len(chunks) > 4
    for before, chunk in itertools.pairwise(chunks):
        sent = [event for event in events if event["event"] == "action" and event["chunk"] == chunk["chunk"]]
        # The first that is sent of a chunk is the first that was not dropped.
        assert not sent or sent[0]["step"] == chunk["dropped"]
        assert 0 <= chunk["consumed"] <= 10
        assert chunk["dropped"] >= 4  # 0.1 s at 40 fps
        assert chunk["given"] >= before["dropped"] - 1
        assert chunk["observed"] <= chunk["began"] < chunk["ended"]
    meanwhile = [
        sum(event["event"] == "action" and chunk["began"] < event["t"] < chunk["ended"] for event in events)
        for chunk in chunks
    ]
    assert [chunk["consumed"] for chunk in chunks] == pytest.approx(meanwhile, abs=1)


def test_a_robot_with_other_joints_is_refused_before_it_is_connected(checkpoint, tmp_path, arms):
    with pytest.raises(ValueError, match="action, permuted"):
        run(checkpoint, tmp_path, "--robot.actions=[lift.pos,pan.pos,elbow.pos,wrist.pos]")
    assert not arms


def test_renamed_joints_run_with_the_flag_that_the_error_gives(checkpoint, tmp_path, arms):
    renamed = "--robot.actions=[base.pos,lift.pos,elbow.pos,wrist.pos]"
    with pytest.raises(ValueError, match="action, renamed") as caught:
        run(checkpoint, tmp_path, renamed)
    flag = re.sub("'", "", re.search(r"--policy\.action_feature_names='.*?'", str(caught.value))[0])
    run(checkpoint, tmp_path, renamed, flag, duration=0.3)
    assert set(arms[0].sent[0]) == {"base.pos", *ACTIONS[1:]}


def test_a_camera_that_is_not_there_is_refused_with_the_map_that_renames_one(checkpoint, tmp_path, arms):
    with pytest.raises(ValueError, match="does not give") as caught:
        run(checkpoint, tmp_path, "--robot.camera=top")
    assert not arms
    flag = re.sub("'", "", re.search("--rename_map='.*?'", str(caught.value))[0])
    with pytest.raises(ValueError, match="renamed by"):
        run(checkpoint, tmp_path, "--robot.camera=side", flag)
    run(checkpoint, tmp_path, "--robot.camera=top", flag, duration=0.3)
    assert arms[0].sent


def test_a_policy_that_is_too_slow_is_told_with_what_would_do(checkpoint, tmp_path, delayed, caplog):
    delayed(0.2)
    with caplog.at_level(logging.WARNING):
        said = run(checkpoint, tmp_path, fps=20, duration=1.5)
    assert "the robot stands still for" in caplog.text
    assert "every 8 actions" in caplog.text
    assert "--policy.n_action_steps=20" in caplog.text  # without real-time chunking, all of a chunk
    assert "stall" in said


def test_a_policy_that_can_never_keep_up_does_not_start(checkpoint, tmp_path, delayed, arms, monkeypatch):
    monkeypatch.setattr(Pi0Policy, "supports_rtc", lambda self: True)
    monkeypatch.setattr(Pi0Policy, "init_rtc_processor", lambda self: None, raising=False)
    delayed(0.25)
    with pytest.raises(RuntimeError, match="never move"):
        run(checkpoint, tmp_path, *RTC, "--return_to_initial_position=true", fps=100)
    assert not arms[0].sent
    assert not arms[0].is_connected


def test_a_policy_that_gives_up_is_an_error_with_its_reason(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(Pi0Policy, "supports_rtc", lambda self: True)
    monkeypatch.setattr(Pi0Policy, "init_rtc_processor", lambda self: None, raising=False)
    monkeypatch.setattr(engine, "_RTC_ERROR_RETRY_DELAY_S", 0.0)
    predict, asked = Pi0Policy.predict_action_chunk, []

    def failing(self, *args, **kwargs):
        asked.append(None)
        if len(asked) > 12:
            raise ValueError("the camera melted")
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(Pi0Policy, "predict_action_chunk", failing)
    with pytest.raises(RuntimeError, match=r"actions were sent: the policy gave up \(.*the camera melted"):
        run(checkpoint, tmp_path, *RTC, f"--trace={tmp_path / 'run'}", duration=5)
    assert [event["why"] for event in read_trace(tmp_path / "run") if event["event"] == "stop"] == [
        "the policy gave up"
    ]


def test_no_action_is_an_error_of_one_line(checkpoint, tmp_path, monkeypatch, capsys):
    flags = [f"--policy.path={checkpoint}", "--robot.type=test_arm", "--task=wave", "--duration=0.000001"]
    flags += [f"--robot.calibration_dir={tmp_path}", "--return_to_initial_position=false"]
    monkeypatch.setattr(sys, "argv", ["lerobot-pi0", "rollout", *flags])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "no action was sent to the robot" in line


def test_a_trace_is_not_written_over_another(checkpoint, tmp_path, arms):
    (tmp_path / "policy.jsonl").touch()
    with pytest.raises(FileExistsError, match="another run"):
        run(checkpoint, tmp_path, f"--trace={tmp_path}")
    assert not arms


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trace"], "--trace needs a folder"),
        (["--trace", "--fps=3"], "--trace needs a folder"),
        (["--task=wave"], "--robot.type is required"),
        (["--robot.type=test_arm"], "--policy.path is required"),
    ],
)
def test_flags_that_cannot_be_are_told(flags, said):
    with pytest.raises(ValueError, match=said):
        rollout.main(flags)
