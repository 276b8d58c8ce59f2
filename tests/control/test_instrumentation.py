"""An instrumented engine of LeRobot: no chunk outlives a reset, and the delay is that of the last chunks."""

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
        self.delays: list[int | None] = []  # that it was given

    def reset(self) -> None: ...

    def predict_action_chunk(
        self, batch: dict[str, torch.Tensor], inference_delay: int | None = None, **_: Any
    ) -> torch.Tensor:
        self.began.set()
        self.delays.append(inference_delay)
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
def ctx(inner: RTCInferenceEngine) -> Any:
    return SimpleNamespace(
        runtime=SimpleNamespace(cfg=SimpleNamespace(interpolation_multiplier=1, fps=30.0)),
        policy=SimpleNamespace(inference=inner, postprocessor=PIPELINE),
        hardware=SimpleNamespace(robot_wrapper=ThreadSafeRobot(ROBOT)),
    )


@pytest.fixture
def instrumentation(ctx: Any, policy: Any) -> Instrumentation:
    return Instrumentation(ctx, policy, None, {"kind": "rtc"})


@pytest.fixture
def engine(ctx: Any, instrumentation: Instrumentation) -> Iterator[InferenceEngine]:
    """LeRobot's engine, instrumented, started as LeRobot's strategies start it."""
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


def test_one_slow_chunk_is_not_the_delay_of_all_that_follow(instrumentation, policy):
    """LeRobot's own estimate, which is replaced, is the longest latency since the run began."""
    batch = {"observation.state": torch.zeros(1)}
    for seconds in [0.05, 1.2, *[0.05] * 5, 9.0]:
        policy.predict_action_chunk(batch, inference_delay=36)
        instrumentation.latencies.append(seconds)
    policy.predict_action_chunk(batch, inference_delay=270)
    # At 30 fps. The slow chunk counts for five; no delay is longer than the chunk of 50 has steps left.
    assert policy.delays == [0, 2, *[36] * 5, 2, 49]
    policy.predict_action_chunk(batch)
    assert policy.delays[-1] is None  # a loop that waits for its chunks has no delay
