"""What a robot sends is read as it was meant, or refused; whatever it is, the process goes on."""

import json
import os
import pickle
import resource
import threading
import time
from typing import Any

import numpy as np
import pytest
from forked import Program
from harmful_pickles import HARMFUL
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
from lerobot.transport import services_pb2
from lerobot.transport.utils import send_bytes_in_chunks

from lerobot_pi0.serving.messages import MAX_PARTS, MessageError, read_instructions, read_observation
from lerobot_pi0.serving.remote_robot import RemoteRobot

wire: Any = services_pb2


def read(observation: Any, protocol: int | None = None) -> Any:
    """What arrives of an observation, by LeRobot's own client."""
    data = observation if isinstance(observation, bytes) else pickle.dumps(observation, protocol)
    return read_observation(send_bytes_in_chunks(data, wire.Observation), threading.Event())


def sent(value: Any, protocol: int | None = None) -> Any:
    """What arrives of a value in an observation."""
    return read(TimedObservation(time.time(), 0, {"it": value}), protocol).observation["it"]


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("kind", ["?", "u1", "i2", "i8", "f2", "<f4", ">f4", "f8"])
def test_arrays_and_numbers_arrive_as_they_are(kind, protocol):
    values = np.random.default_rng(0).integers(0, 2, (4, 3, 5)).astype(kind)
    for array in (values, values.T, values[::2], values.transpose(0, 2, 1), values[0, 0, 0:1], values[:0]):
        arrived = sent(array, protocol)
        assert arrived.dtype == array.dtype
        np.testing.assert_array_equal(arrived, array)
    np.testing.assert_array_equal(sent(values[0, 0, 0], protocol), values[0, 0, 0])


def test_what_newer_numpy_names_arrives_too():
    """From 2.3 on the axes may stand beside the buffer."""
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)

    class Newer:
        def __reduce__(self) -> Any:
            parts = values.tobytes(), values.dtype, values.shape, "K", (1, 0, 2)
            return np._core.numeric._frombuffer, parts  # pyrefly: ignore[missing-attribute]

    np.testing.assert_array_equal(sent(Newer()), values.transpose(1, 0, 2))


def test_a_robots_description_arrives():
    features = {"observation.state": {"dtype": "float32", "shape": (2,), "names": ["a.pos", "b.pos"]}}
    setup = RemotePolicyConfig("lerobot_pi0", "user/policy", features, 50, "cuda")  # pyrefly: ignore[bad-argument-type]
    assert vars(read_instructions(pickle.dumps(setup))) == vars(setup)


def test_an_observation_of_as_many_parts_as_may_be_is_read_and_of_more_is_not():
    assert sent([0.5] * (MAX_PARTS // 2))
    with pytest.raises(MessageError, match="as a numpy array"):
        sent([0.5] * MAX_PARTS)


def test_to_look_through_it_takes_no_time_beside_the_rest():
    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    joints = {f"joint_{i}.pos": 0.1 * i for i in range(14)}
    cameras = {f"camera_{i}": picture.copy() for i in range(3)}
    observation = TimedObservation(time.time(), 0, joints | cameras | {"task": "push"})
    data = pickle.dumps(observation)
    seconds = []
    for _ in range(20):
        began = time.thread_time()
        read(data)
        seconds.append(time.thread_time() - began)
    assert min(seconds) < 0.03


ROBOT = RemoteRobot(("joint_0.pos",), {}, 4)


def read_in_a_child(data: bytes) -> dict[str, Any]:
    """How the reading of a message ended, in a process that it may bring down."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            told = str(ROBOT.observation(read(data).observation | {"task": ""}))
        except ValueError as error:
            told = str(error)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(theirs, json.dumps({"told": told[:500], "grown": grown}).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"code": code, **(json.loads(text) if text else {})}


def read_all_in_children() -> None:
    print(json.dumps({name: read_in_a_child(data) for name, (data, _) in HARMFUL.items()}))


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, Any]:
    """How each harmful pickle ended."""
    # The children are not this process's: pytest's has threads, and memory of other tests to grow into.
    log = tmp_path_factory.mktemp("pickles") / "log.txt"
    return json.loads(Program(log, read_all_in_children).succeed().output.splitlines()[-1])


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_pickle_ends_in_an_error_and_not_in_a_signal(ends, name):
    assert ends[name]["code"] == 0
    assert HARMFUL[name][1] in ends[name]["told"]
    assert ends[name]["grown"] < 50_000  # kB
