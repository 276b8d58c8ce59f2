"""`lerobot-pi0 convert`: convert a policy from one layout to another, and verify the result.

Every source is read into a `sources.Policy`, and every target is written from one (`targets`). Tensors are
streamed in pieces. The target appears when it is complete and verified.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from torch import Tensor, nn

from lerobot_pi0.checkpoints.files import WEIGHTS_FILE, Checkpoint, load_weights
from lerobot_pi0.checkpoints.golden_actions import fixed_input, write_golden_actions
from lerobot_pi0.checkpoints.layouts import to_openpi
from lerobot_pi0.conversion.flags import ConvertConfig
from lerobot_pi0.conversion.output import unfinished_folder
from lerobot_pi0.conversion.sources import IN_TREE, Policy, read_policy
from lerobot_pi0.conversion.streaming import digest, write_safetensors
from lerobot_pi0.conversion.targets import write_in_tree, write_openpi, write_ours
from lerobot_pi0.errors import CommandError
from lerobot_pi0.inputs.policy import policy_class

EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
# Policies of up to this many parameters are run in both implementations without being asked.
_COMPARED = 200_000_000
# Largest difference of normalized actions in float32 between two implementations, over the largest action:
# the time embedding of another precision alone makes 2e-4.
_TOLERANCE = 1e-3


def main(config: ConvertConfig) -> str:
    """Run `lerobot-pi0 convert`."""
    return convert(config)


def convert(flags: ConvertConfig) -> str:
    """Write the target, which appears when it is complete and equal to the source. Returns a summary.

    Raises OutputExistsError for a target that exists, CheckpointError or UserError for a source that is
    damaged, of another family or lacks what the target needs, UnavailableError for a missing tokenizer.
    """
    with unfinished_folder(flags.target, "TARGET") as folder:
        policy = read_policy(flags, scratch=folder)
        write = {"lerobot_pi0": write_ours, "lerobot": write_in_tree, "openpi-pytorch": write_openpi}[
            flags.to
        ]
        summary = write(policy, folder, flags)  # small files first: errors come before the weights are read
        digests = _write_weights(policy, folder, flags)
        proof = _proof(policy, folder, digests, flags)
    return "\n".join([f"{flags.target}: {proof}", *summary])


def _write_weights(policy: Policy, folder: Path, flags: ConvertConfig) -> dict[str, str]:
    """The weights in the target's layout; returns their digests by our names."""
    dtype = None if flags.dtype is None else getattr(torch, flags.dtype)
    meta = {name: tensor.to(dtype=dtype) for name, tensor in policy.meta.items()}
    names = {name: name for name in meta}  # theirs → ours
    prefix = "" if flags.to == "openpi-pytorch" else "model."
    if flags.to == "lerobot_pi0":
        names = {prefix + name: name for name in meta}
    else:
        names = {prefix + theirs: ours for theirs, ours in to_openpi(names).items()}
    wanted = {theirs: meta[ours] for theirs, ours in names.items()}
    if flags.to != "lerobot_pi0":
        # Both load strictly, and neither uses it.
        vocabulary, width = policy.config.vlm.vocab_size, policy.config.expert.width
        head = torch.empty(vocabulary, width, dtype=meta["token_embedding.weight"].dtype, device="meta")
        wanted[prefix + EXPERT_HEAD] = head

    def read(theirs: str) -> Tensor:
        if theirs in names:
            return policy.tensors[names[theirs]]
        return torch.zeros(1, dtype=wanted[theirs].dtype).expand(wanted[theirs].shape)

    digests = write_safetensors(folder / WEIGHTS_FILE, wanted, read)
    return {ours: digests[theirs] for theirs, ours in names.items()}


def _proof(policy: Policy, folder: Path, digests: dict[str, str], flags: ConvertConfig) -> str:
    """Read the target back and compare it with the source. Returns the result as text."""
    written = Checkpoint(folder)
    if written.keys() != digests.keys():
        raise CommandError(
            f"{folder} does not read back as it was written: {written.keys() ^ digests.keys()}"
        )
    whole, parameters, dtypes = hashlib.blake2b(digest_size=8), 0, set()
    for name in sorted(digests):
        tensor = written[name]
        if digest(tensor) != digests[name]:
            raise CommandError(
                f"{name} reads back from {folder} differently from what was written: a faulty disk?"
            )
        whole.update(f"{name} {digests[name]}".encode())
        parameters += tensor.numel()
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
    text = (
        f"{len(digests)} tensors, {parameters:,} parameters ({' and '.join(sorted(dtypes))}), from "
        f"{policy.layout}; "
        f"read back, all equal ({whole.hexdigest()})."
    )
    if flags.to == "lerobot_pi0":
        ours = policy_class(policy.config).from_pretrained(
            folder, config=replace(policy.config, device="cpu")
        )
        ours.sampler.release()  # it holds views of the weights, which would keep them in memory
        _give_back(ours.model, written)
        write_golden_actions(folder, ours.config, ours.predict_with_network, ours.device)
        text += " Its golden actions are beside it."
    in_tree = folder if flags.to == "lerobot" else policy.folder if policy.layout in IN_TREE else None
    if in_tree is None or not (parameters <= _COMPARED if flags.compare is None else flags.compare):
        return text
    name, (difference, largest) = policy.family.name, _compare(policy, folder, in_tree)
    if not difference <= _TOLERANCE * max(largest, 1):
        raise CommandError(
            f"LeRobot's own {name} and ours act differently on the same weights, by {difference:.1e} (the "
            f"largest action is {largest:.2f}): nothing was written. Please report this"
        )
    return (
        f"{text} Run as LeRobot's own {name} and as ours: actions differ by {difference:.1e}, of "
        f"{largest:.2f}."
    )


def _give_back(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Free each module's memory-mapped weights after its forward."""

    def map_anew(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: object) -> None:
            for name, parameter in module.named_parameters(path, recurse=False):
                if (unread := checkpoint[name]).dtype == parameter.dtype:
                    parameter.data = unread

        return hook

    for path, module in model.named_modules():
        module.register_forward_hook(map_anew(path))


def _compare(policy: Policy, target: Path, in_tree: Path) -> tuple[float, float]:
    """Largest difference of a chunk in float32 between ours and LeRobot's own, and the largest action."""
    # What makes relative actions absolute is in its processors. It knows no other solver.
    config = replace(
        policy.config,
        device="cpu",
        dtype="float32",
        relative_actions=False,
        reference_state=None,
        solver="euler",
    )
    with torch.device("meta"):
        ours = policy_class(config)(config).eval()
    load_weights(ours.model, Checkpoint(target), dict.fromkeys(policy.meta, torch.float32))
    batch, noise = fixed_input(config)
    size = config.vision.image_size  # the model's own, so that resizing is not compared
    batch = {key: of[:, :, :size] / 255 if key in config.image_features else of for key, of in batch.items()}
    wanted = ours.predict_action_chunk(batch, noise=noise)
    theirs_config: Any = PreTrainedConfig.from_pretrained(in_tree)
    theirs_config.device, theirs_config.dtype = "cpu", "float32"
    with contextlib.redirect_stdout(io.StringIO()):
        theirs: Any = get_policy_class(policy.family.in_tree).from_pretrained(in_tree, config=theirs_config)
    found = theirs.predict_action_chunk(batch, noise=noise)
    return (found - wanted).abs().max().item(), wanted.abs().max().item()
