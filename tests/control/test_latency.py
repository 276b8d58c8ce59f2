"""`lerobot-pi0 latency`: all stages are measured on an observation made of the checkpoint's features."""

import json
from pathlib import Path

import pytest
import torch
from hand_clock import HandClock
from tiny_policy import MODELS
from tiny_robot import save_checkpoint

from lerobot_pi0.configuration_pi0 import TrainingData
from lerobot_pi0.control import latency
from lerobot_pi0.control.latency import Latencies, LatencyConfig, main
from lerobot_pi0.inputs.flags import ControlPolicyFlags
from lerobot_pi0.modeling_pi0 import Pi0Policy


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory) -> Path:
    """Of π0, or of the test's model."""
    folder, model = tmp_path_factory.mktemp("policy"), getattr(request, "param", "pi0")
    return save_checkpoint(folder, model, chunk_size=20, n_action_steps=8)


@pytest.mark.parametrize("checkpoint", MODELS, indirect=True)
def test_each_stage_is_measured_and_the_flags_can_be_pasted(checkpoint):
    config = LatencyConfig(ControlPolicyFlags(str(checkpoint), device="cpu"), repeats=3)
    text = main(config)
    for stage in ("prepare", "encode", "denoise", "finish", "chunk", "first"):
        assert f"\n{stage} " in text
    assert "--inference.type=" in text
    config.json = True
    found = json.loads(main(config))
    stages = {stage: figures["p50_s"] for stage, figures in found["stages"].items()}
    assert all(seconds > 0 for seconds in stages.values())
    assert found["suggestion"]["flags"]
    assert found["lerobot_rollout"]["flags"]


def test_a_slow_stage_is_told_from_the_others_and_decides_what_is_suggested(checkpoint, monkeypatch):
    clock, plan = HandClock(), Pi0Policy.plan

    def slow(self, *args, **kwargs):
        clock.run(0.2)
        return plan(self, *args, **kwargs)

    monkeypatch.setattr(latency.time, "perf_counter", clock)

    monkeypatch.setattr(Pi0Policy, "plan", slow)
    monkeypatch.setattr(
        Pi0Policy, "predict_action_chunk", lambda self, batch, **_: self.plan(self.encode(batch))
    )
    found = json.loads(main(LatencyConfig(ControlPolicyFlags(str(checkpoint)), fps=10, repeats=2, json=True)))
    stages = {stage: figures["p50_s"] for stage, figures in found["stages"].items()}
    assert stages["denoise"] == pytest.approx(0.2)
    assert stages["chunk"] == pytest.approx(0.2)
    assert stages["prepare"] == stages["encode"] == stages["finish"] == 0
    timing = found["suggestion"]["timing"]
    assert timing["delay"] >= 2
    # Half a chunk of 20 at 10 fps hides a second.
    assert found["suggestion"]["kind"] == ("rtc" if "guided" in stages else "sync")


def test_steps_and_solver_are_those_that_are_asked_for(checkpoint, monkeypatch):
    seen, plan = set(), Pi0Policy.plan

    def watched(self, *args, **kwargs):
        seen.add((self.config.num_inference_steps, self.config.solver))
        return plan(self, *args, **kwargs)

    monkeypatch.setattr(Pi0Policy, "plan", watched)
    flags = ControlPolicyFlags(str(checkpoint), num_inference_steps=3, solver="ab2")
    text = main(LatencyConfig(flags, repeats=1))
    assert seen == {(3, "ab2")}
    assert "3 steps from noise, by ab2" in text


def test_the_rate_is_that_of_the_training_data(tmp_path):
    folder = str(save_checkpoint(tmp_path, chunk_size=20, training_data=TrainingData(15.0, ["wave"])))
    assert "\n    --fps=15\n" in main(LatencyConfig(ControlPolicyFlags(folder), repeats=1))
    assert "\n    --fps=20\n" in main(LatencyConfig(ControlPolicyFlags(folder), fps=20, repeats=1))


@pytest.mark.parametrize("how", ["compile", "int8"])
def test_a_policy_is_measured_as_it_is_asked_to_run(checkpoint, monkeypatch, how):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda graph, **_: compiled.append(graph) or graph)
    flags = ControlPolicyFlags(str(checkpoint), device="cpu", backend=how)
    text = main(LatencyConfig(flags, repeats=1))
    assert ("compiled" if how == "compile" else ", int8") in text
    assert bool(compiled) == (how == "compile")
    assert ("\ndenoise " in text) == (how == "int8")  # of one graph there are no stages
    assert "\nguided " in text


def test_where_lerobots_own_command_runs_otherwise_both_are_told(checkpoint, monkeypatch):
    slow = Latencies(first=0.8, stages={"chunk": [0.8], "guided": [0.8]})  # 16 steps of a chunk of 20
    monkeypatch.setattr(latency, "measure", lambda *_: slow)
    text = main(LatencyConfig(ControlPolicyFlags(str(checkpoint)), fps=20))
    ours, plain = text.split("That is with lerobot-pi0 rollout. With lerobot-rollout")
    assert "--inference.type=rtc" in ours
    assert "--inference.type=sync" in plain
    monkeypatch.setattr(latency, "measure", lambda *_: Latencies(0.2, {"chunk": [0.2], "guided": [0.2]}))
    assert "With lerobot-rollout" not in main(LatencyConfig(ControlPolicyFlags(str(checkpoint)), fps=20))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LatencyConfig(fps=0), "--fps must be"),
        (LatencyConfig(repeats=0), "--repeats must be"),
        (LatencyConfig(), "which policy"),
        (LatencyConfig(ControlPolicyFlags("nowhere")), "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_told(config, said):
    with pytest.raises((ValueError, OSError), match=said):
        main(config)
