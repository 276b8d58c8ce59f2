"""The one policy that a server holds: loaded once, warmed up, and run in a thread of its own."""

import gc
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lerobot_pi0.errors import UserError, printable
from lerobot_pi0.inputs.flags import ControlPolicyFlags
from lerobot_pi0.inputs.policy import LoadedPolicy, load_policy, read_config

logger = logging.getLogger(__name__)


class ServedPolicy:
    """A checkpoint under the server's flags, or under what the client asks for where they say nothing.

    All that touches the policy runs in one thread: loading and prediction never overlap, and every further
    thread that computes would have worker threads and memory of its own.
    """

    def __init__(self, flags: ControlPolicyFlags):
        self.flags = flags
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._loaded: LoadedPolicy | None = None
        self._loaded_from: tuple[Path, str | None] | None = None

    def load(self, name: str, device: str | None, policy_type: str | None = None) -> LoadedPolicy:
        """The policy that a client names, or the server if it does. It stays until another one is named.

        Raises ValueError for another type than the client's, and ValueError or FileNotFoundError that says
        why it cannot be had; what was loaded then still is, unless it failed halfway.
        """
        return self._thread.submit(self._load, name, device, policy_type).result()

    def predict(self, batch: dict[str, Any], num_actions: int, is_first: bool = False) -> Tensor:
        """Actions (num_actions, action size) in robot units for an observation, a robot's first or another.

        Raises RuntimeError when the policy gives anything that is not finite.
        """
        return self._thread.submit(self._predict, batch, num_actions, is_first).result()

    def close(self) -> None:
        """Wait for what runs, and give the policy's memory back."""
        self._thread.shutdown()
        self._loaded = None

    def _load(self, name: str, device: str | None, policy_type: str | None) -> LoadedPolicy:
        flags = self.flags
        if flags.path and name != flags.path and Path(name).resolve() != Path(flags.path).resolve():
            raise UserError(
                f"this server serves '{flags.path}', and the client asks for '{name}': start the client with "
                f"--pretrained_name_or_path={flags.path}"
            )
        if not flags.path:
            flags = replace(flags, path=name, device=flags.device or device)
        config, folder = read_config(flags)
        if policy_type not in (None, config.type):
            raise UserError(
                f"the policy '{flags.path}' is of type '{config.type}', and the client asks for "
                f"'{policy_type}': start it with --policy_type={config.type}"
            )
        wanted = (folder.resolve(), config.device)
        if self._loaded is None or self._loaded_from != wanted:
            self._loaded = self._loaded_from = None  # before the next one takes its memory
            gc.collect()
            started = time.perf_counter()
            loaded = load_policy(flags)
            seconds = time.perf_counter() - started
            first, _, later = (_warm_up(loaded) for _ in range(3))  # a CUDA graph is recorded in the second
            logger.info(
                "%s on %s: loaded in %.1f s, the first chunk took %.1f s, the next one %.2f s",
                printable(flags.path),
                loaded.config.device,
                seconds,
                first,
                later,
            )
            self._loaded, self._loaded_from = loaded, wanted
        return self._loaded

    def _predict(self, batch: dict[str, Any], num_actions: int, is_first: bool) -> Tensor:
        assert self._loaded is not None
        actions = predict_chunk(self._loaded, self._loaded.preprocess(batch), is_first)[:num_actions]
        if not actions.isfinite().all():
            raise RuntimeError("the policy's actions are not finite: nothing is sent. Look at its checkpoint")
        return actions


def predict_chunk(loaded: LoadedPolicy, batch: dict[str, Any], is_first: bool = False) -> Tensor:
    """Actions (chunk, action size) in robot units for a processed batch of one: float32, on the CPU."""
    # With a delay and nothing to continue, a chunk begins where the robot is.
    chunk = loaded.policy.predict_action_chunk(batch, inference_delay=0 if is_first else None)
    return loaded.postprocess(chunk)[0].float().cpu()


def _warm_up(loaded: LoadedPolicy) -> float:
    """Predict a chunk for the example observation; returns the seconds."""
    started = time.perf_counter()
    batch = loaded.preprocess(loaded.config.example_observation() | {"task": ""})
    del batch["task"]  # not an instruction to warn about
    predict_chunk(loaded, batch)
    return time.perf_counter() - started
