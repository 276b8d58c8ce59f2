"""`lerobot-pi0 trace` on traces whose stalls, jumps and delays are known."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lerobot_pi0.control.trace import Trace
from lerobot_pi0.control.trace_report import TraceReportConfig, main, make_report, read_run

FPS, CHUNK, EXECUTED = 10.0, 8, 5
PERIOD = 1 / FPS


def write(file: Path, events: list[dict[str, Any]]) -> None:
    trace = Trace(file)
    for event in events:
        trace.write(**event)
    trace.close()


def start(**fields: Any) -> dict[str, Any]:
    return {"event": "start", "t": 99.9, "fps": FPS, "kind": "sync", "chunk_size": CHUNK, **fields}


def ticks(
    count: int, stall_at: int | None = None, stall: float = 0.0, jump: float = 0.0, empty: int = 0
) -> list[dict[str, Any]]:
    """A loop's observations and actions. Joint "a" goes on by 0.1 a step and by `jump` more at each change of
    the chunk, "b" stays; before one action the loop waits for `stall` seconds, in `empty` ticks."""
    events: list[dict[str, Any]] = []
    t, value = 100.0, 0.0
    for i in range(count):
        if i == stall_at:
            seen = [t + k * stall / empty for k in range(empty)]
            events += [{"event": "observation", "t": at, "joints": {"a": value}} for at in seen]
            t += stall
        step = i % EXECUTED
        if i:
            value += 0.1 + (jump if step == 0 else 0)
        if step == 0:
            events.append(
                {
                    "event": "inference",
                    "t": t,
                    "chunk": i // EXECUTED + 1,
                    "observed": t - 0.05,
                    "began": t - 0.04,
                    "ended": t - 0.01,
                    "given": 1,
                    "dropped": 2,
                    "consumed": 1,
                    "actions": [[0.0, 0.0]] * CHUNK,
                }
            )
        events.append({"event": "observation", "t": t - 0.05, "joints": {"a": value, "b": 0.0}})
        values = {"a": value, "b": 0.0}
        events.append({"event": "action", "t": t, "values": values, "chunk": i // EXECUTED + 1, "step": step})
        t += PERIOD
    return events


def without(events: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [found for found in events if found["event"] != event]


def test_an_even_run_has_its_rate_and_no_stall(tmp_path):
    write(tmp_path / "policy.jsonl", [start(), *ticks(20)])
    report = make_report(read_run(tmp_path))
    assert report.loop_timing.rate == pytest.approx(FPS)
    assert report.loop_timing.stalls == report.empty_ticks == report.blocked_ticks == 0
    assert report.loop_timing.periods["p50"] == pytest.approx(PERIOD)
    assert report.loop_timing.overruns == 0
    assert report.first_action == pytest.approx(0.05)


def test_a_planted_stall_is_found_with_its_length_and_cause(tmp_path):
    write(tmp_path / "blocked" / "policy.jsonl", [start(), *ticks(20, stall_at=10, stall=0.7)])
    report = make_report(read_run(tmp_path / "blocked"))
    assert (report.loop_timing.stalls, report.blocked_ticks, report.empty_ticks) == (1, 1, 0)
    assert report.loop_timing.stalled == report.loop_timing.longest == pytest.approx(0.7)
    assert report.loop_timing.overruns == pytest.approx(1 / 19)
    assert report.loop_timing.rate == pytest.approx(19 / (1.9 + 0.7))
    write(tmp_path / "empty" / "policy.jsonl", [start(), *ticks(20, stall_at=10, stall=0.7, empty=7)])
    report = make_report(read_run(tmp_path / "empty"))
    assert (report.loop_timing.stalls, report.blocked_ticks, report.empty_ticks) == (1, 0, 7)


def test_the_pause_between_two_episodes_is_no_stall(tmp_path):
    later = [event | {"t": event["t"] + 60} for event in without(ticks(10), "inference")]
    write(tmp_path / "policy.jsonl", [start(), *ticks(10), start(t=150.0), *later])
    report = make_report(read_run(tmp_path))
    assert report.loop_timing.actions == 20
    assert report.loop_timing.stalls == 0
    assert report.loop_timing.rate == pytest.approx(FPS)


def test_a_planted_jump_is_found_at_the_joint_that_has_it(tmp_path):
    write(tmp_path / "policy.jsonl", [start(std={"a": 0.5, "b": 0.1}), *ticks(20, jump=1.0)])
    report = make_report(read_run(tmp_path))
    assert report.boundaries == 3
    assert report.worst == "a"
    assert report.jumps["a"].boundary["p50"] == pytest.approx(1.1)
    assert report.jumps["a"].within["max"] == pytest.approx(0.1)
    assert report.jumps["b"].boundary["max"] == 0
    text = main(TraceReportConfig(tmp_path))
    (line,) = [line for line in text.splitlines() if "<- worst" in line]
    assert "2.20" in line  # standard deviations


def test_delays_and_what_they_cost_are_those_of_the_chunks(tmp_path):
    write(tmp_path / "policy.jsonl", [start(), *ticks(20)])
    report = make_report(read_run(tmp_path))
    assert {key: delay["max"] for key, delay in report.delays.items()} == {
        "given": 1,
        "dropped": 2,
        "consumed": 1,
    }
    assert report.skipped == report.chunks == 4
    assert report.used == pytest.approx(20 / (4 * CHUNK))
    assert report.latency["p50"] == report.first_latency == pytest.approx(0.03)
    assert report.age["max"] == pytest.approx(0.05 + (EXECUTED - 1) * PERIOD)


def test_the_robots_trace_and_the_servers_are_put_together(tmp_path):
    events = ticks(20, jump=1.0)
    actions = [
        {key: value for key, value in event.items() if key not in ("chunk", "step")}
        for event in without(events, "inference")
    ]
    write(tmp_path / "robot.jsonl", [start(kind=None, robot="arm"), *actions])
    chunks = [event for event in events if event["event"] == "inference"]
    others = [
        event | {key: event[key] - 50 for key in ("t", "began", "ended", "observed")} for event in chunks
    ]
    write(tmp_path / "policy.jsonl", [start(kind="async", t=40.0), *others, start(kind="async"), *chunks])
    report = make_report(read_run(tmp_path))
    assert report.chunks == 4  # not those of a robot that was served before
    assert report.start["robot"] == "arm"
    assert report.boundaries == 3
    assert report.jumps["a"].boundary["p50"] == pytest.approx(1.1)
    assert report.age["max"] == pytest.approx(0.05 + (EXECUTED - 1) * PERIOD)
    assert report.used == pytest.approx(20 / (4 * CHUNK))


def test_a_servers_trace_alone_says_what_it_lacks(tmp_path):
    chunks = [event for event in ticks(20) if event["event"] == "inference"]
    write(tmp_path / "policy.jsonl", [start(kind="async"), *chunks])
    with pytest.raises(RuntimeError, match=r"policy server's trace, of 4 chunks.*--robot\.trace"):
        read_run(tmp_path)


def test_two_records_of_the_same_actions_count_once_and_the_way_home_not_at_all(tmp_path):
    events = ticks(20)
    home = [{"event": "action", "t": 110 + i / 50, "values": {"a": 0.0, "b": 0.0}} for i in range(150)]
    write(tmp_path / "robot.jsonl", [start(), *without(events, "inference"), *home])
    write(tmp_path / "policy.jsonl", [start(), *events])
    assert make_report(read_run(tmp_path)).loop_timing.actions == 20


@pytest.mark.parametrize("missing", ["start", "observation", "inference"])
def test_what_the_trace_does_not_tell_is_left_out(tmp_path, missing):
    events = without([start(), *ticks(20, stall_at=10, stall=0.7)], missing)
    if missing == "inference":
        events = [{k: v for k, v in event.items() if k not in ("chunk", "step")} for event in events]
    write(tmp_path / "robot.jsonl", events)
    report = make_report(read_run(tmp_path))
    assert report.loop_timing.stalls == 1
    assert (report.empty_ticks is None) == (missing == "observation")
    assert (report.worst is None) == (missing == "inference")
    text = main(TraceReportConfig(tmp_path))
    assert ("does not say which rate" in text) == (missing == "start")
    assert "Control steps, per chunk" not in text or missing != "inference"


def test_a_run_without_an_action_is_an_error_that_says_what_there_was(tmp_path):
    stop = {"event": "stop", "t": 120.0, "why": "the policy gave up"}
    write(tmp_path / "policy.jsonl", [start(), *without(ticks(20), "action"), stop])
    with pytest.raises(RuntimeError, match=r"no action.*20 observations, 4 chunks.*the policy gave up"):
        main(TraceReportConfig(tmp_path))
    with pytest.raises(FileNotFoundError, match="holds no trace"):
        main(TraceReportConfig(tmp_path / "nowhere"))


def test_the_line_that_a_killed_process_cut_is_left_out(tmp_path):
    write(tmp_path / "policy.jsonl", [start(), *ticks(20)])
    with (tmp_path / "policy.jsonl").open("a") as file:
        file.write('{"event": "action", "t": 10')
    assert make_report(read_run(tmp_path)).loop_timing.actions == 20


def test_lines_that_are_no_events_are_left_out_and_nothing_but_such_is_no_trace(tmp_path):
    noise = '3\nnull\n[]\n"text"\n{"task_index": 0, "task": "x"}\n{"event": "action", "t": "now"}\n\n'
    (tmp_path / "tasks.jsonl").write_bytes(noise.encode() + b"\xff\n")
    with pytest.raises(FileNotFoundError, match="holds no trace"):
        main(TraceReportConfig(tmp_path))
    write(tmp_path / "policy.jsonl", [start(), *ticks(20)])
    assert make_report(read_run(tmp_path)).loop_timing.actions == 20


@pytest.mark.parametrize("later", [1000.0, -50.0], ids=["later", "after the machine was started anew"])
def test_of_several_runs_in_a_trace_the_last_one_counts_and_it_is_told(tmp_path, later):
    second = [event | {"t": event["t"] + later} for event in ticks(10)]
    for event in second:
        event |= {key: event[key] + later for key in ("observed", "began", "ended") if key in event}
    write(tmp_path / "policy.jsonl", [start(std={"a": 0.5}), *ticks(20, stall_at=10, stall=0.7)])
    write(tmp_path / "policy.jsonl", [start(t=99.9 + later), *second])
    report = make_report(read_run(tmp_path))
    assert (report.loop_timing.actions, report.chunks, report.loop_timing.stalls, report.others) == (
        10,
        2,
        0,
        1,
    )
    assert report.start == {"fps": FPS, "kind": "sync", "chunk_size": CHUNK}
    assert report.age["max"] == pytest.approx(0.05 + (EXECUTED - 1) * PERIOD)
    assert "holds 2 runs of the robot" in main(TraceReportConfig(tmp_path))


def test_a_robot_that_connects_again_has_its_last_run_beside_the_servers_chunks(tmp_path):
    events = ticks(20)
    actions = [
        {key: value for key, value in event.items() if key not in ("chunk", "step")}
        for event in without(events, "inference")
    ]
    stop = {"event": "stop", "t": 102.5, "why": "disconnected"}
    chunks = [event for event in events if event["event"] == "inference"]
    later = [event | {"t": event["t"] + 60} for event in actions]
    times = ("t", "began", "ended", "observed")
    chunks += [event | {key: event[key] + 60 for key in times} for event in chunks]
    write(tmp_path / "policy.jsonl", [start(kind="async"), *without(chunks, "action")])
    write(tmp_path / "robot.jsonl", [start(kind=None, robot="arm"), *actions, stop])
    write(tmp_path / "robot.jsonl", [start(kind=None, robot="arm", t=159.9), *later])
    report = make_report(read_run(tmp_path))
    assert (report.loop_timing.actions, report.chunks, report.others) == (20, 4, 1)
    assert report.age["max"] == pytest.approx(0.05 + (EXECUTED - 1) * PERIOD)


def test_report_is_json_on_request_and_comes_with_a_picture(tmp_path):
    write(tmp_path / "policy.jsonl", [start(), *ticks(20, stall_at=10, stall=0.7)])
    report = json.loads(main(TraceReportConfig(tmp_path, json=True)))
    assert report["loop_timing"]["stalls"] == 1
    with Image.open(tmp_path / "trace.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_trace_on_a_full_disk_ends_and_raises_nothing(caplog):
    trace = Trace(Path("/dev/full"))
    trace.write("action", values={})
    trace.write("action", values={})
    trace.close()
    (message,) = caplog.messages
    assert "the trace ends here, /dev/full cannot be written: " in message
