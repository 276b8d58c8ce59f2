"""AdamW that carries a run's own state: the weights that train, and how many batches were drawn.

LeRobot calls `from_pretrained` for a resumed run as for a fine-tune, and only the resumed one restores its
optimizer. So `model.safetensors` holds the EMA, which is what people run and fine-tune, and the optimizer's
state holds the weights that it steps on.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from lerobot.optim import AdamWConfig, OptimizerConfig

from lerobot_pi0.training.ema import ParameterGroups

WEIGHTS = "weights"  # a parameter's own, in the optimizer's state
DRAWS = "draws"  # in its first group


class ResumableAdamW(torch.optim.AdamW):
    """AdamW whose state holds all that a run needs to go on as if it had not stopped."""

    def __init__(self, groups: ParameterGroups, **settings: Any):
        self._trained = groups.trained
        super().__init__(groups, **settings)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        groups = [{**group, DRAWS: self._trained.num_draws} for group in state["param_groups"]]
        of = {i: dict(values) for i, values in state["state"].items()}
        for i, weights in enumerate(self._trained.weights()):
            of.setdefault(i, {})[WEIGHTS] = weights
        return {**state, "state": of, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = [{k: v for k, v in group.items() if k != DRAWS} for group in state_dict["param_groups"]]
        weights = {i: values[WEIGHTS] for i, values in state_dict["state"].items() if WEIGHTS in values}
        self._trained.restore(weights, state_dict["param_groups"][0].get(DRAWS, 0))
        moments = {
            i: {name: value for name, value in values.items() if name != WEIGHTS}
            for i, values in state_dict["state"].items()
        }
        of = {i: values for i, values in moments.items() if values}
        super().load_state_dict({**state_dict, "state": of, "param_groups": groups})


@OptimizerConfig.register_subclass("lerobot_pi0_adamw")
@dataclass
class ResumableAdamWConfig(AdamWConfig):
    """AdamW over what `Pi0Policy.get_optim_params` gives."""

    def build(self, params: Any) -> torch.optim.Optimizer:
        settings = asdict(self)
        del settings["grad_clip_norm"]
        if not isinstance(params, ParameterGroups):
            return torch.optim.AdamW(params, **settings)
        return ResumableAdamW(params, **settings)
