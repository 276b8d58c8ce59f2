"""The machine: the policy's device exists, and the policy fits into its memory."""

from collections.abc import Iterator

import psutil
import torch
from lerobot.utils.device_utils import is_torch_device_available

from lerobot_pi0.checkpoints.reading import read_json
from lerobot_pi0.inputs.policy import policy_class
from lerobot_pi0.tools.doctor.finding import Finding, error, fine, note
from lerobot_pi0.tools.doctor.inputs import Inputs
from lerobot_pi0.tools.memory import estimate_memory
from lerobot_pi0.tools.plan import CONTEXT, FRAGMENTATION, GIGABYTE, on_cpu

TRAINING_BATCH = 8


def device_is_here(inputs: Inputs) -> Iterator[Finding]:
    """The device that the checkpoint names is one of this machine."""
    named = read_json(inputs.folder / "config.json").get("device")
    if named and not is_torch_device_available(named):
        yield note(
            f"the checkpoint was trained on '{named}', which this machine does not have",
            f"LeRobot then takes '{inputs.config.device}'",
            f"--policy.device={inputs.config.device} says so on purpose",
        )


def policy_fits(inputs: Inputs) -> Iterator[Finding]:
    """Running the policy needs less memory than there is."""
    config = inputs.config
    with torch.device("meta"):
        model = policy_class(config)(config).model
    size = getattr(torch, config.dtype).itemsize
    needs = sum(parameter.numel() for parameter in model.parameters()) * size
    if config.device and config.device.startswith("cuda"):
        memory, where = torch.cuda.get_device_properties(config.device).total_memory, "GPU"
    else:
        memory, where = psutil.virtual_memory().total, "machine"
    if needs > memory:
        yield error(
            f"the policy's weights do not fit into this {where}",
            f"{needs / GIGABYTE:.1f} GB in {config.dtype}, the {where} has {memory / GIGABYTE:.1f} GB",
            "--policy.dtype=bfloat16 halves them, --policy.backend=int8 halves them again on a CPU; or a "
            "larger machine",
        )
    else:
        yield fine(
            f"weights {_gigabytes(needs)} in {config.dtype}, the {where} has {_gigabytes(memory)}; training "
            f"it in batches of {TRAINING_BATCH} takes {_gigabytes(_training(inputs))}"
        )


def _training(inputs: Inputs) -> float:
    gpu = bool(inputs.config.device and not inputs.config.device.startswith("cpu"))
    of = estimate_memory(inputs.config, device="gpu" if gpu else "cpu")
    if gpu:
        return of.held + (1 + FRAGMENTATION) * of.step(TRAINING_BATCH) + CONTEXT
    return on_cpu(of, TRAINING_BATCH)


def _gigabytes(num_bytes: float) -> str:
    if num_bytes < GIGABYTE / 10:
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{num_bytes / GIGABYTE:.1f} GB"
