"""Linear backends, modules that a sampler puts in the place of linear layers: fused, packed, int8 or fp8.

Every backend computes x·Wᵀ + b and, where it can, what follows that in a transformer in the same operation:
adding it to the residual stream, GELU, and the gate of a gated MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lerobot_pi0.model.layers import RMSNorm

type BackendName = Literal["fused", "packed", "int8", "fp8"]


class Backend(nn.Module):
    """Linear layers with one input, side by side: weights (out, in), all with biases (out) or none.

    They are given in the dtype of the `x` to come.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()):
        raise NotImplementedError

    @classmethod
    def gate_and_up(cls, gate: Tensor, up: Tensor) -> tuple[Self, Self | None]:
        """Backends for the two layers of a gated MLP with one input; None where the first computes both."""
        return cls((gate,)), cls((up,))


class Fused(Backend):
    """torch's own product over weights side by side: what `torch.compile` and a GPU want.

    The tensors that it is given become parts of it, so that a GPU holds nothing twice, save what adapters
    have changed (`lerobot-pi0 merge` ends that).
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(_side_by_side(weights), requires_grad=False)
        self.bias = nn.Parameter(_side_by_side(biases), requires_grad=False) if biases else None
        if len(weights) > 1:
            parts = self.weight.split([len(weight) for weight in weights])
            for weight, part in zip(weights, parts, strict=True):
                weight.data = part

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def gated(self, up: nn.Module | None, x: Tensor) -> Tensor:
        gate, upper = self(x).chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * upper

    @classmethod
    def gate_and_up(cls, gate: Tensor, up: Tensor) -> tuple[Self, Self | None]:
        return cls((gate, up)), None


class Packed(Backend):
    """oneDNN's product over a weight reordered for this processor once, instead of in every call.

    These are the operators that `torch.compile` itself calls on a CPU.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()):
        nn.Module.__init__(self)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(_side_by_side(weights).contiguous())
        self.bias = _side_by_side(biases) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")

    def gelu(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "tanh")

    def gated(self, up: nn.Module | None, x: Tensor) -> Tensor:
        assert isinstance(up, Packed)
        return torch.ops.mkldnn._linear_pointwise.binary(x, self.gelu(x), up.weight, None, "mul")

    @staticmethod
    def runs(dtype: torch.dtype) -> bool:
        """Whether this processor and this build of torch have it."""
        if not torch.backends.mkldnn.is_available():
            return False
        return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Int8(Backend):
    """oneDNN's product of 8-bit integers: a scale for each output of the weight, one for each row of `x`.

    Rows are scaled by their largest element when they come. Activations are unsigned around 128: that is what
    the processor's instructions multiply with signed weights.
    """

    ZERO = 128

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()):
        nn.Module.__init__(self)
        weight = _side_by_side(weights).float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        integers = (weight / scale[:, None]).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(integers, None)
        self.scale, self.zeros = scale, torch.zeros(len(scale), dtype=torch.int32)
        self.bias = _side_by_side(biases) if biases else None

    @classmethod
    def quantize(cls, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., in) as unsigned integers, and the scale (..., 1) of each row."""
        # 126 and not 127: in bfloat16 the quotient of the largest element may be rounded up by one.
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 126
        return (x / scale).round_().add_(cls.ZERO).to(torch.uint8), scale

    def multiply(self, integers: Tensor, scale: Tensor) -> Tensor:
        """The product with quantized rows, in the dtype of their scale."""
        product = torch.ops.onednn.qlinear_pointwise(
            integers,
            1.0,
            self.ZERO,
            self.weight,
            self.scale,
            self.zeros,
            None,
            1.0,
            0,
            scale.dtype,
            "none",
            [],
            "",
        ).mul_(scale)
        return product if self.bias is None else product.add_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(*self.quantize(x))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self(x).add_(residual)

    def gated(self, up: nn.Module | None, x: Tensor) -> Tensor:
        assert isinstance(up, Int8)
        rows = self.quantize(x)
        return F.gelu(self.multiply(*rows), approximate="tanh").mul_(up.multiply(*rows))


class Fp8(Fused):
    """A GPU's product of 8-bit floats (e4m3): a scale for each output of the weight, one for each row of `x`.

    Rows are scaled by their largest element when they come. The output is bfloat16, and so `x` has to be. It
    needs compute capability 8.9 (Ada, Hopper, Blackwell).
    """

    LARGEST = torch.finfo(torch.float8_e4m3fn).max

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()):
        nn.Module.__init__(self)
        weight, scale = self.quantize(_side_by_side(weights))
        self.weight, self.scale = nn.Parameter(weight, requires_grad=False), scale.mT.contiguous()
        self.bias = nn.Parameter(_side_by_side(biases), requires_grad=False) if biases else None

    @classmethod
    def quantize(cls, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (rows, in) as 8-bit floats, and the float32 scale (rows, 1) of each row."""
        scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / cls.LARGEST
        return (x / scale).to(torch.float8_e4m3fn), scale

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = self.quantize(x.flatten(0, -2))
        by_row = F.ScalingType.RowWise
        y = F.scaled_mm(rows, self.weight.mT, scale, by_row, self.scale, by_row, bias=self.bias)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def runs(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the device computes it."""
        if device.type != "cuda" or dtype != torch.bfloat16:
            return False
        return torch.cuda.get_device_capability(device) >= (8, 9)


class Folded(nn.Module):
    """A layer over two inputs side by side, of which the first comes as its share of the output already: its
    weight is folded into the layer before."""

    def __init__(self, weight: Tensor, bias: Tensor):
        """`weight` (out, in of the second input) and `bias` (out) of all that is folded."""
        super().__init__()
        self.weight, self.bias = weight, bias

    def ahead(self, second: Tensor) -> Tensor:
        return F.linear(second, self.weight, self.bias)

    def joined(self, first: Tensor, ahead: Tensor) -> Tensor:
        return first + ahead


class Scaled(RMSNorm):
    """An RMS norm whose scale is computed once. It shares all else with its norm, hooks too."""

    def __init__(self, norm: RMSNorm):
        vars(self).update(vars(norm))
        self._scale = norm.scale()

    def scale(self) -> Tensor:
        return self._scale


class Modulations(nn.Module):
    """Linear layers of one condition, computed ahead of the tokens: a table (..., layer, out) that the norms
    read their `Row` of. What depends on the time alone is then computed once for each number of steps."""

    def __init__(self, names: Sequence[str], tensor: Callable[[str], Tensor]):
        """`tensor` gives the layers' parameters by name; none is kept."""
        super().__init__()
        self.names, self.tensor = names, tensor

    def forward(self, condition: Tensor) -> Tensor:
        layers = ((self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias")) for name in self.names)
        return torch.stack([F.linear(condition, *layer) for layer in layers], -2)


class Row(nn.Module):
    """In the place of a linear layer of the condition: its part of the table."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(self, table: Tensor) -> Tensor:
        return table[..., self.index, :]


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


BACKENDS: dict[BackendName, type[Backend]] = {"fused": Fused, "packed": Packed, "int8": Int8, "fp8": Fp8}
