"""Random weights for networks that are measured and never used, made as fast as memory is written."""

import functools

import torch
from torch import Tensor, nn

_BLOCK = (1 << 22) + 15  # odd: no two rows of a matrix are alike


@functools.cache
def _block_twice(device: str) -> Tensor:
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    return torch.cat((block, block))


class MadeUpWeights:
    """Random bfloat16 tensors, the same on every device.

    One block of normal numbers over and over; matrices have the spread fan_in^-0.5, vectors 0.1.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self._twice, self._start = _block_twice(str(device)), 0

    def like(self, tensor: Tensor) -> Tensor:
        """Values of a tensor's shape, other ones in each call."""
        size = tensor.numel()
        spread = (size / len(tensor)) ** -0.5 if tensor.ndim > 1 else 0.1
        values = (self._twice[self._start : self._start + min(size, _BLOCK)] * spread).bfloat16()
        self._start = (self._start + size) % _BLOCK
        return values.repeat(-(-size // _BLOCK))[:size].view(tensor.shape)

    def fill(self, module: nn.Module, frozen_dtype: torch.dtype) -> None:
        """Replace the parameters, on the meta device or not: float32 what trains, else `frozen_dtype`."""
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                dtype = torch.float32 if parameter.requires_grad else frozen_dtype
                values = self.like(parameter).to(dtype)
                setattr(owner, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
