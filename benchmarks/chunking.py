"""Ways to go from one chunk to the next while the first is still being executed, one beside the other."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from lerobot_pi0.model.flow import integrate
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.sampling.rtc import read_remainder

# (processed batch, delay in steps, remainder (steps, size) or None) -> chunk (1, steps, size), normalized
Predict = Callable[[dict[str, Any], int, Tensor | None], Tensor]

PREDICT = Pi0Policy.predict_action_chunk


def predictor(policy: Pi0Policy, way: str, rtc: RTCConfig) -> Predict:
    """How a new chunk is made: `naive` knows nothing of the old one, `in-tree` is guided as by LeRobot 0.6.1,
    `rtc` is this policy's own."""
    policy.config.rtc_config = rtc
    # Of the class, as it was when this was imported: a benchmark may put something else in its place.
    predict, processor = partial(PREDICT, policy), RTCProcessor(rtc)

    def in_tree(batch: dict[str, Any], delay: int, left: Tensor | None) -> Tensor:
        if left is None:
            return predict(batch)
        size, config = left.shape[-1], policy.config
        noise = torch.randn(1, config.chunk_size, config.max_action_dim)
        reference = policy.action_space.reference(batch[OBS_STATE])
        if read_remainder(left, delay, noise, reference) is None:
            return predict(batch, noise=noise)
        reference = 0 if reference is None else reference[0]
        left = left - reference
        cache = policy.encode(batch).buffer.read()

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            return processor.denoise_step(
                x_t=x,
                prev_chunk_left_over=left,
                inference_delay=delay,
                time=time[0],
                original_denoise_step_partial=lambda x: policy.model.velocity(cache, x, time),
                execution_horizon=rtc.execution_horizon,
            )

        with torch.no_grad():
            return integrate(velocity, noise, config.num_inference_steps)[..., :size] + reference

    ways: dict[str, Predict] = {
        "naive": lambda batch, delay, left: predict(batch),
        "in-tree": in_tree,
        "rtc": lambda batch, delay, left: predict(batch, inference_delay=delay, prev_chunk_left_over=left),
    }
    return ways[way]
