"""What LeRobot's robot client sends, unpickled without running anything that stands in it.

The protocol of LeRobot's async inference is pickles in protobuf messages, and to unpickle is to call what the
sender names. Here only the two classes of the protocol and numpy's arrays can be named. That keeps code out;
it does not keep somebody from sending what exhausts the memory.
"""

import functools
import io
import math
import pickle
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import numpy as np
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
from lerobot.transport.utils import receive_bytes_in_chunks

MAX_BYTES = 128 * 2**20  # of one observation: four cameras of ten megapixels


class MessageError(ValueError):
    """A message is not what the protocol says. The text says what it is."""


class _Sealed(type):
    """A pickle can set attributes of what it names: not those of a class that the next one shares."""

    def __setattr__(cls, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"attributes of {cls.__name__} cannot be set")


class _Observation(TimedObservation, metaclass=_Sealed):
    pass


class _Instructions(RemotePolicyConfig, metaclass=_Sealed):
    pass


_HELPERS = "lerobot.async_inference.helpers"
_CLASSES = {
    (_HELPERS, "TimedObservation"): _Observation,
    (_HELPERS, "RemotePolicyConfig"): _Instructions,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
# What arrays and scalars name when they are pickled, with numpy 1 and 2 at the other end.
_FUNCTIONS: dict[tuple[str, str], Any] = {
    (f"numpy.{core}.{module}", name): function
    for core in ("core", "_core")
    for module, name, function in (
        ("multiarray", "_reconstruct", np.zeros(1).__reduce__()[0]),
        ("multiarray", "scalar", np.float32(0).__reduce__()[0]),
        ("numeric", "_frombuffer", np.zeros(1).__reduce_ex__(5)[0]),
    )
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if (module, name) in _FUNCTIONS:
            return functools.partial(_FUNCTIONS[module, name])  # for this pickle alone, as above
        raise MessageError(
            f"it names {module}.{name}, which is not called: an observation is made of numbers, texts and "
            "numpy arrays"
        )


def read_instructions(data: bytes) -> RemotePolicyConfig:
    """What the client asks for in its handshake. Raises MessageError."""
    what = "the handshake"
    message = _unpickle(data, RemotePolicyConfig, what)
    kinds = {
        "policy_type": str,
        "pretrained_name_or_path": str,
        "lerobot_features": dict,
        "actions_per_chunk": int,
        "device": str,
        "rename_map": dict,
    }
    for field, kind in kinds.items():
        _expect(message, field, kind, what)
    for key, feature in message.lerobot_features.items():
        if not isinstance(key, str) or not isinstance(feature, dict):
            raise MessageError(f"{what} has features that are not {{name: {{…}}}}")
    if not all(isinstance(name, str) for names in message.rename_map.items() for name in names):
        raise MessageError(f"{what} has a rename_map that is not {{name: name}}")
    if message.actions_per_chunk < 1:
        raise MessageError(f"--actions_per_chunk must be at least 1, got {message.actions_per_chunk}")
    return message


def read_observation(
    requests: Iterable[Any], stopped: threading.Event, limit: int = MAX_BYTES
) -> TimedObservation:
    """An observation from the parts that it is sent in. Raises MessageError."""
    what = "the observation"
    data = receive_bytes_in_chunks(_at_most(requests, limit), None, stopped, "")  # pyrefly: ignore[bad-argument-type]
    if data is None:
        raise MessageError(f"{what} broke off before its end")
    message = _unpickle(data, TimedObservation, what)
    for field, kind in {"timestamp": float, "timestep": int, "observation": dict, "must_go": bool}.items():
        _expect(message, field, kind, what)
    if message.timestep < 0 or not math.isfinite(message.timestamp):
        raise MessageError(f"{what} is of step {message.timestep}, at time {message.timestamp}")
    return message


def _at_most(requests: Iterable[Any], limit: int) -> Iterator[Any]:
    size = 0
    for request in requests:
        size += len(request.data)
        if size > limit:
            raise MessageError(f"the observation has more than {limit:,} bytes: make the pictures smaller")
        yield request


def _unpickle(data: bytes, kind: type, what: str) -> Any:
    try:
        message = _Unpickler(io.BytesIO(data)).load()
    except MessageError as error:
        raise MessageError(f"{what} was refused: {error}") from None
    # The errors that a damaged pickle leads to, as the documentation of `pickle` has them, and numpy's.
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise MessageError(f"{what} does not unpickle: {type(error).__name__}: {error}") from error
    if not isinstance(message, kind):
        raise MessageError(f"{what} is a {type(message).__name__}, not a {kind.__name__}")
    return message


def _expect(message: Any, field: str, kind: type, what: str) -> None:
    value = vars(message).get(field, getattr(type(message), field, None))
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise MessageError(f"{what} has a {type(value).__name__} for its {field}, not a {kind.__name__}")
