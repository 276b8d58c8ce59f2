"""lerobot-eval's own loop, and a policy that plays recorded actions back through our queue."""

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig, close_envs, make_env_pre_post_processors
from lerobot.scripts.lerobot_eval import eval_policy_all
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from tiny_policy import tiny_config
from torch import Tensor
from torch.nn.functional import interpolate

from lerobot_pi0 import Pi0Policy
from lerobot_pi0.demo.suites import EVALUATION_SEED

Frame = dict[str, Any]  # as `add_frame` takes it


class Playback(Pi0Policy):
    """Only its chunks are not its own: an instruction's n-th episode gets those of its n-th recording."""

    def __init__(self, recorded: Mapping[str, Sequence[np.ndarray]], *, n_action_steps: int) -> None:
        """Args: `recorded`: actions (steps, dims) of each instruction's episodes."""
        (dims,) = {actions.shape[1] for of in recorded.values() for actions in of}
        config = tiny_config(
            max_state_dim=32,
            max_action_dim=32,
            chunk_size=2 * n_action_steps,
            n_action_steps=n_action_steps,
            chunk_guard=False,
            input_features={
                f"{OBS_IMAGES}.any": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
                OBS_STATE: PolicyFeature(FeatureType.STATE, (dims,)),
            },
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (dims,))},
        )
        self._of_thread = threading.local()  # first: a new policy is reset
        super().__init__(config)
        self.recorded = recorded
        # By instruction; of each rollout, which is a batch of episodes, one entry per step.
        self.observed: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
        self.sent: dict[str, list[list[Tensor]]] = defaultdict(list)
        self.eval()

    def reset(self) -> None:
        super().reset()
        self._of_thread.step = 0

    def select_action(self, batch: dict[str, Any], *, noise: Tensor | None = None) -> Tensor:
        (task,) = set(batch["task"])
        if self._of_thread.step == 0:
            self.observed[task].append([])
            self.sent[task].append([])
        self.observed[task][-1].append(batch)
        action = super().select_action(batch)
        self.sent[task][-1].append(action)
        self._of_thread.step += 1
        return action

    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:
        (task,), size = set(batch["task"]), len(batch["task"])
        first = (len(self.sent[task]) - 1) * size
        steps = self._of_thread.step + np.arange(self.config.chunk_size)
        episodes = self.recorded[task][first : first + size]
        return torch.from_numpy(np.stack([of[np.minimum(steps, len(of) - 1)] for of in episodes]))


def evaluate(policy: Playback, config: EnvConfig, envs: Any, n_episodes: int) -> dict[str, Any]:
    """What lerobot-eval does once it has made environments and policy; without videos and normalization."""
    before, after = make_env_pre_post_processors(env_cfg=config, policy_cfg=policy.config)
    as_it_is: Any = lambda given: given  # noqa: E731
    try:
        with torch.no_grad():
            return eval_policy_all(
                envs=envs,
                policy=policy,
                env_preprocessor=before,
                env_postprocessor=after,
                preprocessor=as_it_is,
                postprocessor=as_it_is,
                n_episodes=n_episodes,
                start_seed=EVALUATION_SEED,
            )
    finally:
        close_envs(envs)


def picture_difference(recorded: np.ndarray, seen: Tensor) -> float:
    """Mean absolute difference, of 255, between a recorded picture (h, w, 3) and what a policy is given
    (1, 3, any, any), made as small."""
    small = interpolate(seen, recorded.shape[:2], mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    return float(np.abs(small.numpy() * 255 - recorded).mean())


def check_frames(recorded: Sequence[Frame], observed: Sequence[dict[str, Any]], tolerance: float) -> None:
    """A policy is given what was recorded, step by step: instruction, state, and pictures whose mean
    difference is below `tolerance`, and higher if they are turned or mirrored."""
    assert len(recorded) == len(observed)
    for frame, batch in zip(recorded, observed, strict=True):
        assert batch["task"] == [frame["task"]]
        # A millimetre: LIBERO's controller remembers what was before the reset.
        np.testing.assert_allclose(batch[OBS_STATE][0], frame[OBS_STATE], atol=1e-3)
    for key in (key for key in recorded[0] if key.startswith(OBS_IMAGES)):
        pairs = [(frame[key], batch[key]) for frame, batch in zip(recorded, observed, strict=True)]
        difference = np.mean([picture_difference(*pair) for pair in pairs])
        assert difference < tolerance, key
        for dims in ([2], [3], [2, 3]):
            assert np.mean([picture_difference(a, b.flip(dims)) for a, b in pairs]) > 1.5 * difference, key


def check_queues(policy: Playback, rollouts: int) -> None:
    """Every environment of a batch has executed its own recording from the first action on."""
    for task, episodes in policy.recorded.items():
        assert len(policy.sent[task]) == rollouts
        for number, sent in enumerate(policy.sent[task]):
            executed = torch.stack(sent, 1).numpy()  # (environments, steps, dims)
            expected = episodes[number * len(executed) : (number + 1) * len(executed)]
            for own, of in zip(executed, expected, strict=True):
                np.testing.assert_array_equal(own, of[: len(own)])
