"""Adapters and the weights that they were trained over → one plain checkpoint, which acts the same.

Nothing else then needs PEFT, and sampling on a GPU no longer holds the folded weights beside the base's.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lerobot_pi0.checkpoints.files import ADAPTER_CONFIG, WEIGHTS_FILE, find_checkpoint, load_weights
from lerobot_pi0.checkpoints.loading import read_config
from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.conversion.flags import MergeConfig
from lerobot_pi0.conversion.output import copy_processors, unfinished_folder
from lerobot_pi0.errors import CheckpointError, CommandError
from lerobot_pi0.inputs.policy import load_adapters, policy_class
from lerobot_pi0.modeling_pi0 import Pi0Policy
from lerobot_pi0.training.lora import fold, trains_in_full

# Beyond this difference of normalized actions something is wrong, and not rounding.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def main(config: MergeConfig) -> str:
    """Run `lerobot-pi0 merge`."""
    difference, largest = merge(config.adapter, config.output)
    return (
        f"{config.output} is a plain checkpoint. On a made-up observation, with the same noise, its actions "
        f"differ from those of base and adapters by at most {difference:.1e} (the largest is {largest:.2f}; "
        "normalized)."
    )


def merge(adapter: str, output: Path) -> tuple[float, float]:
    """Write the checkpoint that base and adapters are together; it appears when complete and compared.

    Sums are taken in float32. What adapters change keeps the base's dtype, or has the policy's if that is
    wider; what trained in full is float32; all else stays as it is in the base's file.
    Returns the largest difference of the actions, normalized, and the largest action.
    Raises FileExistsError for an output that exists, CheckpointError where there are no adapters,
    RuntimeError when the actions differ.
    """
    with unfinished_folder(output, "--output") as unfinished:
        folder = find_checkpoint(adapter)
        policy, device = _load(adapter, folder)
        wanted = _chunk(policy)
        config = replace(
            policy.config,
            use_peft=False,
            base_fingerprint=None,
            pretrained_path=None,
            pretrained_revision=None,
        )
        merged = _folded(policy, config)
        del policy
        merged.config.device = device
        merged.save_pretrained(unfinished)
        del merged
        copy_processors(folder, unfinished)
        config.device = "cpu"
        found = _chunk(policy_class(config).from_pretrained(unfinished, config=config))
        difference = (found - wanted).abs().max().item()
        if not difference <= TOLERANCE[getattr(torch, config.dtype)]:
            raise CommandError(
                f"the merged policy's actions differ from those of base and adapters by {difference:.1e}: "
                "nothing was written. Please report this, with the adapter's config"
            )
    return difference, wanted.abs().max().item()


def _load(adapter: str, folder: Path) -> tuple[Pi0Policy, str | None]:
    """The base with the adapters in it, on the CPU; and the device that the config names."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"'{adapter}' holds no adapters (no {ADAPTER_CONFIG}). lerobot-train --peft.method_type=LORA "
            "leaves them in outputs/…/checkpoints/last/pretrained_model"
            + (", and this is a plain checkpoint already" if (folder / WEIGHTS_FILE).is_file() else "")
        )
    config: Any = read_config(folder)
    if not isinstance(config, Pi0Config):
        raise CheckpointError(
            f"'{adapter}' holds adapters of another policy, of type '{config.type}'. For LeRobot's own π0 "
            "and π0.5: merge them there (PEFT's merge_and_unload, then save_pretrained), and convert the "
            "result (lerobot-pi0 convert)"
        )
    device, config.device, config.backend = config.device, "cpu", "auto"
    return load_adapters(adapter, folder, config), device


def _folded(policy: Pi0Policy, config: Pi0Config) -> Pi0Policy:
    """The policy without adapters, their effect in its weights."""
    assert policy.base is not None
    with torch.device("meta"):
        merged = policy_class(config)(config)
    checkpoint, tensors = policy.base.checkpoint, {}
    for name in merged.model.state_dict():
        tensor, was = fold(policy.model, name, checkpoint), checkpoint[name].dtype
        if tensor.dtype != was and not trains_in_full(policy.model, name):
            tensor = tensor.to(torch.promote_types(was, policy.model.dtype))
        tensors[name] = tensor
    load_weights(merged.model, tensors)
    return merged


def _chunk(policy: Pi0Policy) -> Tensor:
    """Actions for a made-up observation and noise, always the same, by the network as it is written down.

    The sampler folds adapters as `merge` does, and would leave out what `merge` leaves out.
    """
    config, generator = policy.config, torch.Generator().manual_seed(0)
    noise = torch.randn(1, config.chunk_size, config.max_action_dim, generator=generator)
    observation = config.example_observation()
    return policy.predict_with_network(observation, noise, config.num_inference_steps, config.solver)
