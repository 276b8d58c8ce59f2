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

from lerobot_pi0.control.trace import Trace, new_policy_trace
from lerobot_pi0.errors import CommandError, UnavailableError
from lerobot_pi0.lerobot_compat import log_versions
from lerobot_pi0.serving.flags import ServeConfig

logger = logging.getLogger(__name__)

OPTIONS = {
    # Otherwise a second server may share the port, and each gets some of the calls.
    "grpc.so_reuseport": 0,
    # A connection that was cut without a word is noticed within 10 s, and not after gRPC's two hours.
    "grpc.keepalive_time_ms": 5000,
    "grpc.keepalive_timeout_ms": 5000,
    "grpc.http2.ping_timeout_ms": 5000,  # what gRPC waits for the answer since 1.60, instead of the above
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.max_pings_without_data": 0,
}


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
    log_versions()
    file = None if config.trace is None else new_policy_trace(config.trace)
    address = f"[{config.host}]" if ":" in config.host else config.host
    server = grpc.server(ThreadPoolExecutor(8, thread_name_prefix="grpc"), options=list(OPTIONS.items()))
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
                "!!! WHOEVER REACHES %s:%d CAN SEND OBSERVATIONS: there is no password. Use it in a network "
                "that you trust, or leave --host at 127.0.0.1 and come through "
                "`ssh -L %d:127.0.0.1:%d`",
                address,
                port,
                port,
                port,
            )
        if config.any_policy:
            logger.warning(
                "--any_policy: whoever reaches %s:%d names the checkpoint, and has this machine load any "
                "folder or repository. --policy.path=... serves one",
                address,
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
