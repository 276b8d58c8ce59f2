"""Actions that were predicted and not executed yet, separately for each thread that steps the policy."""

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor


@dataclass
class _Actions:
    waiting: deque[Tensor] = field(default_factory=deque)
    last: Tensor | None = None


class ActionQueue:
    """A first-in, first-out queue of actions (batch, action size) per thread.

    lerobot-eval steps one policy for several tasks in threads (--env.max_parallel_tasks; lerobot#4327): with
    one queue they would execute one another's actions. A copy of a queue is empty.
    """

    def __init__(self) -> None:
        self._of_thread: WeakKeyDictionary[threading.Thread, _Actions] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return ActionQueue, ()

    def __len__(self) -> int:
        return len(self._own().waiting)

    @property
    def last(self) -> Tensor | None:
        """The action that was taken last, since the queue was cleared."""
        return self._own().last

    def extend(self, actions: Iterable[Tensor]) -> None:
        """Append actions, in the order in which they are to be executed."""
        self._own().waiting.extend(actions)

    def popleft(self) -> Tensor:
        """Take the next action. Raises IndexError when there is none."""
        own = self._own()
        own.last = own.waiting.popleft()
        return own.last

    def drop(self) -> None:
        """Drop the actions of the calling thread that wait."""
        self._own().waiting.clear()

    def clear(self) -> None:
        """Drop the actions of the calling thread, and the last one."""
        self._of_thread.pop(threading.current_thread(), None)

    def _own(self) -> _Actions:
        return self._of_thread.setdefault(threading.current_thread(), _Actions())
