"""Rollout instrumentation: records each observation, action and chunk of a rollout of LeRobot, with its time.

LeRobot's context is given a robot and an inference engine that pass every call on and report it to an
`Instrumentation`. Three faults of LeRobot are corrected on the way: as many actions of a new chunk are
dropped as were sent while it was computed, the delay that the policy is given is that of the last chunks, and
no chunk outlives a reset. How these hook into LeRobot: `lerobot_compat`.
"""

import logging
import math
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from lerobot.policies.rtc import ActionQueue
from lerobot.rollout import RolloutContext
from lerobot.rollout.inference import InferenceEngine, RTCInferenceEngine
from lerobot.rollout.robot_wrapper import ThreadSafeRobot

from lerobot_pi0.control.latency import quantile
from lerobot_pi0.control.timing import Timing, rtc_timing, sync_timing
from lerobot_pi0.control.trace import Trace
from lerobot_pi0.lerobot_compat import (
    forget_observation,
    is_policy_joint,
    on_observation_taken,
    replace_queue_methods,
    replace_robot_and_engine,
)
from lerobot_pi0.modeling_pi0 import Pi0Policy

logger = logging.getLogger(__name__)

REMIND_AFTER = 30.0  # seconds between two warnings that the policy is too slow
LATELY = 50  # chunks that such a warning looks back on
RECENT = 5  # chunks that the delay of the next one is estimated from

Position = tuple[int, int]  # of an action: number of its chunk, step in it


class Instrumentation:
    """Records a rollout. `trace`, if there is one, gets every event.

    Only the policy's actions count: not the way back to the initial position, not a person's corrections.
    """

    def __init__(self, ctx: RolloutContext, policy: Pi0Policy, trace: Trace | None, start: dict[str, Any]):
        """Put the instrumented robot and engine into `ctx`.

        `start`: fields of the trace's `start` events, which are written when the policy is reset.
        """
        self.cfg, self.policy, self.trace, self.start = ctx.runtime.cfg, policy, trace, start
        self.kind = start["kind"]
        self.times: list[array[float]] = []  # of the actions, from reset to reset
        self.waits: list[array[float]] = []  # of each, how long the loop waited for the policy before it
        self._waited = 0.0
        self.latencies = array("d")
        self.engine = ctx.policy.inference
        self._postprocess = ctx.policy.postprocessor
        self._sends = ctx.runtime.cfg.interpolation_multiplier  # of each action of the policy
        self._lock = threading.Lock()
        self._chunks, self._queued = 0, deque[Position]()
        self._action: Position | None = None
        self._sends_left = 0
        self._observed = self._notified = 0.0
        self._began: tuple[float, float] = 0.0, 0.0  # observed, began: of the inference that runs
        self._predicted: tuple[torch.Tensor, int | None] | None = None  # a chunk, and the delay given for it
        self._resets = self._taken = 0  # until now, and until the inference that runs took its observation
        self._reminded = time.monotonic()
        self._instrument_policy()
        replace_robot_and_engine(
            ctx,
            lambda robot: InstrumentedRobot(robot, self),
            lambda engine: InstrumentedEngine(engine, self),
        )

    @property
    def num_actions(self) -> int:
        return sum(map(len, self.times))

    def timing(self, latency: float) -> Timing:
        """How this rollout runs with a latency in seconds."""
        return timing(self.cfg, self.policy.config.chunk_size, self.policy.config.n_action_steps, latency)

    def forget_observations(self) -> None:
        """Called when an episode is over: chunks of observations until now are thrown away."""
        self._resets += 1

    def observation_taken(self) -> None:
        """Called when an inference beside the loop takes its observation."""
        self._taken = self._resets

    def reset(self) -> None:
        """Called when an episode begins."""
        with self._lock:
            self._queued.clear()
            self._action, self._sends_left = None, 0
        self.times.append(array("d"))
        self.waits.append(array("d"))
        self._waited = 0.0
        self._write("start", **self.start)

    def stop(self) -> None:
        """Called when what is sent from now on is not the policy's."""
        self._sends_left = 0

    def finish(self, why: str) -> None:
        """Called when the run is over."""
        self.stop()
        self._write("stop", why="the policy gave up" if self.engine.failed else why)

    def observe(self, observation: dict[str, Any]) -> None:
        """Called with each observation of the robot."""
        self._observed = time.monotonic()
        if self.trace is not None:
            joints = {
                name: round(float(value), 5) for name, value in observation.items() if is_policy_joint(name)
            }
            self._write("observation", self._observed, joints=joints)

    def notify(self) -> None:
        """Called when the last observation becomes the one that the next inference beside the loop sees."""
        self._notified = self._observed

    def next_action(self, engine: InferenceEngine, frame: dict | None) -> torch.Tensor | None:
        """The policy's next action from LeRobot's engine."""
        began = time.monotonic()
        action = engine.get_action(frame)
        self._waited += time.monotonic() - began if action is not None else 1 / self.cfg.fps
        if self.kind == "sync" and self._predicted is not None:
            self._began = self._observed, began
            self._chunk_arrived(self._postprocess(self._predicted[0]))
            steps = range(self.policy.config.n_action_steps)
            self._queued = deque((self._chunks, step) for step in steps)
        if self.kind == "sync":  # otherwise it is known from the queue
            self._action = self._queued.popleft() if self._queued else None
        if action is not None:
            self._sends_left = self._sends
        return action

    def send(self, action: dict[str, Any]) -> None:
        """Called with each action that the robot was sent."""
        if self._sends_left == 0:
            return
        self._sends_left -= 1
        now = time.monotonic()
        self.times[-1].append(now)
        self.waits[-1].append(self._waited)
        chunk, step = self._action or (None, None)
        if self.trace is not None:
            values = {name: round(float(value), 5) for name, value in action.items()}
            self._write("action", now, values=values, chunk=chunk, step=step, waited=round(self._waited, 5))
        self._waited = 0.0

    def instrument_queue(self, queue: ActionQueue) -> None:
        """Record what LeRobot's thread puts into its action queue, and what the loop takes out."""

        # An action is taken and a chunk put in by two threads: under a lock, so that an action is not counted
        # for the other chunk.
        def recorded_get(get: Callable[[], Any]) -> Callable[[], Any]:
            def recorded() -> Any:
                with self._lock:
                    action = get()
                    if action is not None:
                        self._action = self._queued.popleft() if self._queued else None
                    return action

            return recorded

        def corrected_merge(merge: Callable[..., None]) -> Callable[..., None]:
            def corrected(
                original: torch.Tensor, processed: torch.Tensor, delay: int, before: int, **label: Any
            ) -> None:
                with self._lock:
                    if self._taken != self._resets:
                        return
                    consumed = max(queue.get_action_index() - before, 0)
                    merge(original, processed, consumed, before, **label)
                    dropped = min(consumed, len(processed)) if queue.cfg.enabled else 0
                    given = (self._predicted and self._predicted[1]) or 0
                    self._chunk_arrived(processed[None], given=given, dropped=dropped, consumed=consumed)
                    new = [(self._chunks, step) for step in range(dropped, len(processed))]
                    self._queued = deque(new) if queue.cfg.enabled else deque([*self._queued, *new])

            return corrected

        def recorded_clear(clear: Callable[[], None]) -> Callable[[], None]:
            def recorded() -> None:
                with self._lock:
                    clear()
                    self._queued.clear()

            return recorded

        def recorded_get_left_over(get_left_over: Callable[[], Any]) -> Callable[[], Any]:
            def recorded() -> torch.Tensor | None:
                # LeRobot's thread has just taken the observation.
                self._began = self._notified, time.monotonic()
                return get_left_over()

            return recorded

        replace_queue_methods(
            queue,
            get=recorded_get,
            merge=corrected_merge,
            clear=recorded_clear,
            get_left_over=recorded_get_left_over,
        )

    def _instrument_policy(self) -> None:
        predict = self.policy.predict_action_chunk

        def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
            if kwargs.get("inference_delay") is not None:
                kwargs["inference_delay"] = self._delay()
            chunk = predict(*args, **kwargs)
            self._predicted = chunk, kwargs.get("inference_delay")
            return chunk

        self.policy.predict_action_chunk = recorded

    def _delay(self) -> int:
        """The delay in control steps that the policy is given: the longest of the last chunks.

        LeRobot gives the longest since the run began (rollout/inference/rtc.py, `LatencyTracker.max`;
        lerobot#4223): after one slow chunk the delay is too long, or a whole chunk, for the rest of the run.
        """
        if not self.latencies:
            return 0
        steps = math.ceil(max(self.latencies[-RECENT:]) * self.cfg.fps)
        return min(steps, self.policy.config.chunk_size - 1)

    def _chunk_arrived(self, actions: torch.Tensor, **delays: int) -> None:
        """Record a chunk (1, steps, joints), in robot units, that can be sent from now on."""
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
        self._warn_if_slow(ended)

    def _warn_if_slow(self, now: float) -> None:
        if now - self._reminded < REMIND_AFTER:
            return
        self._reminded = now
        slow = self.timing(quantile(self.latencies[-LATELY:], 95))
        if slow.stall:
            logger.warning("%s (p95 of the last chunks; the longest took %.2f s)", slow, max(self.latencies))

    def _write(self, event: str, t: float | None = None, **fields: Any) -> None:
        if self.trace is not None:
            self.trace.write(event, t, **fields)


class InstrumentedRobot(ThreadSafeRobot):
    """LeRobot's robot, which reports what it gives and gets."""

    def __init__(self, robot: ThreadSafeRobot, instrumentation: Instrumentation):
        super().__init__(robot.inner)
        self._instrumentation = instrumentation

    def get_observation(self) -> dict[str, Any]:
        observation = super().get_observation()
        self._instrumentation.observe(observation)
        return observation

    def send_action(self, action: dict[str, Any]) -> Any:
        sent = super().send_action(action)
        self._instrumentation.send(action)
        return sent


class InstrumentedEngine:
    """LeRobot's engine, which reports how it is called. All else that it has is the engine's own."""

    def __init__(self, engine: InferenceEngine, instrumentation: Instrumentation):
        self._engine, self._instrumentation = engine, instrumentation

    def start(self) -> None:
        self._engine.start()
        if isinstance(self._engine, RTCInferenceEngine) and self._engine.action_queue is not None:
            self._instrumentation.instrument_queue(self._engine.action_queue)
            on_observation_taken(self._engine, self._instrumentation.observation_taken)

    def stop(self) -> None:
        self._engine.stop()
        self._instrumentation.stop()

    def reset(self) -> None:
        if isinstance(self._engine, RTCInferenceEngine):
            # Before the queue is cleared, so that what is merged until then goes with it.
            forget_observation(self._engine, self._instrumentation.forget_observations)
        self._engine.reset()
        self._instrumentation.reset()

    def get_action(self, obs_frame: dict | None) -> torch.Tensor | None:
        return self._instrumentation.next_action(self._engine, obs_frame)

    def notify_observation(self, obs: dict) -> None:
        self._instrumentation.notify()
        self._engine.notify_observation(obs)

    def pause(self) -> None:
        self._engine.pause()
        self._instrumentation.stop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def timing(cfg: Any, chunk_size: int, n_action_steps: int, latency: float) -> Timing:
    """How an instrumented rollout with a config runs with a latency in seconds."""
    if cfg.inference.type == "rtc":
        return rtc_timing(latency, cfg.fps, chunk_size, cfg.inference.queue_threshold)
    return sync_timing(latency, cfg.fps, n_action_steps)
