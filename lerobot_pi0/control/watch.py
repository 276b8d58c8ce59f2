"""What happens in a rollout of LeRobot, seen from outside: each observation, action and chunk, with its time.

LeRobot's context is given a robot and an inference engine that pass everything on and tell a `Watch`. Three
things it mends on the way: of a new chunk as many actions are dropped as were sent while it was made, the
delay that the policy is told is that of the last chunks, and no chunk outlives a reset.
"""

import logging
import math
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lerobot.policies.rtc import ActionQueue
from lerobot.rollout import RolloutContext
from lerobot.rollout.inference import InferenceEngine, RTCInferenceEngine
from lerobot.rollout.robot_wrapper import ThreadSafeRobot

from lerobot_pi0.control.latency import quantile
from lerobot_pi0.control.timing import Timing, sync_timing, watched_timing
from lerobot_pi0.control.trace import Trace
from lerobot_pi0.modeling_pi0 import Pi0Policy

logger = logging.getLogger(__name__)

REMIND_AFTER = 30.0  # seconds between two warnings that the policy is too slow
LATELY = 50  # chunks that such a warning looks back on
RECENT = 5  # chunks that tell how late the next one will be

Place = tuple[int, int]  # of an action: number of its chunk, step in it


class Watch:
    """Watches a rollout once it is put into its context; `trace`, if there is one, gets all that is seen.

    Only what the policy does counts: not the way back to the initial position, not a person's corrections.
    """

    def __init__(self, ctx: RolloutContext, policy: Pi0Policy, trace: Trace | None, start: dict[str, Any]):
        """`start`: fields of the trace's `start` events, which are written when the policy is reset."""
        self.cfg, self.policy, self.trace, self.start = ctx.runtime.cfg, policy, trace, start
        self.kind = start["kind"]
        self.times: list[array[float]] = []  # of the actions, from reset to reset
        self.latencies = array("d")
        self.engine = ctx.policy.inference
        self._postprocess = ctx.policy.postprocessor
        self._sends = ctx.runtime.cfg.interpolation_multiplier  # of each action of the policy
        self._lock = threading.Lock()
        self._chunks, self._queued = 0, deque[Place]()
        self._action: Place | None = None
        self._sends_left = 0
        self._observed = self._notified = 0.0
        self._began: tuple[float, float] = 0.0, 0.0  # observed, began: of the inference that runs
        self._predicted: tuple[torch.Tensor, int | None] | None = None  # a chunk, and the delay given for it
        self._resets = self._taken = 0  # until now, and until the inference that runs took its observation
        self._reminded = time.monotonic()
        self._watch_policy()
        ctx.hardware.robot_wrapper = WatchedRobot(ctx.hardware.robot_wrapper, self)
        ctx.policy.inference = WatchedEngine(self.engine, self)

    @property
    def num_actions(self) -> int:
        return sum(map(len, self.times))

    def timing(self, latency: float) -> Timing:
        """How this rollout runs with a latency."""
        return timing(self.cfg, self.policy.config.chunk_size, self.policy.config.n_action_steps, latency)

    def forget(self) -> None:
        """What was observed until now is of an episode that is over."""
        self._resets += 1

    def take(self) -> None:
        """An inference beside the loop takes its observation."""
        self._taken = self._resets

    def reset(self) -> None:
        """An episode begins."""
        with self._lock:
            self._queued.clear()
            self._action, self._sends_left = None, 0
        self.times.append(array("d"))
        self._write("start", **self.start)

    def stop(self) -> None:
        """What is sent from now on is not the policy's."""
        self._sends_left = 0

    def finish(self, why: str) -> None:
        """The run is over."""
        self.stop()
        self._write("stop", why="the policy gave up" if self.engine.failed else why)

    def observe(self, observation: dict[str, Any]) -> None:
        """The robot gave an observation."""
        self._observed = time.monotonic()
        if self.trace is not None:
            joints = {name: value for name, value in observation.items() if name.endswith((".pos", ".vel"))}
            joints = {name: round(float(value), 5) for name, value in joints.items()}
            self._write("observation", self._observed, joints=joints)

    def notify(self) -> None:
        """The last observation is what the next inference beside the loop sees."""
        self._notified = self._observed

    def ask(self, engine: InferenceEngine, frame: dict | None) -> torch.Tensor | None:
        """The policy's next action from LeRobot's engine."""
        began = time.monotonic()
        action = engine.get_action(frame)
        if self.kind == "sync" and self._predicted is not None:
            self._began = self._observed, began
            self._chunk_is_there(self._postprocess(self._predicted[0]))
            steps = range(self.policy.config.n_action_steps)
            self._queued = deque((self._chunks, step) for step in steps)
        if self.kind == "sync":  # otherwise the queue has told which it is
            self._action = self._queued.popleft() if self._queued else None
        if action is not None:
            self._sends_left = self._sends
        return action

    def send(self, action: dict[str, Any]) -> None:
        """The robot was sent an action."""
        if self._sends_left == 0:
            return
        self._sends_left -= 1
        now = time.monotonic()
        self.times[-1].append(now)
        chunk, step = self._action or (None, None)
        if self.trace is not None:
            values = {name: round(float(value), 5) for name, value in action.items()}
            self._write("action", now, values=values, chunk=chunk, step=step)

    def watch_queue(self, queue: ActionQueue) -> None:
        """Of a chunk that comes beside the loop: what was known when it began, what is late when it comes."""
        get, merge, clear, left_over = queue.get, queue.merge, queue.clear, queue.get_left_over

        # An action is taken and a chunk put in by two threads: under a lock, lest one count for the other.
        def watched_get() -> torch.Tensor | None:
            with self._lock:
                action = get()
                if action is not None:
                    self._action = self._queued.popleft() if self._queued else None
                return action

        def watched_merge(original: torch.Tensor, processed: torch.Tensor, delay: int, before: int) -> None:
            with self._lock:
                if self._taken != self._resets:
                    return
                # LeRobot 0.6.1 drops ceil(latency · fps) actions: often one more than were sent, and as many
                # of the first chunk, when none were. The arm would skip them (lerobot#4454).
                consumed = max(queue.get_action_index() - before, 0)
                merge(original, processed, consumed, before)
                dropped = min(consumed, len(processed)) if queue.cfg.enabled else 0
                given = (self._predicted and self._predicted[1]) or 0
                self._chunk_is_there(processed[None], given=given, dropped=dropped, consumed=consumed)
                new = [(self._chunks, step) for step in range(dropped, len(processed))]
                self._queued = deque(new) if queue.cfg.enabled else deque([*self._queued, *new])

        def watched_clear() -> None:
            with self._lock:
                clear()
                self._queued.clear()

        def watched_left_over() -> torch.Tensor | None:
            # LeRobot's thread has just taken the observation.
            self._began = self._notified, time.monotonic()
            return left_over()

        methods: Any = queue
        methods.get, methods.merge, methods.clear = watched_get, watched_merge, watched_clear
        methods.get_left_over = watched_left_over

    def _watch_policy(self) -> None:
        predict = self.policy.predict_action_chunk

        def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
            if kwargs.get("inference_delay") is not None:
                kwargs["inference_delay"] = self._delay()
            chunk = predict(*args, **kwargs)
            self._predicted = chunk, kwargs.get("inference_delay")
            return chunk

        self.policy.predict_action_chunk = watched

    def _delay(self) -> int:
        """What the policy is told of how late its chunk will be, in steps: as late as the last ones were.

        LeRobot tells it the longest latency since the run began: one hiccup, and the delay is too long, or
        that of a whole chunk, for good.
        """
        if not self.latencies:
            return 0
        steps = math.ceil(max(self.latencies[-RECENT:]) * self.cfg.fps)
        return min(steps, self.policy.config.chunk_size - 1)

    def _chunk_is_there(self, actions: torch.Tensor, **delays: int) -> None:
        """A chunk (1, steps, joints), in robot units, can be sent from now on."""
        ended, (observed, began) = time.monotonic(), self._began
        self._predicted = None
        self._chunks += 1
        self.latencies.append(ended - began)
        if self.trace is not None:
            self._write(
                "inference",
                ended,
                chunk=self._chunks,
                observed=observed,
                began=began,
                ended=ended,
                actions=[[round(value, 5) for value in row] for row in actions[0].tolist()],
                **delays,
            )
        self._remind(ended)

    def _remind(self, now: float) -> None:
        if now - self._reminded < REMIND_AFTER:
            return
        self._reminded = now
        slow = self.timing(quantile(self.latencies[-LATELY:], 95))
        if slow.stall:
            logger.warning("%s (p95 of the last chunks; the longest took %.2f s)", slow, max(self.latencies))

    def _write(self, event: str, t: float | None = None, **fields: Any) -> None:
        if self.trace is not None:
            self.trace.write(event, t, **fields)


class WatchedRobot(ThreadSafeRobot):
    """LeRobot's robot, which tells a watch what it gives and gets."""

    def __init__(self, robot: ThreadSafeRobot, watch: Watch):
        super().__init__(robot.inner)
        self._watch = watch

    def get_observation(self) -> dict[str, Any]:
        observation = super().get_observation()
        self._watch.observe(observation)
        return observation

    def send_action(self, action: dict[str, Any]) -> Any:
        sent = super().send_action(action)
        self._watch.send(action)
        return sent


class WatchedHolder(dict[str, Any]):
    """Where LeRobot's thread finds the last observation. It tells a watch of each look."""

    def __init__(self, holder: dict[str, Any], watch: Watch):
        super().__init__(holder)
        self._watch = watch

    def get(self, key: str, default: Any = None) -> Any:
        """LeRobot's thread asks in no other way, and holds the lock of the observation meanwhile."""
        self._watch.take()
        return super().get(key, default)


class WatchedEngine(InferenceEngine):
    """LeRobot's engine, which tells a watch what it is asked and told."""

    def __init__(self, engine: InferenceEngine, watch: Watch):
        self._engine, self._watch = engine, watch

    def start(self) -> None:
        self._engine.start()
        if isinstance(self._engine, RTCInferenceEngine) and self._engine.action_queue is not None:
            self._watch.watch_queue(self._engine.action_queue)
            with self._engine._obs_lock:
                self._engine._obs_holder = WatchedHolder(self._engine._obs_holder, self._watch)

    def stop(self) -> None:
        self._engine.stop()
        self._watch.stop()

    def reset(self) -> None:
        if isinstance(self._engine, RTCInferenceEngine):
            # LeRobot 0.6.1 keeps the last observation, and what its thread makes of it: an episode would
            # begin with actions for where the one before has ended. Before the queue is cleared, so that
            # what is merged until then goes with it.
            with self._engine._obs_lock:
                self._engine._obs_holder["obs"] = None
                self._watch.forget()
        self._engine.reset()
        self._watch.reset()

    def get_action(self, obs_frame: dict | None) -> torch.Tensor | None:
        return self._watch.ask(self._engine, obs_frame)

    def notify_observation(self, obs: dict) -> None:
        self._watch.notify()
        self._engine.notify_observation(obs)

    def pause(self) -> None:
        self._engine.pause()
        self._watch.stop()

    def resume(self) -> None:
        self._engine.resume()

    @property
    def ready(self) -> bool:
        return self._engine.ready

    @property
    def failed(self) -> bool:
        return self._engine.failed


class Complaints(logging.Handler):
    """The last error that a logger was told: LeRobot's inference thread leaves no other word of its death."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.last: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what the record says."""
        if "Traceback" not in (message := record.getMessage()):
            self.last = message


@contextmanager
def complaints(name: str) -> Iterator[Complaints]:
    """What is told to a logger meanwhile."""
    handler = Complaints()
    logging.getLogger(name).addHandler(handler)
    try:
        yield handler
    finally:
        logging.getLogger(name).removeHandler(handler)


def timing(cfg: Any, chunk_size: int, n_action_steps: int, latency: float) -> Timing:
    """How a watched rollout with a config runs with a latency."""
    if cfg.inference.type == "rtc":
        return watched_timing(latency, cfg.fps, chunk_size, cfg.inference.queue_threshold)
    return sync_timing(latency, cfg.fps, n_action_steps)
