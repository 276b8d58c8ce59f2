"""Layers that are compiled for training, each by itself.

All layers of a stack share one graph, so compiling takes seconds, where the network as one graph takes
minutes.
"""

import functools
import logging
from importlib import import_module
from typing import Any

from torch import nn

from lerobot_pi0.model.layers import Layer

logger = logging.getLogger(__name__)

_GRAPHS = 64


def compile_layers(network: nn.Module, on: bool) -> None:
    """Let the network's layers run compiled or not, from their next call on.

    With FSDP, which replaces parameters by their shards and hooks into calls, they stay as they are.
    """
    if on:
        from lerobot_pi0.training.fsdp import is_sharded  # costs a second, and most processes do not train

        if is_sharded(network):
            on = False
            _warn_of_shards()
        # Language model, its last layer and action expert share code, and each has several shapes: of the
        # last batch of an epoch, of prompts. Beyond the limit torch goes on without compiling.
        dynamo: Any = import_module("torch._dynamo")
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _GRAPHS)
    for module in network.modules():
        if isinstance(module, Layer):
            module.compiled = on


@functools.cache  # once
def _warn_of_shards() -> None:
    logger.warning("--policy.backend=compile: with FSDP layers are not compiled")
