"""Pickles that name nothing but what an observation is made of, and do harm if that is called as numpy and
pickle have it: memory read at addresses that the sender chooses, a stack that overflows, memory exhausted.
"""

import pickle
import time
from typing import Any

import numpy as np
from lerobot.async_inference.helpers import TimedObservation

RECONSTRUCT, SCALAR = np.zeros(1).__reduce__()[0], np.float32(0).__reduce__()[0]
FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
POINTER = b"\x01" * 8
FAR = (3, "|", None, ("a",), {"a": (np.dtype("f8"), 10**9)}, 8, 1, 0)  # a field that lies beyond its array


class Call:
    """Pickled, a call of a function, and the state that is set in what it returns."""

    def __init__(self, function: Any, *given: Any, state: Any = None):
        self.given = (function, given) if state is None else (function, given, state)

    def __reduce__(self) -> Any:
        return self.given


def of(value: Any, protocol: int = 4) -> bytes:
    """An observation that has it for a joint."""
    return pickle.dumps(TimedObservation(time.time(), 0, {"joint_0.pos": value}), protocol)


def beyond() -> Call:
    return Call(np.dtype, "V8", False, True, state=FAR)


def array(kind: Any, data: Any, shape: Any = (1,)) -> Call:
    return Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, shape, kind, False, data))


# What stands in the message, and how it is refused.
HARMFUL: dict[str, tuple[bytes, str]] = {
    "pointers": (of(Call(np.ndarray, (1,), np.dtype("O"), POINTER)), "an array of 'O8'"),
    "pointers, without their dtype": (of(Call(np.ndarray, (1,), "O", POINTER)), "calls numpy.ndarray"),
    "pointers in a state": (of(array(np.dtype("O"), POINTER)), "an array of 'O8'"),
    "a type for a dtype": (of(array(object, POINTER)), "names builtins.object"),
    "a text for a dtype": (of(array("O", POINTER)), "not made of bytes"),
    "objects to be reconstructed": (of(Call(RECONSTRUCT, np.ndarray, (1,), b"O")), "not made of bytes"),
    "an object as a scalar": (of(Call(SCALAR, np.dtype("O"), POINTER)), "an array of 'O8'"),
    "a field beyond the array": (of(array(beyond(), POINTER)), "an array of 'V8'"),
    "a field beyond the scalar": (of(Call(SCALAR, beyond(), POINTER)), "an array of 'V8'"),
    "a field beyond the number": (
        of(array(Call(np.dtype, "f8", False, True, state=FAR), POINTER, (1, 2))),
        "does not unpickle: ValueError",
    ),
    "too few bytes": (of(array(np.dtype("f8"), b"1234")), "does not unpickle: ValueError"),
    "too many bytes": (of(array(np.dtype("f8"), bytes(16))), "does not unpickle: ValueError"),
    "no bytes": (of(array(np.dtype("f8"), [1.0])), "not made of bytes"),
    "a shape without end": (of(array(np.dtype("f8"), bytes(8), (2**62, 2**62))), "does not unpickle"),
    "a part of a number": (of(Call(SCALAR, np.dtype("f8"), b"1234")), "does not unpickle: ValueError"),
    "a buffer that is no bytes": (of(Call(FROM_BUFFER, "text", np.dtype("u1"), (4,), "C")), "not made of"),
    # A function whose state is to call itself, called.
    "an endless call": (b"\x80\x04cnumpy._core.multiarray\nscalar\n\x94(h\x00)}}tb)R.", "changes a function"),
    "a memo of 8 GB": (b"\x80\x04Nr\xff\xff\xff\x1f.", "numbers one 536,870,911"),
    "a text of 1 TB": (b"\x80\x04\x8d\x00\x00\x00\x00\x00\x01\x00\x00.", "does not unpickle: ValueError"),
    "a frame of 1 TB": (b"\x80\x04\x95\x00\x00\x00\x00\x00\x01\x00\x00N.", "does not unpickle"),
    "a deep key": (b"\x80\x04}(N" + b"\x85" * 10**6 + b"Nu.", "more than 20,000 parts"),
    "a key as deep as may be": (b"\x80\x04}N" + b"\x85" * 19_990 + b"Ns.", "is a dict"),
    "a number of a million digits": (b"\x80\x04\x8b\x00\x00\x10\x00" + b"\x01" * 2**20 + b".", "LONG4"),
}
