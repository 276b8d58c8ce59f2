"""The rule of what a chunk hides, against loops that are played step by step and against measured runs."""

import math

import pytest

from lerobot_pi0.control.timing import lerobot_rtc_timing, rtc_timing, suggest, sync_timing


def play_rtc(latency: float, chunk_size: int, threshold: int, corrected: bool) -> float:
    """Actions per second of real-time chunking at 30 fps, played in ticks of a hundredth of a step.

    Of a chunk LeRobot drops what its latency says; `lerobot-pi0 rollout` what was sent while it was made.
    """
    fps, seconds, fine = 30, 200, 100
    queue, busy, sent, before, stalls = 0, None, 0, 0, 0
    delay = math.ceil(latency * fps)
    for tick in range(int(seconds * fps * fine)):
        if busy is not None and tick >= busy:
            queue, busy = max(chunk_size - (sent - before if corrected else delay), 0), None
        if busy is None and queue <= threshold:
            busy, before = tick + round(latency * fps * fine), sent
        if tick % fine == 0:
            if queue:
                queue, sent = queue - 1, sent + 1
            else:
                stalls += 1
    return sent / seconds


@pytest.mark.parametrize("latency", [0.02, 0.3, 0.7, 0.83, 1.0, 1.2, 1.7])
@pytest.mark.parametrize("threshold", [5, 25, 30, 50])
@pytest.mark.parametrize("rule", [lerobot_rtc_timing, rtc_timing])
def test_rate_of_rtc_is_that_of_the_loop_played_step_by_step(latency, threshold, rule):
    timing = rule(latency, 30, 50, threshold)
    played = play_rtc(latency, 50, threshold, corrected=rule is rtc_timing)
    assert timing.rate == pytest.approx(played, rel=0.06, abs=0.1)
    assert (timing.stall == 0) == (timing.delay <= threshold and timing.delay <= 25)


def test_a_loop_that_waits_for_the_policy_runs_as_measured():
    # LeRobot 0.6.1 with injected latencies, chunk 50 at 30 fps: 24.4, 19.0 and 13.4 actions per second.
    rates = [sync_timing(latency, 30, 50).rate for latency in (0.4, 1.0, 2.0)]
    assert rates == pytest.approx([24.4, 19.0, 13.4], rel=0.04)
    assert sync_timing(0.03, 30, 50).stall == 0


def test_a_latency_of_a_whole_chunk_never_moves():
    timing = lerobot_rtc_timing(2.0, 30, 50, 30)
    assert timing.rate == timing.actions == 0
    assert "never move" in str(timing)


def test_what_fits_into_a_control_step_is_run_in_it():
    suggestion = suggest(30, 50, 20, latency=0.03, guided_latency=0.035)
    assert suggestion.kind == "sync"
    assert "--policy.n_action_steps=20" in suggestion.flags


@pytest.mark.parametrize("latency", [0.05, 0.3, 0.8])
def test_what_half_a_chunk_hides_is_run_beside_the_loop(latency):
    suggestion = suggest(30, 50, 50, latency, guided_latency=latency)
    assert suggestion.kind == "rtc"
    assert suggestion.timing.stall == 0
    flags = dict(flag.split("=") for flag in suggestion.flags)
    threshold = int(flags["--inference.queue_threshold"])
    horizon = int(flags["--inference.rtc.execution_horizon"])
    assert suggestion.timing.delay <= horizon <= threshold <= 25


def test_what_nothing_hides_takes_the_faster_way_and_says_which_fps_would_do():
    suggestion = suggest(30, 50, 10, latency=2.0, guided_latency=2.5)
    assert suggestion.kind == "sync"
    assert "--policy.n_action_steps=50" in suggestion.flags
    assert suggestion.highest_fps == pytest.approx(10)
    assert not suggest(suggestion.highest_fps, 50, 10, 2.0, 2.5).timing.stall
    assert "holds 10 fps at most" in str(suggestion)


def test_what_lerobot_holds_worse_is_suggested_to_each_command_as_it_runs():
    suggestion = suggest(30, 50, 50, latency=1.2, guided_latency=1.2)
    assert suggestion.kind == "rtc"
    assert suggestion.timing.rate == pytest.approx(25 / 1.2)
    assert suggest(30, 50, 50, 1.2, 1.2, lerobot_rtc_timing).kind == "sync"


def test_a_latency_of_a_whole_chunk_is_never_told_to_use_rtc():
    assert suggest(30, 50, 50, latency=2.5, guided_latency=1.7).kind == "sync"


def test_a_policy_without_rtc_is_never_told_to_use_it():
    assert suggest(30, 50, 50, latency=0.5, guided_latency=None).kind == "sync"
