"""A network with linear backends in its linear layers' places: the same forwards over other modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lerobot_pi0.model import Network
from lerobot_pi0.model.gemma import Decoder
from lerobot_pi0.model.layers import RMSNorm
from lerobot_pi0.model.pi05 import AdaptiveRMSNorm
from lerobot_pi0.sampling.linear import BACKENDS, Backend, BackendName, Folded, Modulations, Row, Scaled
from lerobot_pi0.training.lora import fold


def swapped(model: Network, backend: BackendName, tensors: Mapping[str, Tensor] | None = None) -> Network:
    """The network over linear backends. Embeddings and all else are shared with `model`.

    `tensors` may give the weights of linear layers in the network's stead, under its names.
    """
    read = _Reader(model, backend, tensors, model.dtype)
    vision = [
        _copy(
            layer,
            q_proj=read(*(f"vision.layers.{i}.{part}_proj" for part in "qkv")),
            k_proj=None,
            v_proj=None,
            **{part: read(f"vision.layers.{i}.{part}") for part in ("o_proj", "up_proj", "down_proj")},
        )
        for i, layer in enumerate(model.vision.layers)
    ]
    # Around the experts all is float32. Of the action expert, whose products are small, fp8 makes none
    # faster.
    on_gpu = backend in ("fused", "fp8")
    exact = _Reader(model, "fused" if on_gpu else "packed", tensors, torch.float32)
    of_expert = _Reader(model, "fused", tensors, model.dtype) if backend == "fp8" else read
    around: dict[str, nn.Module] = {}
    for joined, first in model.folds.items():
        around[first], around[joined] = exact.fold(first, joined)
    parts = {"vision", "token_embedding", "vlm", "expert", *around}
    around |= {name: exact(name) for name, _ in model.named_children() if name not in parts}
    return _copy(
        model,
        vision=_copy(model.vision, layers=nn.ModuleList(vision), projector=read("vision.projector")),
        vlm=_decoder(model.vlm, "vlm", read, keys_values_last=True),
        expert=_decoder(model.expert, "expert", of_expert),
        **around,
    )


def with_modulations_ahead(model: Network, tensors: Mapping[str, Tensor] | None = None) -> Network:
    """The network over adaptive norms whose modulations `prepare` gives: nothing else reads their parameters.
    A network without adaptive norms as it is. `tensors` as in `swapped`."""
    expert = model.expert
    names = [name for name, module in expert.named_modules() if isinstance(module, AdaptiveRMSNorm)]
    if not names:
        return model
    rows = {name: _copy(expert.get_submodule(name), dense=Row(i)) for i, name in enumerate(names)}
    layers = [
        _copy(layer, **{norm: rows[f"layers.{i}.{norm}"] for norm in ("attention_norm", "mlp_norm")})
        for i, layer in enumerate(expert.layers)
    ]
    read = _Reader(model, "fused", tensors, torch.float32)
    ahead = Modulations([f"expert.{name}.dense" for name in names], read.tensor)
    return _copy(model, expert=_copy(expert, layers=nn.ModuleList(layers), norm=rows["norm"], ahead=ahead))


class _Reader:
    """Makes backends of a network's linear layers, by their names there."""

    def __init__(
        self, model: Network, backend: BackendName, tensors: Mapping[str, Tensor] | None, dtype: torch.dtype
    ):
        self._model, self._tensors = model, tensors
        self._backend, self._dtype = BACKENDS[backend], dtype

    def __call__(self, *names: str) -> Backend:
        """One layer, or several with the same input as one."""
        with_bias = [name for name in names if self._model.get_submodule(name).bias is not None]
        weights = [self.tensor(f"{name}.weight") for name in names]
        return self._backend(weights, [self.tensor(f"{name}.bias") for name in with_bias])

    def gate_and_up(self, gate: str, up: str) -> tuple[Backend, Backend | None]:
        """The two layers of a gated MLP with one input."""
        return self._backend.gate_and_up(self.tensor(f"{gate}.weight"), self.tensor(f"{up}.weight"))

    def fold(self, first: str, joined: str) -> tuple[Backend, Folded]:
        """A layer, and one over its output and a second input, with one product over the first's input."""
        over_first, over_second = self.tensor(f"{joined}.weight").chunk(2, dim=1)
        bias = self.tensor(f"{joined}.bias") + over_first @ self.tensor(f"{first}.bias")
        return self._backend([over_first @ self.tensor(f"{first}.weight")]), Folded(over_second, bias)

    def tensor(self, name: str) -> Tensor:
        """A parameter as the network computes with it: PEFT's adapters are part of it."""
        tensor = fold(self._model, name) if self._tensors is None else self._tensors[name]
        return tensor.to(self._dtype)


def _decoder(decoder: Decoder, name: str, read: _Reader, keys_values_last: bool = False) -> Decoder:
    """`keys_values_last`: of the last layer only keys and values are ever computed."""
    layers = []
    for i, layer in enumerate(decoder.layers):
        part = f"{name}.layers.{i}."
        if keys_values_last and i == len(decoder.layers) - 1:
            unused = dict.fromkeys(("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
            norm, backend = _scaled(layer.attention_norm), read(f"{part}k_proj", f"{part}v_proj")
            layers.append(_copy(layer, attention_norm=norm, k_proj=backend, **unused))
            continue
        gate, up = read.gate_and_up(f"{part}gate_proj", f"{part}up_proj")
        layers.append(
            _copy(
                layer,
                q_proj=read(*(f"{part}{which}_proj" for which in "qkv")),
                k_proj=None,
                v_proj=None,
                gate_proj=gate,
                up_proj=up,
                **{which: read(f"{part}{which}") for which in ("o_proj", "down_proj")},
                **{which: _scaled(layer.get_submodule(which)) for which in ("attention_norm", "mlp_norm")},
            )
        )
    return _copy(decoder, layers=nn.ModuleList(layers), norm=_scaled(decoder.norm))


def _scaled(norm: Any) -> nn.Module:
    """A norm whose scale is computed once, where it depends on the weight alone."""
    return Scaled(norm) if isinstance(norm, RMSNorm) else norm


def _copy(module: Any, **replaced: nn.Module | None) -> Any:
    """A module, in eval mode, that shares all of another's but the children that are replaced."""
    other = copy.copy(module)
    other._modules, other.training = {**module._modules, **replaced}, False
    return other
