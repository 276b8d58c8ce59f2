"""`lerobot-pi0 serve`: LeRobot's protocol over a loopback port, with good clients and bad ones."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from harmful_pickles import HARMFUL
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedAction, TimedObservation
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import send_bytes_in_chunks
from lerobot.utils.import_utils import require_package
from tiny_policy import STATE, statistics, tiny_policy

from lerobot_pi0 import cli
from lerobot_pi0.control.trace import read_trace
from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.flags import ControlPolicyFlags
from lerobot_pi0.serving import messages, policy_server, serve, served_policy
from lerobot_pi0.serving.serve import ServeConfig, main, serving

wire: Any = services_pb2
JOINTS = [f"joint_{i}.pos" for i in range(STATE)]
PICTURE = (48, 64, 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_arm(tmp_path_factory.mktemp("checkpoint") / "arm")


def save_arm(folder: Path, model: str = "pi0") -> Path:
    """A policy of a robot with one camera, whose actions are called like its joints."""
    policy = tiny_policy(
        model,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (STATE,))},
        state_feature_names=JOINTS,
        action_feature_names=JOINTS,
    )
    policy.save_pretrained(folder)
    known = statistics()["observation.state"]
    stats = {"observation.state": known, "action": known}
    for pipeline in make_pre_post_processors(policy.config, dataset_stats=stats):
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A client without a call is gone at once, so that each test can have its own."""
    monkeypatch.setattr(policy_server, "WAIT", 0.05)
    monkeypatch.setattr(policy_server, "PAUSE", 0.0)
    monkeypatch.setattr(policy_server, "SILENCE", 0.0)


@pytest.fixture(scope="module")
def port(checkpoint) -> Iterator[int]:
    """A server with its policy loaded, which all tests of the module try to bring down."""
    with serving(ServeConfig(ControlPolicyFlags(path=str(checkpoint)), port=0)) as port:
        yield port


@dataclass
class Client:
    """The calls of LeRobot's robot client, one by one."""

    port: int

    def __post_init__(self):
        # Within a process channels share a connection, unless they are told to have their own.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}", options)
        self.stub = services_pb2_grpc.AsyncInferenceStub(self.channel)

    def greet(self, checkpoint: Any, **changes: Any) -> "Client":
        self.stub.Ready(wire.Empty())
        self.stub.SendPolicyInstructions(
            wire.PolicySetup(data=pickle.dumps(instructions(checkpoint, **changes)))
        )
        return self

    def send(self, observation: Any) -> None:
        data = observation if isinstance(observation, bytes) else pickle.dumps(observation)
        self.stub.SendObservations(send_bytes_in_chunks(data, wire.Observation))

    def actions(self) -> list[TimedAction]:
        data = self.stub.GetActions(wire.Empty()).data
        return pickle.loads(data) if data else []

    def is_answered(self, timestep: int) -> bool:
        self.send(observed(timestep))
        return [action.timestep for action in self.actions()] == list(range(timestep, timestep + 4))

    def close(self) -> None:
        self.channel.close()


@pytest.fixture
def client(port) -> Iterator[Client]:
    client = Client(port)
    yield client
    client.close()


@pytest.fixture
def robot(client, checkpoint) -> Client:
    """A client that has shaken hands."""
    return client.greet(checkpoint)


def instructions(checkpoint: Any, **changes: Any) -> RemotePolicyConfig:
    settings: dict[str, Any] = {
        "policy_type": "lerobot_pi0",
        "pretrained_name_or_path": str(checkpoint),
        "lerobot_features": features(),
        "actions_per_chunk": 4,
        "device": "cpu",
    }
    return RemotePolicyConfig(**settings | changes)


def features(joints: list[str] = JOINTS, **cameras: tuple[int, int, int]) -> dict[str, Any]:
    """As LeRobot's client describes a robot."""
    return {
        "observation.state": {"dtype": "float32", "shape": (len(joints),), "names": list(joints)},
        **{
            f"observation.images.{name}": {"dtype": "image", "shape": shape, "names": ["h", "w", "c"]}
            for name, shape in (cameras or {"front": PICTURE}).items()
        },
    }


def observed(timestep: int = 0, changes: Any = None, must_go: bool = False) -> TimedObservation:
    raw: dict[str, Any] = {name: 0.1 * i for i, name in enumerate(JOINTS)}
    raw |= {"front": np.full(PICTURE, 100, np.uint8), "task": "push"} | (changes or {})
    raw = {name: value for name, value in raw.items() if value is not LEFT_OUT}
    return TimedObservation(time.time(), timestep, raw, must_go)


LEFT_OUT = object()


def status(call: Any, *arguments: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as raised:
        call(*arguments)
    error: Any = raised.value
    return error.code(), error.details()


def test_an_observation_is_answered_with_a_chunk_in_robot_units(robot, checkpoint):
    robot.send(observed(7))
    actions = robot.actions()
    assert [action.timestep for action in actions] == [7, 8, 9, 10]
    assert all(action.action.shape == (STATE,) and action.action.isfinite().all() for action in actions)
    seconds = np.diff([action.timestamp for action in actions])
    np.testing.assert_allclose(seconds, 1 / 30, atol=1e-4)
    # Pickled, an action is itself and not the chunk that it was cut from.
    assert all(action.action.untyped_storage().nbytes() == 4 * STATE for action in actions)


def test_actions_are_those_that_the_policy_gives(robot, checkpoint):
    from lerobot_pi0.inputs.policy import PolicyFlags, load_policy

    loaded = load_policy(PolicyFlags(str(checkpoint)))
    picture = np.random.default_rng(0).integers(0, 256, PICTURE, dtype=np.uint8)
    message = observed(0, {"front": picture})
    batch = {
        "observation.images.front": torch.tensor(picture).permute(2, 0, 1) / 255,
        "observation.state": torch.tensor([message.observation[name] for name in JOINTS]),
        "task": "push",
    }
    torch.manual_seed(3)
    wanted = loaded.postprocess(loaded.policy.predict_action_chunk(loaded.preprocess(batch)))[0, :4]
    robot.send(message)
    torch.manual_seed(3)
    torch.testing.assert_close(torch.stack([action.action for action in robot.actions()]), wanted)


def test_a_policy_of_pi05_is_served_to_a_client_that_asks_for_one(tmp_path):
    folder = save_arm(tmp_path / "arm", "pi05")
    with serving(ServeConfig(ControlPolicyFlags(path=str(folder)), port=0)) as port:
        client = Client(port)
        code, message = status(lambda: client.greet(folder))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "is of type 'lerobot_pi05', and the client asks for 'lerobot_pi0'" in message
        assert client.greet(folder, policy_type="lerobot_pi05").is_answered(7)
        client.close()


def test_without_an_observation_there_are_no_actions_and_no_error(robot):
    assert robot.actions() == []


BAD_OBSERVATIONS = {
    "too few joints": (observed(0, {JOINTS[2]: LEFT_OUT}), "no ['joint_2.pos']"),
    "a joint that is no number": (observed(0, {JOINTS[1]: "fast"}), "'joint_1.pos' is a str"),
    "a joint that is many numbers": (observed(0, {JOINTS[1]: np.zeros(3)}), "'joint_1.pos' is a ndarray"),
    "NaN": (observed(0, {JOINTS[0]: float("nan")}), "'joint_0.pos' is not a finite number: nan"),
    "infinity": (observed(0, {JOINTS[4]: np.float32("inf")}), "'joint_4.pos' is not a finite number: inf"),
    "no float32": (observed(0, {JOINTS[4]: 10**60}), "'joint_4.pos' is not a finite number"),
    "no camera": (observed(0, {"front": LEFT_OUT}), "no ['front']"),
    "another size": (
        observed(0, {"front": np.zeros((24, 64, 3), np.uint8)}),
        "(24, 64, 3); the handshake announced",
    ),
    "channels first": (observed(0, {"front": np.zeros((3, 48, 64), np.uint8)}), "(3, 48, 64); the handshake"),
    "grey": (observed(0, {"front": np.zeros((48, 64), np.uint8)}), "gives (48, 64)"),
    "floats": (observed(0, {"front": np.zeros(PICTURE, np.float32)}), "gives float32"),
    "objects": (observed(0, {"front": np.full(PICTURE, None)}), "an array of 'O8': only arrays of numbers"),
    "a picture that is none": (observed(0, {"front": [[0]]}), "gives a list"),
    "no instruction": (observed(0, {"task": LEFT_OUT}), "no ['task']"),
    "an instruction without end": (observed(0, {"task": "go " * 1000}), "has 3,000 characters, more than"),
    "an instruction that is no text": (observed(0, {"task": 3}), "is a int, not a text: --task"),
    "no observation": (TimedObservation(time.time(), 0, None), "a NoneType for its observation"),  # pyrefly: ignore[bad-argument-type]
    "no step": (TimedObservation(time.time(), "one", {}), "a str for its timestep"),  # pyrefly: ignore[bad-argument-type]
    "no time": (TimedObservation(float("nan"), 0, {}), "at time nan"),
    "another message": (instructions("x"), "is a _Instructions, not a TimedObservation"),
    "a dictionary": ({"front": 3}, "is a dict"),
    "no pickle": (b"hello", "the opcode LIST"),
    **{name: (pickled, reason) for name, (pickled, reason) in HARMFUL.items()},
    "half a pickle": (pickle.dumps(observed())[:-400], "does not unpickle"),
    "an unknown class": (pickle.dumps(Path("x")), "names pathlib"),
    "a tensor": (observed(0, {"front": torch.zeros(PICTURE)}), "names torch"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_OBSERVATIONS.values(), ids=BAD_OBSERVATIONS)
def test_no_action_answers_a_bad_observation_but_the_next_good_one_is_answered(robot, bad, reason):
    code, details = status(robot.send, bad)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert reason in details
    assert robot.actions() == []
    # The stock client sends `must_go` once, and then waits for actions.
    assert robot.is_answered(0)


BAD_INSTRUCTIONS = {
    "another policy": ({"policy_type": "act"}, "start it with --policy_type=lerobot_pi0"),
    "another checkpoint": ({"pretrained_name_or_path": "user/other"}, "--pretrained_name_or_path="),
    "no actions": ({"actions_per_chunk": 0}, "--actions_per_chunk must be at least 1"),
    "a word for a number": ({"actions_per_chunk": "all"}, "a str for its actions_per_chunk"),
    "no features": ({"lerobot_features": {}}, "names no joints"),
    "features that are none": ({"lerobot_features": {"observation.state": 3}}, "features that are not"),
    "joints without names": ({"lerobot_features": {"observation.state": {"shape": (5,)}}}, "names no joints"),
    "permuted joints": ({"lerobot_features": features(JOINTS[::-1])}, str(JOINTS[::-1])),
    "renamed joints": ({"lerobot_features": features([*JOINTS[:-1], "gripper.pos"])}, "gripper.pos"),
    "fewer joints": ({"lerobot_features": features(JOINTS[:3])}, str(JOINTS)),
    "another camera": ({"lerobot_features": features(top=PICTURE)}, "looks at ['observation.images.front']"),
    "a depth camera": ({"lerobot_features": features(front=(48, 64, 1))}, "has shape (48, 64, 1)"),
    "no rename_map": ({"rename_map": {"front": ["top"]}}, "a rename_map that is not"),
}


@pytest.mark.parametrize(("changes", "reason"), BAD_INSTRUCTIONS.values(), ids=BAD_INSTRUCTIONS)
def test_a_robot_that_does_not_fit_is_refused_and_the_next_one_served(client, checkpoint, changes, reason):
    code, details = status(lambda: client.greet(checkpoint, **changes))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert reason in details
    code, details = status(client.send, observed())
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "the handshake is not complete" in details
    assert client.greet(checkpoint).is_answered(0)


def test_a_camera_that_the_policy_does_not_know_is_left_out_and_told(client, checkpoint, caplog):
    client.greet(checkpoint, lerobot_features=features(front=PICTURE, top=(480, 640, 3)))
    client.send(observed(0, {"top": "whatever"}))
    assert len(client.actions()) == 4
    assert "does not look at ['observation.images.top']" in caplog.text


def test_cameras_are_renamed_as_the_handshake_says(client, checkpoint):
    names = {"observation.images.top": "observation.images.front"}
    client.greet(checkpoint, lerobot_features=features(top=PICTURE), rename_map=names)
    client.send(observed(0, {"top": np.zeros(PICTURE, np.uint8), "front": LEFT_OUT}))
    assert len(client.actions()) == 4


def test_a_picture_keeps_its_proportions(client, checkpoint, monkeypatch, caplog):
    seen = []
    chunk = served_policy.predict_chunk
    monkeypatch.setattr(
        served_policy,
        "predict_chunk",
        lambda *given: seen.append(given[1]) or chunk(*given),
    )
    client.greet(checkpoint, lerobot_features=features(front=(36, 64, 3)))
    client.send(observed(0, {"front": np.full((36, 64, 3), 255, np.uint8)}))
    assert len(client.actions()) == 4
    assert seen[-1]["observation.images.front"].shape == (1, 3, 36, 64)
    assert "is 64×36, the policy was trained on 64×48" in caplog.text


def test_a_robot_that_moves_little_is_answered_all_the_same(robot):
    """LeRobot's server drops what moved by less than 1 in total, whatever the unit."""
    for timestep in range(3):
        robot.send(observed(timestep, {JOINTS[0]: 0.01 * timestep}))
        assert len(robot.actions()) == 4


def test_a_step_is_answered_once_unless_the_robot_must_go(robot):
    assert robot.is_answered(5)
    robot.send(observed(5))
    assert robot.actions() == []
    robot.send(observed(5, must_go=True))
    assert len(robot.actions()) == 4


def test_the_newest_of_several_observations_counts(robot):
    for timestep in (1, 2, 3):
        robot.send(observed(timestep))
    assert robot.actions()[0].timestep == 3
    assert robot.actions() == []


def test_what_a_robot_sends_while_it_waits_for_actions_is_not_answered_again(robot, monkeypatch):
    robot.send(observed(4, must_go=True))
    chunk = served_policy.predict_chunk

    def meanwhile(*given: Any) -> Any:
        robot.send(observed(4))
        return chunk(*given)

    monkeypatch.setattr(served_policy, "predict_chunk", meanwhile)
    assert robot.actions()[0].timestep == 4
    assert robot.actions() == []


def test_calls_before_the_handshake_are_refused(checkpoint):
    with serving(ServeConfig(any_policy=True, port=0)) as port:
        client = Client(port)
        for call, argument in (
            (client.send, observed()),
            (client.stub.GetActions, wire.Empty()),
            (client.stub.SendPolicyInstructions, wire.PolicySetup(data=b"")),
        ):
            code, details = status(call, argument)
            assert code == grpc.StatusCode.FAILED_PRECONDITION
            assert "start the client again" in details
        assert client.greet(checkpoint).is_answered(0)
        client.close()


class Malicious:
    """What is unpickled calls what it says."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("where", ["handshake", "observation", "within an observation"])
def test_a_pickle_does_not_run_code(robot, tmp_path, where):
    file = tmp_path / "ran"
    data = pickle.dumps(observed(0, {"front": Malicious(file)}) if "within" in where else Malicious(file))
    if where == "handshake":
        code, details = status(robot.stub.SendPolicyInstructions, wire.PolicySetup(data=data))
    else:
        code, details = status(robot.send, data)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "is not called" in details
    assert not file.exists()
    pickle.loads(data)
    assert file.exists()  # elsewhere it would have run


@pytest.mark.parametrize("name", ["lerobot.async_inference.helpers TimedObservation", "numpy dtype"])
def test_a_pickle_does_not_change_what_the_next_one_is_read_with(robot, name):
    module, name = name.split()
    poison = b"c" + f"{module}\n{name}\n".encode() + b"(N}\x8c\x07must_goK\x07stb."
    _, details = status(robot.send, poison)
    assert "cannot be set" in details or "changes a function" in details
    assert robot.is_answered(0)


def test_an_observation_has_a_largest_size(robot, monkeypatch):
    read = messages.read_observation
    monkeypatch.setattr(policy_server, "read_observation", lambda parts, stop: read(parts, stop, limit=5000))
    code, details = status(robot.send, observed())
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "more than 5,000 bytes" in details
    monkeypatch.undo()
    assert robot.is_answered(0)


def test_a_message_beyond_grpcs_own_limit_is_refused(robot):
    code, details = status(robot.stub.SendObservations, iter([wire.Observation(data=bytes(5 * 2**20))]))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in details
    assert robot.is_answered(0)


def test_an_observation_that_breaks_off_is_refused(robot):
    parts = list(
        send_bytes_in_chunks(pickle.dumps(observed(0, {"padding": bytes(3 * 2**20)})), wire.Observation)
    )
    code, details = status(robot.stub.SendObservations, iter(parts[:1]))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "broke off" in details
    assert robot.is_answered(0)


def test_a_client_that_dies_while_it_sends_makes_room_for_the_next(port, checkpoint, monkeypatch):
    dying = Client(port).greet(checkpoint)
    monkeypatch.setattr(policy_server, "SILENCE", 1000.0)
    unfinished, go_on = unfinished_observation(dying, monkeypatch)
    dying.close()
    assert unfinished.code() == grpc.StatusCode.CANCELLED
    restarted = Client(port)
    assert eventually(lambda: restarted.greet(checkpoint)).is_answered(0)
    go_on.set()
    restarted.close()


def unfinished_observation(
    client: Client, monkeypatch: pytest.MonkeyPatch, step: int = 0
) -> tuple[Any, threading.Event]:
    """A call of which the server has read one part, and the event on which the client sends the rest."""
    data = pickle.dumps(observed(step, {"padding": bytes(3 * 2**20)}))
    first, *rest = send_bytes_in_chunks(data, wire.Observation)
    read, begun, go_on = messages.read_observation, threading.Event(), threading.Event()

    def parts() -> Iterator[Any]:
        yield first
        go_on.wait(60)
        yield from rest

    def arriving(requests: Iterator[Any]) -> Iterator[Any]:
        for request in requests:
            begun.set()
            yield request

    with monkeypatch.context() as patch:
        patch.setattr(
            policy_server, "read_observation", lambda requests, stop: read(arriving(requests), stop)
        )
        call = client.stub.SendObservations.future(parts())
        assert begun.wait(60)
    return call, go_on


def test_an_observation_that_is_never_complete_is_given_up_and_the_robot_makes_room(
    port, checkpoint, monkeypatch, caplog
):
    cut_off = Client(port).greet(checkpoint)
    monkeypatch.setattr(policy_server, "SILENCE", 1000.0)
    monkeypatch.setattr(policy_server, "RECEIVE_TIMEOUT", 0.3)
    call, go_on = unfinished_observation(cut_off, monkeypatch)
    assert call.code() == grpc.StatusCode.CANCELLED
    assert "was not complete after 0.3 s" in caplog.text
    restarted = Client(port)
    assert eventually(lambda: restarted.greet(checkpoint)).is_answered(0)
    go_on.set()
    restarted.close()
    cut_off.close()


def test_unfinished_observations_leave_room_for_answers(robot, monkeypatch):
    unfinished = [unfinished_observation(robot, monkeypatch) for _ in range(policy_server.MAX_STREAMS)]
    code, details = status(robot.send, observed(1))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "are arriving already" in details
    assert robot.actions() == []
    for call, go_on in unfinished:
        go_on.set()
        call.result()
    assert robot.is_answered(1)


def test_an_older_observation_that_is_complete_later_does_not_replace_a_newer_one(robot, monkeypatch):
    call, go_on = unfinished_observation(robot, monkeypatch, step=3)
    robot.send(observed(8))
    go_on.set()
    call.result()
    assert robot.actions()[0].timestep == 8
    robot.send(observed(3, must_go=True))  # older than what was answered
    assert robot.actions() == []


def test_a_checkpoint_does_not_run_code(checkpoint, tmp_path):
    harmful = shutil.copytree(checkpoint, tmp_path / "harmful")
    file = harmful / "policy_preprocessor.json"
    described = json.loads(file.read_text())
    described["steps"].insert(0, {"class": "pathlib.Path.touch", "config": {"self": str(tmp_path / "ran")}})
    file.write_text(json.dumps(described))
    with serving(ServeConfig(any_policy=True, port=0)) as port:
        client = Client(port)
        code, details = status(lambda: client.greet(harmful))
        client.close()
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "names the step 'pathlib.Path.touch', which is not loaded" in details
    assert not (tmp_path / "ran").exists()


def test_a_server_without_a_policy_is_asked_for_by_name(checkpoint, caplog):
    with pytest.raises(UserError, match="--any_policy=true"):
        ServeConfig(port=0)
    with pytest.raises(UserError, match="in place of"):
        ServeConfig(ControlPolicyFlags(path=str(checkpoint)), any_policy=True)
    with serving(ServeConfig(any_policy=True, port=0)):
        assert "names the checkpoint, and has this machine load any folder" in caplog.text


def test_what_a_client_writes_reaches_the_log_without_control_characters(client, checkpoint, caplog):
    policy_type = "act\x1b[2J\nfake line" + "x" * 100_000
    code, _ = status(lambda: client.greet(checkpoint, policy_type=policy_type))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "act\\x1b[2J\n    fake line" in caplog.text
    assert "\x1b" not in caplog.text
    assert max(len(record.getMessage()) for record in caplog.records) < 5000


def test_one_robot_at_a_time(robot, port, checkpoint, monkeypatch):
    monkeypatch.setattr(policy_server, "SILENCE", 1000.0)
    second = Client(port)
    assert robot.is_answered(0)
    for call in (lambda: second.greet(checkpoint), lambda: second.send(observed(1)), second.actions):
        code, details = status(call)
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "one robot at a time" in details
    assert robot.is_answered(1)
    second.close()


def watch_get_actions(
    monkeypatch: pytest.MonkeyPatch, first: Callable[[grpc.ServicerContext], None] = lambda _: None
) -> tuple[threading.Event, threading.Event]:
    """Events of servers that start later: a call of GetActions has reached one, a call has ended there.

    `first` is called with the call's context before the server begins with it.
    """
    begun, ended = threading.Event(), threading.Event()
    answer = policy_server.PolicyServer.GetActions

    def watched(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        begun.set()
        first(context)
        try:
            return answer(self, request, context)
        finally:
            ended.set()

    monkeypatch.setattr(policy_server.PolicyServer, "GetActions", watched)
    return begun, ended


def until_cancelled(context: grpc.ServicerContext) -> None:
    while context.is_active():
        time.sleep(0.01)


@pytest.mark.parametrize("first", [lambda _: None, until_cancelled], ids=["waits", "has no thread yet"])
def test_a_client_that_is_killed_while_it_waits_makes_room(checkpoint, monkeypatch, first):
    monkeypatch.setattr(policy_server, "SILENCE", 1000.0)
    begun, _ = watch_get_actions(monkeypatch, first)
    with serving(ServeConfig(ControlPolicyFlags(path=str(checkpoint)), port=0)) as port:
        killed, second = Client(port).greet(checkpoint), Client(port)
        monkeypatch.setattr(policy_server, "WAIT", 1000.0)
        waiting = killed.stub.GetActions.future(wire.Empty())
        assert begun.wait(60)
        killed.close()
        assert waiting.code() == grpc.StatusCode.CANCELLED
        eventually(lambda: second.greet(checkpoint))
        second.close()


def test_a_call_of_a_broken_connection_that_ends_late_does_not_lose_a_robot_that_has_come_back(
    checkpoint, monkeypatch, tmp_path
):
    monkeypatch.setattr(policy_server, "SILENCE", 1000.0)
    computing, go_on = threading.Event(), threading.Event()
    _, ended = watch_get_actions(monkeypatch)
    chunk = served_policy.predict_chunk

    def slow(*given: Any) -> Any:
        computing.set()
        go_on.wait(60)
        return chunk(*given)

    flags = ControlPolicyFlags(path=str(checkpoint))
    with serving(ServeConfig(flags, port=0, trace=tmp_path)) as port:
        monkeypatch.setattr(served_policy, "predict_chunk", slow)
        robot, again, other = Client(port).greet(checkpoint), Client(port), Client(port)
        robot.send(observed(0))
        late = robot.stub.GetActions.future(wire.Empty())
        assert computing.wait(60)
        robot.close()
        assert late.code() == grpc.StatusCode.CANCELLED
        eventually(lambda: again.send(observed(1)))  # refused until the server knows of the broken connection
        go_on.set()
        assert ended.wait(60)
        assert status(lambda: other.greet(checkpoint))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert again.actions()[0].timestep == 1
        again.close()
        other.close()
    stops = [event["why"] for event in read_trace(tmp_path) if event["event"] == "stop"]
    assert stops == ["the client is gone", "the server stops"]


def test_a_client_that_falls_silent_makes_room(robot, port, checkpoint):
    second = Client(port).greet(checkpoint)
    assert second.is_answered(0)
    second.close()


def test_a_robot_whose_connection_broke_goes_on(robot, port):
    assert robot.is_answered(0)
    robot.close()
    again = Client(port)
    assert again.is_answered(1)
    again.close()


def eventually(call: Any) -> Any:
    """What it returns once it raises no error of gRPC any more."""
    for _ in range(600):
        try:
            return call()
        except grpc.RpcError:
            time.sleep(0.05)
    return call()


def test_actions_that_are_not_finite_are_not_sent(robot, monkeypatch):
    chunk = served_policy.predict_chunk
    monkeypatch.setattr(served_policy, "predict_chunk", lambda *given: chunk(*given) * float("nan"))
    robot.send(observed(0, must_go=True))
    code, details = status(robot.actions)
    assert code == grpc.StatusCode.INTERNAL
    assert "not finite: nothing is sent" in details
    monkeypatch.undo()
    assert robot.is_answered(0)


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The checkpoints that are read."""
    paths: list[str] = []
    load = served_policy.load_policy
    monkeypatch.setattr(served_policy, "load_policy", lambda flags: paths.append(flags.path) or load(flags))
    return paths


def test_the_client_names_the_checkpoint_where_the_server_does_not(checkpoint, tmp_path, loads):
    with serving(ServeConfig(any_policy=True, port=0)) as port:
        client = Client(port)
        for name, reason in (
            (tmp_path / "nowhere", "there is no folder"),
            (tmp_path, "has no config.json"),
            ("user/unknown", "cannot be downloaded"),
        ):
            code, details = status(lambda name=name: client.greet(name))
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert reason in details
        (tmp_path / "config.json").write_text(json.dumps({"type": "act"}))
        assert "is a policy of type 'act'" in status(lambda: client.greet(tmp_path))[1]
        assert "no device 'gpu'" in status(lambda: client.greet(checkpoint, device="gpu"))[1]
        assert client.greet(checkpoint).is_answered(0)
        assert client.greet(checkpoint).is_answered(0)
        client.close()
    assert loads == [str(checkpoint)]  # once, for both


def test_the_servers_flags_come_before_what_the_client_asks_for(checkpoint):
    flags = ControlPolicyFlags(device="cpu", num_inference_steps=3)
    with serving(ServeConfig(flags, any_policy=True, port=0)) as port:
        client = Client(port).greet(checkpoint, device="cuda")
        assert client.is_answered(0)
        client.close()
    policy = served_policy.ServedPolicy(flags)
    assert policy.load(str(checkpoint), "cuda").config.num_inference_steps == 3
    policy.close()


def test_adapters_are_served_over_their_base(tmp_path):
    from lerobot.configs.default import PeftConfig

    tiny_policy().save_pretrained(tmp_path / "base")
    base = type(tiny_policy()).from_pretrained(tmp_path / "base")
    wrapped: Any = base.wrap_with_peft(peft_cli_overrides=vars(PeftConfig(r=2)))
    wrapped.save_pretrained(tmp_path / "adapters")
    wrapped.config.save_pretrained(tmp_path / "adapters")
    for pipeline in make_pre_post_processors(wrapped.config, dataset_stats=statistics()):
        pipeline.save_pretrained(tmp_path / "adapters")
    with serving(ServeConfig(ControlPolicyFlags(str(tmp_path / "adapters")), port=0)) as port:
        client = Client(port).greet(tmp_path / "adapters")
        assert client.is_answered(0)
        client.close()


def test_each_answered_observation_is_in_the_trace(checkpoint, tmp_path):
    flags = ControlPolicyFlags(path=str(checkpoint))
    with serving(ServeConfig(flags, port=0, fps=20, trace=tmp_path)) as port:
        client = Client(port).greet(checkpoint)
        assert client.is_answered(0)
        with pytest.raises(grpc.RpcError):
            client.send(observed(1, {JOINTS[0]: float("nan")}))
        client.send(observed(3))
        actions = [action.action.tolist() for action in client.actions()]
    client.close()
    start, first, second, stop = read_trace(tmp_path)
    assert (start["event"], start["kind"], start["fps"], start["joints"]) == ("start", "async", 20, JOINTS)
    assert first["event"] == second["event"] == "inference"
    assert (second["step"], second["actions"]) == (3, actions)
    assert first["observed"] < first["began"] < first["ended"] < second["observed"] < second["began"]
    assert (stop["event"], stop["why"]) == ("stop", "the server stops")


def test_the_first_chunk_of_a_robot_is_not_the_first_of_the_policy(checkpoint, monkeypatch):
    chunks = []
    chunk = served_policy.predict_chunk
    monkeypatch.setattr(served_policy, "predict_chunk", lambda *given: chunks.append(given) or chunk(*given))
    with serving(ServeConfig(ControlPolicyFlags(path=str(checkpoint)), port=0)):
        assert chunks


def test_the_port_of_another_server_is_an_error_with_a_way_out(port, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lerobot-pi0", "serve", "--any_policy", f"--port={port}"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_a_checkpoint_that_is_missing_is_an_error_at_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lerobot-pi0", "serve", "--port=0", f"--policy.path={tmp_path}/none"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "there is no folder" in capsys.readouterr().err


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request) -> Iterator[int]:
    """A signal that fails the test, and does not end pytest, where the server does not handle it."""

    def unhandled(number: int, _: Any) -> None:
        raise AssertionError(f"{signal.Signals(number).name} reached the test")

    before = signal.signal(request.param, unhandled)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_ends_the_server_and_frees_its_port(monkeypatch, number):
    handler, ports = signal.getsignal(number), []

    def stop(port: int) -> None:
        client = Client(port)
        with contextlib.suppress(grpc.RpcError):
            client.stub.Ready(wire.Empty(), timeout=60)
            ports.append(port)
        client.close()
        os.kill(os.getpid(), number)

    @contextlib.contextmanager
    def stopped_when_it_answers(config: ServeConfig) -> Iterator[int]:
        with serving(config) as port:
            thread = threading.Thread(target=stop, args=(port,))
            thread.start()
            try:
                yield port
            finally:
                thread.join()

    monkeypatch.setattr(serve, "serving", stopped_when_it_answers)
    said = main(ServeConfig(any_policy=True, port=0))
    assert said == f"{signal.Signals(number).name}: the server has stopped"
    assert signal.getsignal(number) is handler
    (port,) = ports
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize(("host", "warns"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_an_address_that_others_reach_is_warned_about(caplog, host, warns):
    with serving(ServeConfig(any_policy=True, host=host, port=0)):
        assert ("there is no password" in caplog.text) == warns


def test_without_grpc_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "grpc", None)
    what = r"pip install 'lerobot-policy-pi0\[async\]'"
    with pytest.raises(RuntimeError, match=what), serving(ServeConfig(any_policy=True, port=0)):
        pass


def test_a_package_that_the_policy_needs_and_is_missing_is_told(robot, checkpoint, monkeypatch):
    """As LeRobot tells it; an import that fails in any other way is a fault of the server."""

    def load(*_: Any) -> Any:
        require_package("no_such_package", extra="peft")

    monkeypatch.setattr(served_policy, "read_config", load)
    code, details = status(lambda: robot.greet(checkpoint))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "pip install 'lerobot[peft]'" in details
    monkeypatch.setattr(served_policy, "read_config", lambda *_: __import__("no_such_package"))
    assert status(lambda: robot.greet(checkpoint))[0] == grpc.StatusCode.UNKNOWN
    monkeypatch.undo()
    assert robot.greet(checkpoint).is_answered(0)


def test_the_trace_of_another_server_is_not_written_over(tmp_path, monkeypatch, capsys):
    (tmp_path / "policy.jsonl").write_text("{}\n")
    monkeypatch.setattr(
        "sys.argv", ["lerobot-pi0", "serve", "--any_policy", "--port=0", f"--trace={tmp_path}"]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "is the trace of another run: give another --trace" in capsys.readouterr().err
    assert (tmp_path / "policy.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("ahead", [-2.5, 0.0, 2.5, 1e6])
def test_the_age_of_an_observation_does_not_depend_on_the_robots_clock(monkeypatch, ahead):
    """Of observations that are taken at 0, 1, 2, … seconds and are 10 ms or more on the way."""
    session = policy_server.Session("ipv4:127.0.0.1:1")
    now = [0.0]
    monkeypatch.setattr(policy_server.time, "monotonic", lambda: now[0])
    ages = []
    for second, way in enumerate([0.05, 0.01, 0.01, 0.25, 0.02]):
        now[0] = second + way
        ages.append(now[0] - session.taken(second + ahead))
    np.testing.assert_allclose(ages, [0, 0, 0, 0.24, 0.01], atol=1e-6)


def test_a_clock_that_is_set_while_a_robot_is_served_spoils_the_age_for_a_while_alone(monkeypatch):
    session = policy_server.Session("ipv4:127.0.0.1:1")
    now = [0.0]
    monkeypatch.setattr(policy_server.time, "monotonic", lambda: now[0])
    ages = []
    for step in range(2 * policy_server.LATELY + 10):
        now[0] = step / 10
        ages.append(now[0] - session.taken(now[0] - (3.0 if step > 10 else 0.0)))
    assert ages[11] == pytest.approx(3.0)
    assert ages[-1] == pytest.approx(0.0)


@dataclass
class Tunnel:
    """A TCP connection to the server that can be cut without a word, as by a lost network: nothing that is
    sent arrives any more, and neither side is told.
    """

    to: int

    def __post_init__(self):
        self.is_cut, self.sockets = threading.Event(), [socket.create_server(("127.0.0.1", 0))]
        self.port = self.sockets[0].getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in self.sockets:
            each.close()

    def _accept(self) -> None:
        client = self.sockets[0].accept()[0]
        server = socket.create_connection(("127.0.0.1", self.to))
        self.sockets += [client, server]
        for pair in ((client, server), (server, client)):
            threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self.is_cut.is_set():
                    target.sendall(data)


def with_short_limits(options: dict[str, int]) -> dict[str, int]:
    """All of a connection's limits in milliseconds, a fifth: a busy machine still answers pings in time."""
    return {name: value // 5 if name.endswith("_ms") else value for name, value in options.items()}


def test_a_robot_whose_network_is_lost_makes_room(checkpoint, monkeypatch):
    """It waits for actions, as it does most of the time; no packet says that it is gone."""
    monkeypatch.setattr(policy_server, "SILENCE", 1000.0)
    monkeypatch.setattr(policy_server, "WAIT", 1000.0)
    monkeypatch.setattr(serve, "OPTIONS", with_short_limits(serve.OPTIONS))
    begun, _ = watch_get_actions(monkeypatch)
    with serving(ServeConfig(ControlPolicyFlags(path=str(checkpoint)), port=0)) as port:
        tunnel = Tunnel(port)
        lost = Client(tunnel.port).greet(checkpoint)
        assert lost.is_answered(0)
        begun.clear()
        waiting = lost.stub.GetActions.future(wire.Empty())
        assert begun.wait(60)
        second = Client(port)
        assert status(lambda: second.greet(checkpoint))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        tunnel.is_cut.set()
        assert eventually(lambda: second.greet(checkpoint)).is_answered(0)
        assert not waiting.done()  # for all that it knows, the server is there
        second.close()
        lost.close()
        tunnel.close()


def test_a_connection_that_says_nothing_is_closed(checkpoint, monkeypatch):
    """A client that begins as HTTP/2 does, and then answers no ping."""
    monkeypatch.setattr(serve, "OPTIONS", with_short_limits(serve.OPTIONS))
    with (
        serving(ServeConfig(any_policy=True, port=0)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=30) as connection,
    ):
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        while connection.recv(65536):  # until the server closes it; TimeoutError if it does not
            pass
