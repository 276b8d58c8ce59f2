"""A policy for robots on other machines, by LeRobot's async inference: this is the server, and LeRobot's
`python -m lerobot.async_inference.robot_client` stands at the robot.
"""

import ipaddress
import logging
import queue
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lerobot_pi0.control.trace import Trace, new_policy_trace
from lerobot_pi0.errors import CommandError, UnavailableError, UserError
from lerobot_pi0.inputs.policy import ControlPolicyFlags

logger = logging.getLogger(__name__)


@dataclass
class ServeConfig:
    """Serve a policy to LeRobot's async robot client, until Ctrl-C.

    At the robot: python -m lerobot.async_inference.robot_client --policy_type=lerobot_pi0
    --server_address=HOST:PORT --pretrained_name_or_path=CHECKPOINT --actions_per_chunk=50 --robot.type=…
    CHECKPOINT is the server's --policy.path; without that, one that the server finds, on the client's
    --policy_device.
    """

    policy: ControlPolicyFlags = field(default_factory=ControlPolicyFlags)
    # Address to listen on. There is no password: leave it at this machine, and come from another one through
    # `ssh -L 8080:127.0.0.1:8080`.
    host: str = "127.0.0.1"
    # Port to listen on; 0 is any that is free.
    port: int = 8080
    # Actions per second of the robot, as its client has it.
    fps: int = 30
    # Folder for policy.jsonl: each answered observation, for `lerobot-pi0 trace`. It has none yet.
    trace: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port must be between 0 and 65535, got {self.port}")
        if self.fps < 1:
            raise UserError(f"--fps must be at least 1, got {self.fps}")


def main(config: ServeConfig) -> str:
    """Run `lerobot-pi0 serve`."""
    stop: queue.SimpleQueue[str] = queue.SimpleQueue()  # the one that a signal's handler may put into
    # Before a client can be there. A signal that comes while the policy loads counts when it is loaded.
    before = {
        number: signal.signal(number, lambda number, _: stop.put(signal.Signals(number).name))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with serving(config):
            why = stop.get()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return f"{why}: the server has stopped"


@contextmanager
def serving(config: ServeConfig) -> Iterator[int]:
    """A server that answers; gives its port.

    Raises OSError when the port cannot be had or the trace is there already, RuntimeError without gRPC, and
    what loading the policy raises.
    """
    try:
        import grpc
        from lerobot.transport import services_pb2_grpc

        from lerobot_pi0.serving.policy_server import PolicyServer
        from lerobot_pi0.serving.served_policy import ServedPolicy
    except ImportError as error:
        raise CommandError(
            f"async inference needs gRPC, and it cannot be imported ({error}): "
            "pip install 'lerobot-policy-pi0[async]'"
        ) from error
    file = None if config.trace is None else new_policy_trace(config.trace)
    address = f"[{config.host}]" if ":" in config.host else config.host
    # Without the option a second server may share the port, and each gets some of the calls.
    server = grpc.server(ThreadPoolExecutor(8, thread_name_prefix="grpc"), options=[("grpc.so_reuseport", 0)])
    try:
        port = server.add_insecure_port(f"{address}:{config.port}")
    except RuntimeError as error:
        raise UnavailableError(
            f"cannot listen on {address}:{config.port}: another server may be there, take another --port; or "
            "this machine has no such address (--host)"
        ) from error
    policy = ServedPolicy(config.policy)
    trace = None if file is None else Trace(file)
    service = PolicyServer(policy, config.fps, trace)
    try:
        if config.policy.path:
            policy.load(config.policy.path, None)
        services_pb2_grpc.add_AsyncInferenceServicer_to_server(service, server)
        server.start()
        if not _is_loopback(config.host):
            logger.warning(
                "!!! WHOEVER REACHES %s:%d CAN SEND IT WHAT HE LIKES: there is no password. Use it in a "
                "network that you trust, or leave --host at 127.0.0.1 and come through "
                "`ssh -L %d:127.0.0.1:%d`",
                address,
                port,
                port,
                port,
            )
        logger.info("serving on %s:%d (Ctrl-C ends it)", address, port)
        yield port
    finally:
        service.close()
        server.stop(grace=1.0).wait()
        policy.close()
        if trace is not None:
            trace.close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
