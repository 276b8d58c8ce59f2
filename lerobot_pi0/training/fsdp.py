"""Parameters that FSDP has cut into shards, one for each process: recognized, and gathered to be saved."""

from typing import cast

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def is_sharded(module: nn.Module) -> bool:
    """Whether a process has only its share of the module's parameters, by FSDP of either version."""
    return any(isinstance(part, FullyShardedDataParallel) for part in module.modules()) or any(
        isinstance(parameter, DTensor) for parameter in module.parameters()
    )


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict, with the names and shapes that it has without FSDP.

    If it is sharded (by `fully_shard`), all processes must call this; all but the first get an empty one.
    """
    if not is_sharded(module):
        return module.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(module, options=options))
