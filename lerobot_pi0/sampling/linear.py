"""Forms that a sampler can give the weights of a linear layer: fused, packed or int8.

Every form computes x·Wᵀ + b and offers what surrounds it in a transformer as part of the product where it
can: adding it to the residual stream, GELU, and the gate of a gated MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

type Form = Literal["fused", "packed", "int8"]


class Product(Protocol):
    """Linear layers with one input, side by side: weights (out, in), all with biases (out) or none.

    They are given in the dtype of the `x` to come.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()): ...

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        ...

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """Its output added to `residual`."""
        ...

    def gelu(self, x: Tensor) -> Tensor:
        """GELU (the tanh approximation) of its output."""
        ...

    @classmethod
    def gated(cls, gate: Tensor, up: Tensor) -> Callable[[Tensor], Tensor]:
        """The hidden layer of a gated MLP: x ↦ gelu(gate x) · (up x)."""
        ...


class Fused:
    """torch's own product over weights side by side: what `torch.compile` and a GPU want.

    The tensors that it is given become parts of it, so that a GPU holds nothing twice, save what adapters
    have changed (`lerobot-pi0 merge` ends that). They are parameters: a CUDA graph reads these where they
    are, and copies any other tensor to a place of its own in every call.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()):
        self.weight = nn.Parameter(_side_by_side(weights), requires_grad=False)
        self.bias = nn.Parameter(_side_by_side(biases), requires_grad=False) if biases else None
        if len(weights) > 1:
            parts = self.weight.split([len(weight) for weight in weights])
            for weight, part in zip(weights, parts, strict=True):
                weight.data = part

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(self(x), approximate="tanh")

    @classmethod
    def gated(cls, gate: Tensor, up: Tensor) -> Callable[[Tensor], Tensor]:
        both = cls((gate, up))

        def hidden(x: Tensor) -> Tensor:
            gated, upper = both(x).chunk(2, dim=-1)
            return F.gelu(gated, approximate="tanh") * upper

        return hidden


class Packed:
    """oneDNN's product over a weight reordered for this processor once, instead of in every call.

    These are the operators that `torch.compile` itself calls on a CPU.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(_side_by_side(weights).contiguous())
        self.bias = _side_by_side(biases) if biases else None

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")

    def gelu(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "tanh")

    @classmethod
    def gated(cls, gate: Tensor, up: Tensor) -> Callable[[Tensor], Tensor]:
        gate_proj, up_proj = cls((gate,)), cls((up,))

        def hidden(x: Tensor) -> Tensor:
            gated = gate_proj.gelu(x)
            return torch.ops.mkldnn._linear_pointwise.binary(x, gated, up_proj.weight, None, "mul")

        return hidden

    @staticmethod
    def runs(dtype: torch.dtype) -> bool:
        """Whether this processor and this build of torch have it."""
        if not torch.backends.mkldnn.is_available():
            return False
        return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Int8:
    """oneDNN's product of 8-bit integers: a scale for each output of the weight, one for each row of `x`.

    Rows are scaled by their largest element when they come. Activations are unsigned around 128: that is what
    the processor's instructions multiply with signed weights.
    """

    ZERO = 128

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()):
        weight = _side_by_side(weights).float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        integers = (weight / scale[:, None]).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(integers, None)
        self.scale, self.zeros = scale, torch.zeros(len(scale), dtype=torch.int32)
        self.bias = _side_by_side(biases) if biases else None

    @classmethod
    def quantise(cls, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., in) as unsigned integers, and the scale (..., 1) of each row."""
        # 126 and not 127: in bfloat16 the quotient of the largest element may be rounded up by one.
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 126
        return (x / scale).round_().add_(cls.ZERO).to(torch.uint8), scale

    def multiply(self, integers: Tensor, scale: Tensor) -> Tensor:
        """The product with quantised rows, in the dtype of their scale."""
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

    def __call__(self, x: Tensor) -> Tensor:
        return self.multiply(*self.quantise(x))

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self(x).add_(residual)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(self(x), approximate="tanh")

    @classmethod
    def gated(cls, gate: Tensor, up: Tensor) -> Callable[[Tensor], Tensor]:
        gate_proj, up_proj = cls((gate,)), cls((up,))

        def hidden(x: Tensor) -> Tensor:
            rows = cls.quantise(x)
            return F.gelu(gate_proj.multiply(*rows), approximate="tanh").mul_(up_proj.multiply(*rows))

        return hidden


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


FORMS: dict[Form, type[Product]] = {"fused": Fused, "packed": Packed, "int8": Int8}
