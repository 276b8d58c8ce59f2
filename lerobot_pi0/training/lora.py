"""LoRA layers inside the network: their precision, and folding them into the weights."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lerobot_pi0.errors import UserError
from lerobot_pi0.model.layers import Linear


def compute_as_given(model: nn.Module) -> None:
    """Let adapters, whose weights are float32, compute in the dtype of their input, as the network does.

    PEFT casts the input to the weights' dtype instead, and keeps that copy for the backward pass.
    """
    for _, layer in _lora_layers(model):
        layer.cast_input_dtype_enabled = False
        for factors in (layer.lora_A, layer.lora_B):
            for name, factor in factors.items():
                factors[name] = _following(factor)


def fold(model: nn.Module, name: str, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
    """A parameter, by its name in a network without adapters, with these in it; float32 where they change it.

    `tensors` may give the parameters without adapters in the network's stead.
    """
    module_name, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(module_name)
    tensor = getattr(module, leaf)  # of a module that trains in full, the trained copy's
    if tensors is not None and not trains_in_full(model, name):
        tensor = tensors[name]
    if leaf != "weight" or not hasattr(module, "get_delta_weight"):
        return tensor
    if module.disable_adapters:
        if module.merged:
            raise UserError(f"the adapters of '{module_name}' are merged and disabled: unmerge them first")
        return tensor
    for adapter in () if module.merged else module.active_adapters:
        if adapter not in module.lora_A:
            continue
        if adapter in module.lora_variant or module.lora_bias[adapter]:
            kind = "a bias (lora_bias)" if module.lora_bias[adapter] else "a variant of LoRA (as DoRA)"
            raise UserError(
                f"the adapter '{adapter}' has {kind} in '{module_name}', which cannot be folded into the "
                "weights: train plain LoRA adapters"
            )
        tensor = module.get_delta_weight(adapter).float().add_(tensor)
    return tensor


def adapted_layers(model: nn.Module) -> list[Any]:
    """The layers that PEFT has put in the place of others."""
    return [module for module in model.modules() if hasattr(module, "active_adapters")]


def adapter_state(layers: Sequence[Any]) -> list[Any]:
    """What decides how adapters of `adapted_layers` act, besides their parameters: which are active, merged,
    how scaled."""
    return [
        (
            tuple(layer.active_adapters),
            layer.disable_adapters,
            tuple(layer.merged_adapters),
            tuple(getattr(layer, "scaling", {}).items()),
        )
        for layer in layers
    ]


def trains_in_full(model: nn.Module, name: str) -> bool:
    """Whether a parameter, by its name in a network without adapters, is in a module that trains in full."""
    modules = name.split(".")[:-1]
    paths = (".".join(modules[: i + 1]) for i in range(len(modules)))
    return any(hasattr(model.get_submodule(path), "modules_to_save") for path in paths)


def summary(model: nn.Module) -> str:
    """One line: how many parameters train, adapters of which rank are where, and what trains in full."""
    counts = Counter(
        (name.partition(".")[0], rank) for name, layer in _lora_layers(model) for rank in layer.r.values()
    )
    in_full = [name for name, module in model.named_modules() if hasattr(module, "modules_to_save")]
    trained, total = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True)
    )
    places = ", ".join(f"rank {rank} in {n} layers of {stack}" for (stack, rank), n in counts.items())
    return (
        f"LoRA: {trained / 1e6:.3g} of {total / 1e6:.4g} million parameters train: {places}; "
        f"in full: {', '.join(in_full) or 'nothing'}"
    )


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers around those that have adapters, by name."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            yield name, module


def _following(factor: nn.Module) -> Linear:
    """A factor of an adapter, the same parameters, as a layer that follows its input's dtype."""
    assert isinstance(factor, nn.Linear)
    with torch.device("meta"):
        linear = Linear(factor.in_features, factor.out_features, bias=factor.bias is not None)
    linear.weight, linear.bias = factor.weight, factor.bias
    return linear
