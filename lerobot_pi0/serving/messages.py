"""What LeRobot's robot client sends, unpickled without running anything that stands in it.

The protocol of LeRobot's async inference is pickles in protobuf messages, and to unpickle is to call what the
sender names. Here only the two classes of the protocol and numpy's arrays and numbers can be named, and numpy
itself is not called: it trusts what it unpickles, down to pointers. What stands for an array keeps its parts,
and becomes one of plain numbers when all is read. Before that the opcodes are looked through, so that what
a message takes of the memory is of the order of its own size.
"""

import io
import math
import pickle
import pickletools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import numpy as np
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
from lerobot.transport.utils import receive_bytes_in_chunks

from lerobot_pi0.errors import UserError

MAX_BYTES = 128 * 2**20  # of one observation: four cameras of ten megapixels
# Opcodes of one message: a few for a number, ten times as many for an array. Tuples within tuples are hashed
# by recursion without a limit, and as many as this fit on the stack.
MAX_PARTS = 20_000


class MessageError(UserError):
    """A message is not what the protocol says. The text says what it is."""


class BrokenOffError(MessageError):
    """The client stopped before the end of its observation."""


class _Sealed(type):
    """A pickle can set attributes of what it names: not those of a class that the next one shares."""

    def __setattr__(cls, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"attributes of {cls.__name__} cannot be set")


class _Observation(TimedObservation, metaclass=_Sealed):
    pass


class _Instructions(RemotePolicyConfig, metaclass=_Sealed):
    pass


class _Function:
    """What a pickle may call. There is nothing in it that a pickle could set."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *given: Any) -> Any:
        return self._function(*given)

    def __setstate__(self, state: Any) -> NoReturn:
        raise MessageError("it changes a function")


class _Kind:
    """In place of a dtype: numbers of at most eight bytes, in either byte order."""

    def __init__(self, name: Any, *_: Any):
        if name not in _KINDS:
            raise MessageError(f"it has an array of {str(name)[:20]!r}: only arrays of numbers are read")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        _, order, *_ = state
        if order not in ("<", ">", "=", "|"):
            raise MessageError("it has an array of an unknown byte order")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """In place of an array, until all is read."""

    def __init__(
        self, data: Any = None, kind: Any = None, shape: Any = (), order: Any = "C", axes: Any = None
    ):
        self._parts = data, kind, shape, order, axes

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, data = state
        self._parts = data, kind, shape, "F" if is_fortran else "C", None

    def array(self) -> np.ndarray:
        data, kind, shape, order, axes = self._parts
        if not isinstance(data, bytes | bytearray) or not isinstance(kind, _Kind):
            raise MessageError("it has an array that is not made of bytes")
        if order == "K":  # the axes as they lie in memory, and in which order they are meant
            return np.frombuffer(data, kind.dtype).reshape(shape).transpose(axes)
        return np.frombuffer(data, kind.dtype).reshape(shape, order=order)


def _scalar(kind: Any, data: Any) -> Any:
    return _Array(data, kind).array().item()


def _array_type(*_: Any) -> NoReturn:
    raise MessageError("it calls numpy.ndarray, which makes an array of any memory")


_KINDS = ("b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8")
_HELPERS = "lerobot.async_inference.helpers"
# What the protocol's messages name, and arrays and numbers of numpy 1 and 2.
_NAMES: dict[tuple[str, str], Any] = {
    (_HELPERS, "TimedObservation"): _Observation,
    (_HELPERS, "RemotePolicyConfig"): _Instructions,
    ("numpy", "ndarray"): _Function(_array_type),
    ("numpy", "dtype"): _Function(_Kind),
    **{
        (f"numpy.{core}.{module}", name): _Function(function)
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", lambda *_: _Array()),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _Array),
        )
    },
}
# What `pickle` writes of such, in its protocols since 3. None of these asks for more than it brings along.
_OPCODES = frozenset(
    """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE
    BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_LIST APPEND APPENDS
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS MEMOIZE BINPUT LONG_BINPUT BINGET
    LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD""".split()  # noqa: SIM905
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise MessageError(
                f"it names {module}.{name}, which is not called: an observation is made of numbers, texts "
                "and numpy arrays"
            )
        return _NAMES[module, name]


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
    """An observation from the parts that it is sent in.

    Raises:
        BrokenOffError: if the last part is missing.
        MessageError: if it is anything but an observation, or too large.
    """
    what = "the observation"
    data = receive_bytes_in_chunks(_at_most(requests, limit), None, stopped, "")  # pyrefly: ignore[bad-argument-type]
    if data is None:
        raise BrokenOffError(f"{what} broke off before its end")
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


def _check_opcodes(data: bytes) -> None:
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in _OPCODES:
            raise MessageError(f"it has the opcode {opcode.name}, and no observation needs that")
        if number >= MAX_PARTS:
            raise MessageError(f"it has more than {MAX_PARTS:,} parts: send many numbers as a numpy array")
        # The memo is a list, and made as long as its largest index.
        index = argument if opcode.name in ("BINPUT", "LONG_BINPUT") else None
        if index is not None and index > number:
            raise MessageError(f"it remembers {number} things and numbers one {index:,}")


def _unpickle(data: bytes, kind: type, what: str) -> Any:
    try:
        _check_opcodes(data)
        message = _Unpickler(io.BytesIO(data)).load()
        if isinstance(message, _Observation) and isinstance(message.observation, dict):
            message.observation = {
                name: value.array() if isinstance(value, _Array) else value
                for name, value in message.observation.items()
            }
    except MessageError as error:
        raise MessageError(f"{what} was refused: {error}") from None
    # The errors that a damaged pickle leads to, as the documentation of `pickle` has them, and numpy's.
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        BufferError,
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
