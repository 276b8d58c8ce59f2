"""An instrumented engine of LeRobot: no chunk outlives a reset."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lerobot.policies.rtc import RTCConfig
from lerobot.rollout.inference import InferenceEngine, RTCInferenceEngine
from lerobot.rollout.robot_wrapper import ThreadSafeRobot

from lerobot_pi0.control.instrumentation import Instrumentation


class Echo:
    """A policy whose actions are the state that it saw, after as long as `takes` says."""

    config = SimpleNamespace(action_feature_names=None, chunk_size=50, n_action_steps=50)

    def __init__(self) -> None:
        self.takes = 0.0
        self.began = threading.Event()

    def reset(self) -> None: ...

    def predict_action_chunk(self, batch: dict[str, torch.Tensor], **_: Any) -> torch.Tensor:
        self.began.set()
        time.sleep(self.takes)
        return batch["observation.state"].reshape(1, 1, 1).repeat(1, 50, 1)


class Pipeline:
    steps: tuple = ()

    def __call__(self, value: Any) -> Any:
        return value

    def reset(self) -> None: ...


@pytest.fixture
def policy() -> Echo:
    return Echo()


PIPELINE: Any = Pipeline()
ROBOT: Any = SimpleNamespace(robot_type="arm", action_features={"a.pos": float})


@pytest.fixture
def inner(policy: Any) -> RTCInferenceEngine:
    """LeRobot's own engine; a chunk is made when half is left."""
    state = {"observation.state": {"dtype": "float32", "shape": (1,), "names": ["a.pos"]}}
    return RTCInferenceEngine(
        policy, PIPELINE, PIPELINE, ROBOT, RTCConfig(), state, "wave", 30.0, "cpu", rtc_queue_threshold=25
    )


@pytest.fixture
def engine(policy: Any, inner: RTCInferenceEngine) -> Iterator[InferenceEngine]:
    """It, instrumented, started as LeRobot's strategies start it."""
    cfg = SimpleNamespace(interpolation_multiplier=1, fps=30.0)
    ctx: Any = SimpleNamespace(
        runtime=SimpleNamespace(cfg=cfg),
        policy=SimpleNamespace(inference=inner, postprocessor=PIPELINE),
        hardware=SimpleNamespace(robot_wrapper=ThreadSafeRobot(ROBOT)),
    )
    Instrumentation(ctx, policy, None, {"kind": "rtc"})
    instrumented = ctx.policy.inference
    instrumented.reset()
    instrumented.start()
    instrumented.resume()
    yield instrumented
    instrumented.stop()


def actions(engine: InferenceEngine, state: float, number: int) -> list[float]:
    """So many actions of a loop whose robot stands in a state."""
    found, until = [], time.monotonic() + 30
    while len(found) < number:
        assert time.monotonic() < until, "no action came"
        engine.notify_observation({"a.pos": state})
        if (action := engine.get_action(None)) is not None:
            found.append(float(action))
        time.sleep(0.001)
    return found


def test_an_observation_before_a_reset_is_not_acted_on_after_it(engine):
    assert actions(engine, state=77.0, number=10) == [77.0] * 10
    engine.reset()
    engine.resume()
    time.sleep(0.1)  # the robot takes its time for the first observation, and the thread looks each 10 ms
    assert actions(engine, state=3.0, number=40) == [3.0] * 40


def test_a_chunk_that_is_being_made_at_a_reset_is_thrown_away(engine, policy):
    actions(engine, state=77.0, number=10)
    policy.takes = 0.3
    policy.began.clear()
    actions(engine, state=77.0, number=20)  # half is left
    assert policy.began.wait(30)
    engine.reset()
    engine.resume()
    assert actions(engine, state=3.0, number=40) == [3.0] * 40


def test_an_observation_taken_just_before_a_reset_is_not_acted_on(engine, inner, monkeypatch):
    """Between taking it and asking for what is left of the last chunk, too."""
    actions(engine, state=77.0, number=10)
    queue = inner.action_queue
    asked, go, qsize = threading.Event(), threading.Event(), queue.qsize

    def slow() -> int:
        asked.set()
        go.wait(30)
        return qsize()

    monkeypatch.setattr(queue, "qsize", slow)
    assert asked.wait(30)
    engine.reset()
    engine.resume()
    go.set()
    time.sleep(0.1)
    assert actions(engine, state=3.0, number=40) == [3.0] * 40
