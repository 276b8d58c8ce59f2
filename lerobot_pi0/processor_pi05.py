"""The pipelines of π0.5: those of π0, but the state is normalized first and then written into the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lerobot.configs import PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.processor import ProcessorStep, ProcessorStepRegistry, make_policy_processor_pipelines
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from lerobot_pi0.configuration_pi0 import Statistics
from lerobot_pi0.configuration_pi05 import Pi05Config
from lerobot_pi0.data.aloha import AdaptFromPiStep, AdaptToPiStep
from lerobot_pi0.errors import UserError
from lerobot_pi0.processor_pi0 import (
    MAX_PROMPT,
    Pi0TokenizerStep,
    Pipelines,
    Prompt,
    clean_prompt,
    standard_steps,
    with_float_vectors,
)

# The lower ends of 256 bins over [-1, 1]. They are exact in float32.
EDGES = torch.linspace(-1, 1, 257, dtype=torch.float64)[:-1]


@ProcessorStepRegistry.register("lerobot_pi05_float_vectors")
@dataclass
class Pi05FloatVectorsStep(ProcessorStep):
    """Integer states and actions become float32: LeRobot's normalizer would round its statistics to their
    type.
    """

    state_size: int | None = None  # of the robot; None: not checked

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        return with_float_vectors(transition, self.state_size)

    def get_config(self) -> dict[str, Any]:
        return {"state_size": self.state_size}

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        return features


@ProcessorStepRegistry.register("lerobot_pi05_tokenizer")
@dataclass
class Pi05TokenizerStep(Pi0TokenizerStep):
    """Instruction and normalized state as token ids, in one text as openpi writes it:
    `Task: open the door, State: 0 128 255;` newline `Action: `.

    It comes after the normalizer. Without `state_in_prompt` the prompt is that of π0.
    """

    state_in_prompt: bool = True

    @property
    def has_few_lengths(self) -> bool:
        return not self.state_in_prompt

    def states(self, count: int, transition: Any) -> Sequence[Tensor | None]:
        if not self.state_in_prompt:
            return super().states(count, transition)
        state = transition[TransitionKey.OBSERVATION].get(OBS_STATE)
        if state is None or state.ndim != 2 or len(state) != count:
            raise UserError(
                f"π0.5 needs the state for its prompt: '{OBS_STATE}' must be ({count}, dims), got "
                f"{None if state is None else tuple(state.shape)}"
            )
        return list(state.cpu())

    def prompt(self, task: str, state: Tensor | None = None) -> Prompt:
        """The prompt for an instruction and a state (dims,), normalized. Raises UserError for a NaN."""
        if not self.state_in_prompt:
            return super().prompt(task)
        assert state is not None
        before = f"Task: {clean_prompt(task[:MAX_PROMPT])}, State: "
        numbers = " ".join(map(str, state_bins(state).tolist()))
        place = range(len(before), len(before) + len(numbers))
        return Prompt((f"{before}{numbers};\nAction: ",), place)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"state_in_prompt": self.state_in_prompt}


def state_bins(state: Tensor) -> Tensor:
    """The number of the bin of each normalized value: 0 to 255 over [-1, 1], -1 below, 255 above.

    Raises UserError for a NaN.
    """
    if state.isnan().any():
        raise UserError(
            f"'{OBS_STATE}' is NaN in dimension {int(state.isnan().nonzero()[0, -1])}, which cannot be "
            "written into the prompt: the robot or the dataset gives no number there (`lerobot-pi0 doctor` "
            "names the frames of a dataset)"
        )
    return torch.bucketize(state.double(), EDGES, right=True) - 1


def make_lerobot_pi05_pre_post_processors(
    config: Pi05Config, dataset_stats: Statistics | None = None
) -> Pipelines:
    """The pipelines of a new policy, with statistics as for π0."""
    steps = standard_steps(config, dataset_stats)
    sizes = config.tokenizer_max_length, config.vlm.vocab_size, config.state_size
    tokenize = Pi05TokenizerStep(config.tokenizer, *sizes, config.state_in_prompt)
    tokenize.state_dict()  # fetches the tokenizer: if it cannot be had, now is the time to say so
    return make_policy_processor_pipelines(
        input_steps=[
            steps.rename_observations,
            steps.add_batch_dim,
            Pi05FloatVectorsStep(config.state_size),
            *[AdaptToPiStep()] * config.adapt_to_pi,
            steps.normalize,
            tokenize,
            steps.to_device,
        ],
        output_steps=[steps.unnormalize, *[AdaptFromPiStep()] * config.adapt_to_pi, steps.to_cpu],
    )
