"""LeRobot's protocol of async inference, served: its robot client drives a robot with this policy unmodified.

LeRobot's own server takes no plugin, unpickles whatever it is sent, and answers every error with nothing: the
robot waits, without a reason. This one speaks the same protocol:

    Ready, SendPolicyInstructions   the handshake: a robot describes itself, and names a checkpoint
    SendObservations                at each control step while it is short of actions; the newest one counts
    GetActions                      waits for an observation and answers with a chunk

Whatever is wrong is refused with the reason as gRPC's status, which the client logs, and stands in the
server's log; the server goes on. One robot is served at a time.
"""

import functools
import logging
import math
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from lerobot.async_inference.helpers import TimedAction
from lerobot.transport import services_pb2
from torch import Tensor

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.control.trace import Trace
from lerobot_pi0.errors import UserError, printable
from lerobot_pi0.serving.messages import BrokenOffError, read_instructions, read_observation
from lerobot_pi0.serving.remote_robot import RemoteRobot, check_robot
from lerobot_pi0.serving.served_policy import ServedPolicy

logger = logging.getLogger(__name__)

wire: Any = services_pb2  # its classes are made when it is imported, where no type checker sees them

WAIT = 2.0  # seconds until GetActions answers that there is no observation, as in LeRobot's server
SILENCE = 5.0  # seconds after which a client that does not call is gone; the stock one calls all the time
LATELY = 200  # observations that a robot's clock is estimated from
RECEIVE_TIMEOUT = 10.0  # seconds after which an observation that is not complete is given up
MAX_STREAMS = 3  # observations that may be arriving at once; five of the eight threads are left for answers
PAUSE = 1.0  # seconds before an error answers GetActions: the stock client asks again at once


class RefusedError(UserError):
    """A call that is not answered, because of who calls or when."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code = code


@dataclass
class Observed:
    """An observation that waits for the policy."""

    timestep: int  # the action that the robot was at
    timestamp: float  # of its own clock, time.time()
    taken: float  # time.monotonic() of this machine
    must_go: bool
    batch: dict[str, Any]

    @property
    def age(self) -> tuple[int, float]:
        """The larger, the newer: of two observations of one robot."""
        return self.timestep, self.timestamp


@dataclass
class Session:
    """What is known of the robot that is being served."""

    peer: str
    robot: RemoteRobot | None = None  # from the handshake's second half on
    newest: Observed | None = None
    answered: tuple[int, float] = (-1, -math.inf)  # the newest timestep, and when it was observed
    num_chunks: int = 0
    calls: int = 0  # in progress
    last_call: float = field(default_factory=time.monotonic)
    lost: bool = False  # a call ended before it was answered
    # By how much this machine's clock is ahead of the robot's, with the way of each of the last observations.
    ahead: deque[float] = field(default_factory=lambda: deque(maxlen=LATELY))

    @property
    def is_there(self) -> bool:
        return not self.lost and (self.calls > 0 or time.monotonic() - self.last_call < SILENCE)

    def taken(self, timestamp: float) -> float:
        """When an observation that has just come was taken, on the monotonic clock of this machine.

        The robot's clock may be any, and where it stands does not show: a tunnel ends at this machine. So the
        one that came fastest lately is taken to have come at once.
        """
        self.ahead.append(time.monotonic() - timestamp)
        return timestamp + min(self.ahead)


def _reports_errors(method: Callable[..., Any]) -> Callable[..., Any]:
    """An error is sent to the client, as gRPC's status, and logged."""

    @functools.wraps(method)
    def answer(self: "PolicyServer", request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(self, request, context)
        except RefusedError as error:
            code, message = error.code, str(error)
        except (OSError, ValueError) as error:
            code, message = grpc.StatusCode.INVALID_ARGUMENT, str(error)
        except ImportError as error:  # a package is missing that the policy needs
            if "pip install" not in str(error):
                raise
            code, message = grpc.StatusCode.FAILED_PRECONDITION, str(error)
        except RuntimeError as error:
            code, message = grpc.StatusCode.INTERNAL, str(error)
        except grpc.RpcError:  # the client went while it was sending
            return wire.Empty()
        if not context.is_active():  # the call was given up
            return wire.Empty()
        self._log_error(context.peer(), message)
        if method.__name__ == "GetActions":
            self._stopped.wait(PAUSE)
        # A status travels in a header, and those have 8 kB.
        return context.abort(code, message[:4000])

    return answer


class PolicyServer:
    """The service that `add_AsyncInferenceServicer_to_server` takes."""

    def __init__(self, policy: ServedPolicy, fps: float, trace: Trace | None = None):
        self._policy, self._fps, self._trace = policy, fps, trace
        self._session: Session | None = None
        self._changed = threading.Condition()  # guards all sessions
        self._stopped = threading.Event()
        self._last_error: tuple[str, float] = ("", 0.0)
        self._streams = 0  # observations that are arriving

    @_reports_errors
    def Ready(self, request: Any, context: grpc.ServicerContext) -> Any:
        """A client begins: what was left of the one before is forgotten."""
        with self._changed:
            self._refuse_second(context.peer())
            self._end("another client begins")
            self._session = Session(context.peer())
            self._changed.notify_all()
        return wire.Empty()

    @_reports_errors
    def SendPolicyInstructions(self, request: Any, context: grpc.ServicerContext) -> Any:
        """The robot, and the checkpoint that it wants: loaded, unless it is, and checked against it."""
        with self._call(context) as session:
            instructions = read_instructions(request.data)
            loaded = self._policy.load(
                instructions.pretrained_name_or_path, instructions.device, instructions.policy_type
            )
            if loaded.config.device != instructions.device:
                logger.info(
                    "the policy runs on '%s', where the server has it; the client's --policy_device=%s has "
                    "no effect",
                    loaded.config.device,
                    printable(instructions.device),
                )
            session.robot = check_robot(instructions, loaded)
            logger.info("%s: a robot with the joints %s", session.peer, list(session.robot.joints))
            self._trace_start(session.robot, loaded.config)
        return wire.Empty()

    @_reports_errors
    def SendObservations(self, request_iterator: Any, context: grpc.ServicerContext) -> Any:
        """Keep an observation for GetActions, in place of an older one that still waits.

        LeRobot's server drops those whose joints moved by less than 1, all together, in whatever unit they
        have: a robot in radians then stops at the end of every chunk. Only what was answered is dropped here.
        """
        with self._call(context) as session:
            robot = _greeted(session)
            with self._receiving(session, context):
                message = read_observation(request_iterator, self._stopped)
            with self._changed:
                taken = session.taken(message.timestamp)
            observed = Observed(
                message.timestep,
                message.timestamp,
                taken,
                message.must_go,
                robot.observation(message.observation),
            )
            with self._changed:
                waiting = session.newest
                is_new = observed.timestep > session.answered[0] or (
                    observed.must_go and observed.age > session.answered
                )
                # One that was sent later may be complete earlier.
                if is_new and (waiting is None or observed.age >= waiting.age):
                    session.newest = observed
                    self._changed.notify_all()
        return wire.Empty()

    @_reports_errors
    def GetActions(self, request: Any, context: grpc.ServicerContext) -> Any:
        """A chunk for the newest observation, or nothing if none comes."""
        with self._call(context) as session:
            robot = _greeted(session)
            with self._changed:
                self._changed.wait_for(lambda: session.newest or not self._serves(session), WAIT)
                observed, session.newest = session.newest, None
            if observed is None or not self._serves(session):
                return wire.Actions()
            began = time.monotonic()
            is_first = session.num_chunks == 0
            actions = self._policy.predict(observed.batch, robot.actions_per_chunk, is_first)
            ended = time.monotonic()
            with self._changed:
                session.answered = max(session.answered, observed.age)
                waiting = session.newest
                if waiting and not waiting.must_go and waiting.timestep <= session.answered[0]:
                    session.newest = None  # the robot stood still while it waited for these actions
                session.num_chunks += 1
            self._record(session, observed, actions, began, ended)
            return wire.Actions(data=pickle.dumps(self._timed(observed, actions)))

    def close(self) -> None:
        """End the session; calls that wait return."""
        self._stopped.set()
        with self._changed:
            self._end("the server stops")
            self._changed.notify_all()

    def _serves(self, session: Session) -> bool:
        return session is self._session and not session.lost and not self._stopped.is_set()

    def _refuse_second(self, peer: str) -> None:
        """One robot at a time: the actions of one are for no other."""
        session = self._session
        if session is not None and session.peer != peer and session.is_there:
            raise RefusedError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"this server drives one robot at a time, and the one at {session.peer} is there: stop that "
                "client, or start another server on another --port",
            )

    @contextmanager
    def _call(self, context: grpc.ServicerContext) -> Iterator[Session]:
        """The session that a call belongs to. It is there for as long as the call lasts."""
        peer, returned = context.peer(), threading.Event()
        with self._changed:
            self._refuse_second(peer)
            session = self._session
            # A client whose connection broke comes back from the same host by another port.
            if session is None or _host(session.peer) != _host(peer):
                raise RefusedError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "this server does not know this robot, there was no handshake (was the server started "
                    "anew?): start the client again",
                )
            session.peer, session.lost = peer, False
            session.calls += 1
        if not context.add_callback(lambda: None if returned.is_set() else self._lose(session, peer)):
            self._lose(session, peer)  # the call was over before it began here
        try:
            yield session
        finally:
            returned.set()
            with self._changed:
                session.calls -= 1
                session.last_call = time.monotonic()
            # When a call is cancelled that reads observations, gRPC wakes the method first and runs callbacks
            # later: this one then finds that the method has returned. Without this check a client that is
            # gone would keep others out until SILENCE has passed.
            if not context.is_active():
                self._lose(session, peer)

    @contextmanager
    def _receiving(self, session: Session, context: grpc.ServicerContext) -> Iterator[None]:
        """While an observation arrives. Few may at once, and each has a time limit: each holds a thread."""
        with self._changed:
            if self._streams >= MAX_STREAMS:
                raise RefusedError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"{MAX_STREAMS} observations are arriving already: send the next one after them",
                )
            self._streams += 1
        peer = context.peer()
        call: Any = context  # `cancel` is not declared

        def give_up() -> None:
            self._log_error(
                peer,
                f"an observation was not complete after {RECEIVE_TIMEOUT:g} s: the connection is too slow, "
                "or cut",
            )
            self._lose(session, peer)
            call.cancel()

        timer = threading.Timer(RECEIVE_TIMEOUT, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        except BrokenOffError:
            self._lose(session, peer)
            raise
        finally:
            timer.cancel()
            with self._changed:
                self._streams -= 1

    def _lose(self, session: Session, peer: str) -> None:
        """A call of `peer` ended unanswered. The robot may have come back by another port since."""
        with self._changed:
            if session is self._session and session.peer == peer and not session.lost:
                session.lost = True
                logger.info("%s is gone, after %d chunks", session.peer, session.num_chunks)
                self._trace_stop(session, "the client is gone")
                self._changed.notify_all()

    def _end(self, why: str) -> None:
        if self._session is not None and not self._session.lost:
            self._trace_stop(self._session, why)
        self._session = None

    def _timed(self, observed: Observed, actions: Tensor) -> list[TimedAction]:
        # Each with memory of its own: pickled, a row of a chunk takes the whole chunk along.
        return [
            TimedAction(observed.timestamp + i / self._fps, observed.timestep + i, action.clone())
            for i, action in enumerate(actions)
        ]

    def _record(
        self, session: Session, observed: Observed, actions: Tensor, began: float, ended: float
    ) -> None:
        logger.debug("chunk for step %d: %.0f ms", observed.timestep, 1000 * (ended - began))
        if session.num_chunks > 1 and (ended - began) * self._fps > len(actions):
            self._log_error(
                session.peer,
                f"a chunk takes {ended - began:.2f} s and lasts {len(actions) / self._fps:.2f} s: the robot "
                "waits. Ask for more actions (--actions_per_chunk of the client), or take fewer steps "
                "(--policy.num_inference_steps), a lower fps or a faster device",
            )
        if self._trace is not None:
            self._trace.write(
                "inference",
                observed=observed.taken,
                began=began,
                ended=ended,
                step=observed.timestep,
                actions=actions.tolist(),
            )

    def _trace_start(self, robot: RemoteRobot, config: Pi0Config) -> None:
        if self._trace is not None:
            self._trace.write(
                "start",
                kind="async",
                fps=self._fps,
                joints=list(config.action_feature_names or robot.joints),
                chunk_size=robot.actions_per_chunk,
            )

    def _trace_stop(self, session: Session, why: str) -> None:
        if self._trace is not None and session.robot is not None:
            self._trace.write("stop", why=why)

    def _log_error(self, peer: str, message: str) -> None:
        """Log an error; one that comes again and again, as with every observation, every few seconds."""
        last, when = self._last_error
        if message != last or time.monotonic() - when >= SILENCE:
            self._last_error = (message, time.monotonic())
            logger.error("%s: %s", peer, printable(message))


def _host(peer: str) -> str:
    return peer.rpartition(":")[0]


def _greeted(session: Session) -> RemoteRobot:
    if session.robot is None:
        raise RefusedError(
            grpc.StatusCode.FAILED_PRECONDITION,
            "the handshake is not complete, no policy was asked for: start the client again",
        )
    return session.robot
