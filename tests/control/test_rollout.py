"""`lerobot-pi0 rollout` on a robot without hardware: what it refuses, what it counts, what it leaves."""

import copy
import logging
import os
import re
import shlex
import sys
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import lerobot.rollout.context as context
import lerobot.rollout.inference.rtc as engine
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.configs.dataset import DatasetRecordConfig
from lerobot.configs.default import PeftConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.rollout import RolloutConfig, create_strategy
from tiny_policy import statistics, tiny_config
from tiny_robot import ACTIONS, STATES, Arm, save_checkpoint

from lerobot_pi0 import cli, lerobot_compat
from lerobot_pi0.configuration_pi0 import TrainingData
from lerobot_pi0.control import instrumentation, rollout
from lerobot_pi0.control.latency import Latencies
from lerobot_pi0.control.trace import read_trace
from lerobot_pi0.control.trace_report import make_report, read_run
from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.policy import policy_class
from lerobot_pi0.modeling_pi0 import Pi0Policy

pytestmark = pytest.mark.slow

# Busy machines run these tests too: a chunk lasts for seconds, and the next one is asked for early.
RTC = [
    "--inference.type=rtc",
    "--inference.queue_threshold=45",
    "--inference.rtc.execution_horizon=45",
    "--duration=1",
]


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("policy")
    save_checkpoint(folder / "checkpoint", chunk_size=50, n_action_steps=8)
    return [
        f"--policy.path={folder / 'checkpoint'}",
        "--robot.type=test_arm",
        f"--robot.calibration_dir={folder / 'calibration'}",
        "--task=wave",
        "--fps=20",
        "--duration=0.5",
        "--return_to_initial_position=false",
    ]


@pytest.fixture(scope="module")
def parsed(flags) -> dict[str, RolloutConfig]:
    """Parsed once: LeRobot takes a second for it."""
    return {"sync": rollout.parse(flags), "rtc": rollout.parse([*flags, *RTC])}


@pytest.fixture
def sync(parsed) -> RolloutConfig:
    return copy.deepcopy(parsed["sync"])


@pytest.fixture
def rtc(parsed) -> RolloutConfig:
    return copy.deepcopy(parsed["rtc"])


@pytest.fixture(autouse=True)
def arms(monkeypatch) -> list[Arm]:
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


def flag_of(error: pytest.ExceptionInfo, name: str) -> str:
    """A flag that an error tells to paste, as the shell hands it over."""
    (flag,) = re.findall(rf"{re.escape(name)}='[^']*'", str(error.value))
    return shlex.split(flag)[0]


def test_a_run_leaves_each_action_with_its_chunk_and_step(sync, tmp_path, arms):
    sync.duration = 2
    said = rollout.rollout(sync, tmp_path / "run")
    actions = read_run(tmp_path / "run").actions
    sent = [pytest.approx(values, abs=1e-4) for values in arms[0].sent]
    assert [action["values"] for action in actions] == sent
    assert [action["step"] for action in actions[:9]] == [*range(8), 0]
    assert [action["chunk"] for action in actions[:9]] == [1] * 8 + [2]
    assert f"{len(actions)} actions in " in said
    report = make_report(read_run(tmp_path / "run"))
    assert report.start["kind"] == "sync"
    assert report.start["joints"] == ACTIONS
    assert report.start["std"] == pytest.approx(
        dict(zip(ACTIONS, [0.2, 0.4, 0.6, 0.8], strict=True)), abs=1e-4
    )
    assert 0 < report.age["p50"] < 1
    # In robot units: the chunk's first action is the one that was sent.
    first = next(event for event in read_trace(tmp_path / "run") if event["event"] == "inference")
    assert first["actions"][0] == pytest.approx([*actions[0]["values"].values()], abs=1e-4)


def test_a_robot_that_fails_on_the_way_is_told_and_traced_as_that(sync, tmp_path, arms, monkeypatch):
    observe, left = Arm.get_observation, iter(range(20))

    def fail_later(self):
        if next(left, None) is None:
            raise ConnectionError("no answer of motor 3")
        return observe(self)

    monkeypatch.setattr(Arm, "get_observation", fail_later)
    sync.duration = 60
    with pytest.raises(UserError, match=r"does not answer any more, after \d+ actions: no answer of motor 3"):
        rollout.rollout(sync, tmp_path / "run")
    (stop,) = [event for event in read_trace(tmp_path / "run") if event["event"] == "stop"]
    assert stop["why"] == "ConnectionError: no answer of motor 3"


@pytest.mark.parametrize(
    ("model", "engine"), [("pi0", []), ("pi0", RTC), ("pi05", RTC)], ids=["sync", "rtc", "pi05-rtc"]
)
def test_adapters_drive_a_robot_as_a_checkpoint_does(flags, tmp_path, arms, model, engine):
    base = save_checkpoint(tmp_path / "base", model, chunk_size=50, n_action_steps=8)
    policy: Any = policy_class(tiny_config(model)).from_pretrained(base)
    wrapped = policy.wrap_with_peft(peft_cli_overrides=asdict(PeftConfig()))
    adapters = tmp_path / "adapters"
    wrapped.save_pretrained(adapters)
    wrapped.config.save_pretrained(adapters)
    for pipeline in make_pre_post_processors(wrapped.config, dataset_stats=statistics()):
        pipeline.save_pretrained(adapters)
    rollout.main([f"--policy.path={adapters}", *flags[1:], *engine])
    assert arms[0].sent


def test_the_way_back_to_where_the_robot_was_is_not_the_policys(sync, tmp_path, arms):
    sync.return_to_initial_position = True
    rollout.rollout(sync, tmp_path)
    assert len(arms[0].sent) == len(read_run(tmp_path).actions) + 150


def test_interpolated_actions_belong_to_the_chunk_that_they_lead_to(sync, tmp_path, arms):
    sync.interpolation_multiplier = 2
    rollout.rollout(sync, tmp_path)
    run = read_run(tmp_path)
    assert len(run.actions) == len(arms[0].sent)
    assert run.fps == 40
    places = [(action["chunk"], action["step"]) for action in run.actions]
    assert places[:5] == [(1, 0), (1, 1), (1, 1), (1, 2), (1, 2)]


def test_real_time_chunking_leaves_its_three_delays(rtc, tmp_path, delayed):
    delayed(0.25)
    rtc.duration = 3
    rollout.rollout(rtc, tmp_path)
    events = [*read_trace(tmp_path)]
    chunks = [event for event in events if event["event"] == "inference"]
    assert len(chunks) > 2
    assert chunks[0]["dropped"] == 0, "nothing was sent before the first chunk: all of it is to come"
    for chunk in chunks[1:]:
        sent = [event for event in events if event["event"] == "action" and event["chunk"] == chunk["chunk"]]
        # The first that is sent of a chunk is the first that was not dropped.
        assert not sent or sent[0]["step"] == chunk["dropped"]
        assert chunk["given"] >= 5  # 0.25 s at 20 fps
        assert chunk["dropped"] == chunk["consumed"]
        assert chunk["observed"] <= chunk["began"] < chunk["ended"]
    meanwhile = [
        sum(event["event"] == "action" and chunk["began"] < event["t"] < chunk["ended"] for event in events)
        for chunk in chunks
    ]
    assert [chunk["consumed"] for chunk in chunks] == pytest.approx(meanwhile, abs=1)


@pytest.mark.parametrize("ours", [True, False])
def test_lerobots_flag_to_compile_compiles_and_the_robot_moves(flags, arms, monkeypatch, ours):
    """Its warm-up waits until a second chunk is asked for: after a fast first one, for ever."""
    calls = []

    def slow_at_first(function, **settings):
        if "fullgraph" not in settings:
            # LeRobot's own, around the policy, where it changes nothing. Not compiled: torch 2.11 crashes
            # in the next compilation of a process in which the thread that compiled first has ended.
            return function
        waits = iter([2.6])  # more than a chunk takes

        def graph(*args):
            calls.append(function)
            time.sleep(next(waits, 0))
            return function(*args)

        return graph

    monkeypatch.setattr(torch, "compile", slow_at_first)
    duration = 6 if ours else 120  # of LeRobot's loop, which is stopped as soon as the robot has moved
    cfg = rollout.parse(
        [*flags, "--use_torch_compile=true", f"--duration={duration}", "--inference.type=rtc"]
    )
    if ours:
        rollout.rollout(cfg)
    else:
        stop, send = threading.Event(), Arm.send_action

        def send_and_stop(self, action):
            if len(self.sent) > 40:
                stop.set()
            return send(self, action)

        monkeypatch.setattr(Arm, "send_action", send_and_stop)
        ctx = context.build_rollout_context(cfg, stop)
        strategy = create_strategy(cfg.strategy)
        strategy.setup(ctx)
        strategy.run(ctx)
        strategy.teardown(ctx)
    assert len(set(calls)) == 3, "the prefix, a step, and a guided step"
    assert len(arms[0].sent) > 40


@pytest.mark.parametrize(("said", "wanted"), [(None, 1), ("2", 2)])
def test_chunks_beside_the_loop_leave_it_a_core(rtc, monkeypatch, said, wanted):
    before, predict, seen = torch.get_num_threads(), Pi0Policy.predict_action_chunk, set()

    def watched(self, *args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            seen.add(torch.get_num_threads())
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(Pi0Policy, "predict_action_chunk", watched)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    torch.set_num_threads(2)
    try:
        rollout.rollout(rtc)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {wanted}


def test_another_rate_than_the_datas_is_told(sync, caplog):
    caplog.set_level(logging.WARNING)
    sync.policy.training_data = TrainingData(15.0, [])
    rollout.rollout(sync)
    (message,) = [message for message in caplog.messages if "each movement" in message]
    assert "trained at 15 actions per second and runs at 20: each movement takes 0.75 times" in message
    assert "--fps=15" in message
    caplog.clear()
    sync.policy.training_data = TrainingData(20.0, [])
    rollout.rollout(sync)
    assert "each movement" not in caplog.text


def test_a_robot_with_other_joints_is_refused_before_it_is_connected(sync, arms):
    sync.robot.actions = [ACTIONS[1], ACTIONS[0], *ACTIONS[2:]]
    with pytest.raises(ValueError, match="action, permuted"):
        rollout.rollout(sync)
    assert not arms


@pytest.fixture
def two_orders(flags, tmp_path) -> list[str]:
    """Flags for a policy whose data had the joints in one order in the state and in another in the action."""
    save_checkpoint(
        tmp_path / "checkpoint",
        chunk_size=50,
        n_action_steps=8,
        action_feature_names=STATES[::-1],
        output_features={"action": PolicyFeature(FeatureType.ACTION, (len(STATES),))},
    )
    return [
        f"--policy.path={tmp_path / 'checkpoint'}",
        *flags[1:],
        f"--robot.actions=[{','.join(STATES[::-1])}]",
    ]


@pytest.mark.parametrize("engine", [[], RTC], ids=["sync", "rtc"])
def test_the_state_stays_in_its_order_where_that_of_the_actions_is_another(
    two_orders, arms, monkeypatch, engine
):
    joints = {name: 10.0 + i for i, name in enumerate(STATES)}
    observe, predict, seen = Arm.get_observation, Pi0Policy.predict_action_chunk, []
    monkeypatch.setattr(Arm, "get_observation", lambda self: observe(self) | joints)

    def watched(self, batch, **given):
        seen.append(batch["observation.state"][0].tolist())
        return predict(self, batch, **given)

    monkeypatch.setattr(Pi0Policy, "predict_action_chunk", watched)
    rollout.main([*two_orders, *engine])
    normal = statistics()["observation.state"]
    wanted = (torch.tensor([*joints.values()]) - normal["mean"]) / normal["std"]
    assert seen[-1] == pytest.approx(wanted.tolist(), rel=1e-4)
    assert list(arms[0].sent[0]) == STATES[::-1]


def test_a_state_in_another_order_than_the_datas_is_refused_whoever_put_it_there(
    two_orders, arms, monkeypatch
):
    monkeypatch.setattr(rollout, "fed_state_names", lambda ctx: STATES[::-1])
    with pytest.raises(UserError, match=r"hand the policy the state as .*gripper.*it was trained with .*pan"):
        rollout.main(two_orders)
    assert not arms[0].sent
    assert not arms[0].is_connected


@pytest.mark.skipif(not hasattr(RolloutConfig, "interactive"), reason="LeRobot has no --interactive yet")
def test_an_interactive_session_moves_the_robot_when_it_is_told_to(flags, arms, monkeypatch, tmp_path):
    reading, writing = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(reading))
    before = []

    def type_commands() -> None:
        time.sleep(1)
        before.append(len(arms[0].sent) if arms else 0)
        os.write(writing, b"/start\n")
        while not arms[0].sent:
            time.sleep(0.05)
        os.write(writing, b"/subtask push\n")
        time.sleep(1)
        os.write(writing, b"/stop\n")

    cfg = rollout.parse([*flags, "--interactive=true", "--duration=60", "--play_sounds=false"])
    typist = threading.Thread(target=type_commands)
    monkeypatch.setattr(rollout, "drive", lambda *given: (typist.start(), lerobot_compat.drive(*given)))
    said = rollout.rollout(cfg, tmp_path)
    typist.join()
    os.close(writing)
    assert before == [0]
    assert "actions in" in said
    assert len(read_run(tmp_path).actions) == len(arms[0].sent)


@pytest.mark.skipif(not hasattr(RolloutConfig, "interactive"), reason="LeRobot has no --interactive yet")
def test_an_interactive_session_that_ends_before_a_run_is_no_error(flags, arms, monkeypatch, tmp_path):
    (tmp_path / "typed").write_text("/stop\n")
    monkeypatch.setattr(sys, "stdin", (tmp_path / "typed").open())
    cfg = rollout.parse([*flags, "--interactive=true", "--duration=60", "--play_sounds=false"])
    assert "no action was sent" in rollout.rollout(cfg)
    assert not arms[0].sent


def test_renamed_joints_run_with_the_flag_that_the_error_gives(sync, flags, arms):
    sync.robot.actions = ["base.pos", *ACTIONS[1:]]
    with pytest.raises(ValueError, match="action, renamed") as caught:
        rollout.rollout(sync)
    renamed = f"--robot.actions=[{','.join(sync.robot.actions)}]"
    rollout.main([*flags, renamed, flag_of(caught, "--policy.action_feature_names")])
    assert set(arms[0].sent[0]) == {"base.pos", *ACTIONS[1:]}


def test_a_camera_that_is_not_there_is_refused_with_the_map_that_renames_one(sync, flags, arms):
    sync.robot.camera = "top"
    with pytest.raises(ValueError, match="does not give") as caught:
        rollout.rollout(sync)
    assert not arms
    rollout.main([*flags, "--robot.camera=top", flag_of(caught, "--rename_map")])
    assert arms[0].sent
    sync.robot.camera, sync.rename_map = "side", {"observation.images.top": "observation.images.front"}
    with pytest.raises(ValueError, match="renamed by"):
        rollout.rollout(sync)


def test_a_policy_that_is_too_slow_is_told_with_what_would_do(sync, delayed, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(Pi0Policy, "supports_rtc", lambda self: False)
    monkeypatch.setattr(instrumentation, "REMIND_AFTER", 0.4)
    delayed(0.2)
    sync.duration = 3
    with caplog.at_level(logging.WARNING):
        said = rollout.rollout(sync, tmp_path)
    assert "the robot stands still for" in caplog.text
    assert "every 8 actions" in caplog.text
    assert "--policy.n_action_steps=50" in caplog.text  # all of a chunk
    assert "p95 of the last chunks" in caplog.text  # while it moves, too
    run = make_report(read_run(tmp_path)).loop_timing
    assert run.waits is not None
    assert run.waits >= 2
    assert f"{run.stalls} stalls" in said
    assert run.causes in said


def test_a_robot_that_is_slow_is_not_the_policys_fault(sync, tmp_path, monkeypatch):
    send, sent = Arm.send_action, []

    def slow(self, action):
        sent.append(time.sleep(0.3 if len(sent) in (3, 5) else 0.0))
        return send(self, action)

    monkeypatch.setattr(Arm, "send_action", slow)
    sync.duration = 1.5
    said = rollout.rollout(sync, tmp_path)
    run = make_report(read_run(tmp_path)).loop_timing
    assert run.stalls >= 2
    assert run.waits is not None
    assert run.stalls - run.waits >= 2
    assert run.causes in said


def test_a_robot_that_stands_far_from_the_data_is_warned_about_joint_by_joint(sync, caplog, monkeypatch):
    joints = {STATES[0]: -85.0, STATES[1]: 0.1}
    observe = Arm.get_observation
    monkeypatch.setattr(Arm, "get_observation", lambda self: observe(self) | joints)
    with caplog.at_level(logging.WARNING):
        rollout.rollout(sync)
    (warning,) = [message for message in caplog.messages if "has never been" in message]
    assert f"{STATES[0]} at -85 (in the data -1 to 1)" in warning
    assert "--policy.first_action=clamp" in warning
    assert not any(f"{name} at" in warning for name in STATES[1:])


def test_a_policy_that_can_never_keep_up_does_not_start(rtc, delayed, arms):
    delayed(0.5)
    rtc.fps, rtc.return_to_initial_position = 100, True
    with pytest.raises(RuntimeError, match="50 actions that is over when the next one comes"):
        rollout.rollout(rtc)
    assert not arms[0].sent
    assert not arms[0].is_connected


@pytest.mark.parametrize(("seconds", "enough"), [(0.35, 14), (1.6, 50)])
def test_a_horizon_that_the_delay_exceeds_is_told_with_one_that_works(rtc, caplog, seconds, enough):
    latencies = Latencies(seconds, {"chunk": [seconds], "guided": [seconds]})
    rtc.inference.rtc.execution_horizon = 6  # steps, of 7 and of 32
    with caplog.at_level(logging.WARNING):
        rollout.check_latency(rtc, latencies, rtc.policy)
    assert caplog.messages[0].endswith(f"will jump. Set --inference.rtc.execution_horizon={enough}")
    caplog.clear()
    rtc.inference.rtc.execution_horizon = enough
    rollout.check_latency(rtc, latencies, rtc.policy)
    assert "will jump" not in caplog.text


def test_what_a_watched_run_holds_is_not_called_better_otherwise(rtc, caplog):
    """At 1.2 s LeRobot's own loop would send less than a loop that waits; this one sends more."""
    rtc.fps = 30
    with caplog.at_level(logging.WARNING):
        rollout.check_latency(rtc, Latencies(1.2, {"chunk": [1.2], "guided": [1.2]}), rtc.policy)
    assert "(20.8 actions per second of 30). Nothing does better: --inference.type=rtc" in caplog.text


@pytest.fixture
def failing_late(monkeypatch) -> None:
    """The policy works for a while."""
    predict, asked = Pi0Policy.predict_action_chunk, []

    def failing(self, *args, **kwargs):
        asked.append(None)
        if len(asked) > 12:
            raise ValueError("the camera melted")
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(Pi0Policy, "predict_action_chunk", failing)


@pytest.mark.usefixtures("failing_late")
def test_an_error_that_the_policy_does_not_get_over_in_time_is_told(rtc):
    rtc.duration = 2.5  # five errors of half a second
    assert "the camera melted" in rollout.rollout(rtc)


def test_an_interruption_before_the_first_action_is_told_as_one(rtc, delayed, monkeypatch):
    monkeypatch.setattr(rollout, "check_latency", lambda *_: delayed(2.0))
    monkeypatch.setattr(Pi0Policy, "reset", lambda self: None)  # no warm-up
    monkeypatch.setattr(engine.RTCInferenceEngine, "resume", lambda self: interrupt())

    def interrupt():
        raise KeyboardInterrupt

    rtc.duration = 0
    with pytest.raises(RuntimeError, match="no action was sent to the robot: the run was interrupted"):
        rollout.rollout(rtc)


@pytest.mark.usefixtures("failing_late")
def test_a_policy_that_gives_up_is_an_error_with_its_reason(rtc, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_RTC_ERROR_RETRY_DELAY_S", 0.0)
    rtc.duration = 20  # it gives up before
    with pytest.raises(RuntimeError, match=r"actions were sent: the policy gave up \(.*the camera melted"):
        rollout.rollout(rtc, tmp_path)
    (stop,) = [event for event in read_trace(tmp_path) if event["event"] == "stop"]
    assert stop["why"] == "the policy gave up"


def test_no_action_is_an_error_of_one_line(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lerobot-pi0", "rollout", *flags, "--duration=0.000001"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "no action was sent to the robot" in line


def test_a_trace_is_not_written_over_another(sync, tmp_path, arms):
    (tmp_path / "policy.jsonl").write_text("{}\n")
    with pytest.raises(FileExistsError, match="another run"):
        rollout.rollout(sync, tmp_path)
    assert not arms


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--task= ", "--task="),
        ("--fps=0", "--fps must be"),
        ("--fps=inf", "--fps must be"),
        ("--interpolation_multiplier=0", "interpolation_multiplier must be"),  # later LeRobots refuse it too
        ("--dataset.repo_id=me/foo", "--dataset.repo_id=me/rollout_foo"),
        ("--dataset.root=.", "--dataset.root, or go on with the dataset in it, --resume=true"),
    ],
)
def test_flags_that_lerobot_trips_over_later_are_refused_before_the_robot_is_connected(
    flags, flag, said, arms
):
    recording = ["--strategy.type=episodic", "--dataset.repo_id=me/rollout_wave", "--dataset.fps=20"]
    if flag.startswith("--dataset"):
        flags = [*flags, *recording]
    with pytest.raises(ValueError, match=re.escape(said)):
        rollout.main([*flags, flag])
    assert not arms


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--dataset.fps=30"], r"--fps=20 --dataset\.fps=20"),
        (["--dataset.single_task=point"], r"--task='wave' and --dataset\.single_task='point' differ"),
    ],
)
def test_a_recording_says_what_the_robot_did(flags, given, said):
    dataset = ["--strategy.type=episodic", "--dataset.repo_id=me/rollout_foo", "--dataset.fps=20"]
    rollout.check_flags(rollout.parse([*flags, *dataset]))
    with pytest.raises(UserError, match=said):
        rollout.check_flags(rollout.parse([*flags, *dataset, *given]))


@pytest.mark.parametrize(
    ("strategy", "fps"), [("sentry", 40), ("highlight", 40), ("episodic", 40), ("dagger", 20)]
)
def test_a_recording_says_the_rate_at_which_lerobot_adds_frames(sync, strategy, fps):
    sync.interpolation_multiplier = 2
    sync.strategy = SimpleNamespace(type=strategy)
    sync.dataset = DatasetRecordConfig(repo_id="me/rollout_foo", single_task=sync.task, fps=fps)
    rollout.check_flags(sync)
    sync.dataset.fps = 60 - fps
    with pytest.raises(UserError, match=rf"--fps=20 --dataset\.fps={fps}"):
        rollout.check_flags(sync)


@pytest.mark.parametrize("said", [20, 30])  # by a flag, which LeRobot does not read when it goes on
def test_a_recording_that_goes_on_keeps_its_rate(sync, tmp_path, said):
    sync.resume = True
    sync.dataset = DatasetRecordConfig(
        repo_id="me/rollout_foo", single_task=sync.task, root=tmp_path, fps=said
    )
    info = tmp_path / "meta" / "info.json"
    info.parent.mkdir()
    info.write_text('{"fps": 20}')
    rollout.check_flags(sync)
    info.write_text('{"fps": 30}')
    with pytest.raises(UserError, match=r"has 30 frames per second, .* would add 20 per second"):
        rollout.check_flags(sync)


def test_the_task_of_the_dataset_is_an_instruction(flags):
    flags = [flag for flag in flags if not flag.startswith("--task")]
    dataset = ["--strategy.type=episodic", "--dataset.repo_id=me/rollout_foo", "--dataset.fps=20"]
    rollout.check_flags(rollout.parse([*flags, *dataset, "--dataset.single_task=wave"]))
    with pytest.raises(ValueError, match="--task"):
        rollout.check_flags(rollout.parse([*flags, *dataset]))


@pytest.mark.parametrize(
    ("path", "said"),
    [("/nowhere/x", "there is no folder /nowhere/x"), ("user/none", "it is not in the local cache")],
)
def test_a_policy_that_is_not_there_is_told_as_such(flags, path, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lerobot-pi0", "rollout", f"--policy.path={path}", *flags[1:]])
    with pytest.raises(SystemExit):
        cli.main()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert said in line


def test_a_robot_that_lerobot_has_connected_in_vain_is_disconnected(sync, arms, monkeypatch):
    def failing(*_, **__):
        raise ValueError("no such processor")

    monkeypatch.setattr(context, "make_pre_post_processors", failing)
    with pytest.raises(UserError, match="no such processor"):
        rollout.rollout(sync)
    assert arms
    assert not arms[0].is_connected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--trace"], "--trace needs a folder"),
        (["--trace", "--fps=3"], "--trace needs a folder"),
        (["--robot.type=test_arm"], "--policy.path is required"),
    ],
)
def test_flags_that_cannot_be_are_told(given, said):
    with pytest.raises(ValueError, match=said):
        rollout.main(given)
