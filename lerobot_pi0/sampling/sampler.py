"""Sampling from a trained π0 without wasted work: the same actions as `Pi0.sample`, to rounding.

A `Sampler` takes the network as an argument and keeps the weights of its linear layers in a form of its own
(`sampling.linear`). What depends on the observation alone is computed once per observation: keys and
values of each layer go into a buffer with room for the actions, which every denoising step reads in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lerobot_pi0.lerobot_compat import in_any_thread
from lerobot_pi0.model import Observation, Pi0
from lerobot_pi0.model.flow import embed_time, integrate, step_times
from lerobot_pi0.model.gemma import Cache, DecoderLayer, Rotation, rotate, rotation
from lerobot_pi0.model.layers import attend
from lerobot_pi0.model.siglip import VisionLayer
from lerobot_pi0.sampling.linear import FORMS, Form, Product
from lerobot_pi0.sampling.rtc import Decided, Guidance, guided
from lerobot_pi0.training.lora import fold

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Context:
    """All that an observation costs once. Sampling writes behind the prefix and the state, never over them.

    It may be sampled from any number of times, one after the other.
    """

    keys: tuple[Float[Tensor, "b k t d"], ...]  # of each layer: prefix, state, room for the actions
    values: tuple[Float[Tensor, "b k t d"], ...]
    mask: Bool[Tensor, "b t"] | None  # None: all of them are valid
    by: Rotation
    anchor: Float[Tensor, "b d"] | None = None  # relative actions are made absolute by adding it

    @property
    def batch_size(self) -> int:
        return len(self.keys[0])

    def cache(self, num_actions: int) -> Cache:
        """Prefix and state as the network itself reads them, without a copy."""
        end = self.keys[0].shape[2] - num_actions
        mask = self.mask
        if mask is None:
            mask = self.keys[0].new_ones((self.batch_size, end), dtype=torch.bool)
        layers = [(k[:, :, :end], v[:, :, :end]) for k, v in zip(self.keys, self.values, strict=True)]
        return Cache(layers, mask[:, :end])

    def repeat(self, times: int) -> Context:
        """The context of a batch in which every observation stands `times` times in a row."""
        if times == 1:
            return self
        cos, sin = (x.repeat_interleave(times, 0) for x in self.by)
        return Context(
            keys=tuple(x.repeat_interleave(times, 0) for x in self.keys),
            values=tuple(x.repeat_interleave(times, 0) for x in self.values),
            mask=None if self.mask is None else self.mask.repeat_interleave(times, 0),
            by=(cos, sin),
            anchor=None if self.anchor is None else self.anchor.repeat_interleave(times, 0),
        )


def gradient_free[**P, T](method: Callable[P, T]) -> Callable[P, T]:
    """Compute without gradients, and not in inference mode either, in which LeRobot evaluates.

    No tensor made in that mode can be trained, and fused weights become the network's own; nor does it have
    the gradients that guidance needs.
    """
    return torch.inference_mode(False)(torch.no_grad()(method))


def ordinary[T](given: T) -> T:
    """A tensor, or the tensors of a dataclass, with copies of those that were made in inference mode: they
    have no gradients, and a graph is compiled anew for them."""
    any_given: Any = given
    if torch.compiler.is_compiling():  # the caller's graph, who knows its mode
        return given
    if isinstance(given, Tensor):
        return any_given.clone() if given.is_inference() else given
    if is_dataclass(given):
        return replace(any_given, **{name: ordinary(value) for name, value in vars(given).items()})
    return given


class Sampler:
    """Samples chunks of actions from a network, its linear layers in another form.

    It reads the weights when it is made: make a new one when they have changed. `tensors` may give them in
    the network's stead, under its names: then of the network's own large parameters nothing is touched but
    the rows of the embedding that a prompt needs.

    "fused" has static shapes, for `torch.compile`: pad prompts to a few lengths. The others run on a CPU and
    drop what nobody in the batch has: absent cameras, the padding of prompts.
    """

    @gradient_free
    def __init__(
        self, model: Pi0, form: Form, tensors: Mapping[str, Tensor] | None = None, compiled: bool = False
    ):
        """`compiled`: `sample` runs as one graph, and so does each guided step. The first call of each shape
        compiles it."""
        self.model, self.trims = model, form != "fused"
        read = _Reader(model, form, tensors, model.dtype)
        self.vision = [_Vision(model, read, f"vision.layers.{i}") for i in range(len(model.vision.layers))]
        self.projector = read("vision.projector")
        last = len(model.vlm.layers) - 1
        # Of the language model's last layer nobody reads more than keys and values.
        self.vlm = [_Decoder(model, read, f"vlm.layers.{i}", i == last) for i in range(last + 1)]
        self.expert = [_Decoder(model, read, f"expert.layers.{i}") for i in range(last + 1)]
        # Embedding the actions is linear up to the first activation, and time enters it as a sum: one product
        # with (actions' size, width), and a bias for each time. In float32, as in the network.
        read = _Reader(model, "packed" if self.trims else form, tensors, torch.float32)
        over_action, self._over_time = read.tensor("action_time_mlp_in.weight").float().chunk(2, dim=1)
        action_in = over_action @ read.tensor("action_in_proj.weight").float()
        self._action_in = nn.Parameter(action_in, requires_grad=False)  # why: see `Fused`
        self._bias = read.tensor("action_time_mlp_in.bias").float()
        self._bias = self._bias + over_action @ read.tensor("action_in_proj.bias").float()
        self._action_mid, self._action_out = read("action_time_mlp_out"), read("action_out_proj")
        self._biases: dict[int, Tensor] = {}
        # Not bound to this object: it would hold itself, and its weights, until Python collects garbage.
        self._graph, self._guided_graph = Sampler._sample, Sampler._guided_velocity
        if compiled:
            mode = "reduce-overhead" if self._bias.is_cuda else None
            self._graph = in_any_thread(torch.compile(Sampler._sample, fullgraph=True, mode=mode))
            # One step: with its gradients, ten are more than one would like to wait for.
            guided_graph = torch.compile(Sampler._guided_velocity, fullgraph=True, mode=mode)
            self._guided_graph = in_any_thread(guided_graph)

    @gradient_free
    def context(self, observation: Observation, num_actions: int) -> Context:
        """What all chunks from an observation share."""
        return self._context(observation.trimmed() if self.trims else observation, num_actions)

    @gradient_free
    def actions(
        self, context: Context, noise: Float[Tensor, "b a e"], num_steps: int
    ) -> Float[Tensor, "b a e"]:
        """A chunk of normalised actions, by Euler steps from noise."""
        return self._actions(context, noise, self._step_biases(num_steps))

    @gradient_free
    def guided_actions(
        self, context: Context, noise: Float[Tensor, "b a e"], num_steps: int, guidance: Guidance
    ) -> Float[Tensor, "b a e"]:
        """A chunk along the guided velocity. That one needs gradients: it is computed by the network itself,
        not in this sampler's form."""
        cache, guidance = context.cache(noise.shape[1]), ordinary(guidance)
        return integrate(
            lambda x, time: self._guided_graph(self, cache, x, time, guidance),
            ordinary(noise).float(),
            num_steps,
        )

    @gradient_free
    def sample(
        self,
        observation: Observation,
        noise: Float[Tensor, "b a e"],
        num_steps: int,
        decided: Decided | None = None,
    ) -> Float[Tensor, "b a e"]:
        """A chunk of normalised actions for each observation, or what of it is not decided already."""
        observation = observation.trimmed() if self.trims else observation
        observation, noise, decided = ordinary(observation), ordinary(noise), ordinary(decided)
        chunk = self._graph(self, observation, noise, self._step_biases(num_steps, decided), decided)
        # A graph writes over its own memory.
        return chunk if self._graph is Sampler._sample else chunk.clone()

    def _sample(
        self,
        observation: Observation,
        noise: Float[Tensor, "b a e"],
        biases: Float[Tensor, "n _ w"],
        decided: Decided | None,
    ) -> Float[Tensor, "b a e"]:
        return self._actions(self._context(observation, noise.shape[1]), noise, biases, decided)

    def _guided_velocity(
        self, cache: Cache, x: Float[Tensor, "b a e"], time: Float[Tensor, " b"], guidance: Guidance
    ) -> Float[Tensor, "b a e"]:
        return guided(lambda x, time: self.model.velocity(cache, x, time), guidance)(x, time)

    def _step_biases(self, num_steps: int, decided: Decided | None = None) -> Float[Tensor, "n _ w"]:
        """What the time of each step adds to the embedding of the actions, whose time is 0 where decided."""
        if num_steps not in self._biases:
            times = self._bias.new_tensor([*step_times(num_steps), 0.0])
            biases = embed_time(times, self._over_time.shape[1]) @ self._over_time.T + self._bias
            self._biases[num_steps] = biases[:, None]
        steps, at_zero = self._biases[num_steps].split((num_steps, 1))
        return steps if decided is None else torch.where(decided.mask[:, None], at_zero, steps)

    def _context(self, observation: Observation, num_actions: int) -> Context:
        model = self.model
        x = model.vision.embed(observation.images.flatten(0, 1), model.dtype)
        for layer in self.vision:
            x = layer(x)
        x, mask = model.join(observation, self.projector(model.vision.norm(x)))
        (batch, length), size = x.shape[:2], self.vlm[0]
        valid = torch.cat((mask, mask.new_ones(batch, 1 + num_actions)), 1)
        shape = (batch, size.kv_heads, valid.shape[1], size.head_dim)
        context = Context(
            # Not parts of one tensor: a graph would copy all of it for what it writes into one.
            keys=tuple(x.new_empty(shape) for _ in self.vlm),
            values=tuple(x.new_empty(shape) for _ in self.vlm),
            mask=None if self.trims and valid.all() else valid,
            by=rotation(valid.cumsum(1) - 1, size.head_dim),
        )
        self._run(self.vlm, x, context, 0)
        self._run(self.expert, model.embed_state(observation.state), context, length)
        return context

    def _run(self, layers: list[_Decoder], x: Tensor, context: Context, start: int) -> Tensor:
        """Tokens through a stack: they stand at `start` and see what stands there up to their own end."""
        end = start + x.shape[1]
        mask = None if context.mask is None else context.mask[:, :end]
        cos, sin = (part[:, :, start:end] for part in context.by)
        for layer, keys, values in zip(layers, context.keys, context.values, strict=True):
            x = layer(x, (cos, sin), keys, values, start, mask)
        return x

    def _actions(
        self,
        context: Context,
        noise: Float[Tensor, "b a e"],
        biases: Float[Tensor, "n _ w"],
        decided: Decided | None = None,
    ) -> Float[Tensor, "b a e"]:
        x, start = noise.float(), context.keys[0].shape[2] - noise.shape[1]
        for bias in biases.unbind():
            x = x if decided is None else decided.put(x)
            h = self._action_mid(F.silu(F.linear(x, self._action_in) + bias)).to(self.model.dtype)
            h = self.model.expert.norm(self._run(self.expert, h, context, start))
            x = torch.sub(x, self._action_out(h.float()), alpha=1 / len(biases))
        return x if decided is None else decided.put(x)


class _Reader:
    """Linear layers of the network in another form, by their names there."""

    def __init__(self, model: Pi0, form: Form, tensors: Mapping[str, Tensor] | None, dtype: torch.dtype):
        self.model, self.make, self.tensors, self.dtype = model, FORMS[form], tensors, dtype

    def tensor(self, name: str) -> Tensor:
        """A parameter as the network computes with it: PEFT's adapters are part of it."""
        if self.tensors is not None:
            return self.tensors[name]
        return fold(self.model, name)

    def __call__(self, *names: str) -> Product:
        """One layer, or several with the same input as one."""
        with_bias = [name for name in names if self.model.get_submodule(name).bias is not None]
        return self.make([self._weight(name) for name in names], [self._bias(name) for name in with_bias])

    def gated(self, gate: str, up: str) -> Callable[[Tensor], Tensor]:
        """The hidden layer of a gated MLP."""
        return self.make.gated(self._weight(gate), self._weight(up))

    def _weight(self, name: str) -> Tensor:
        return self.tensor(f"{name}.weight").to(self.dtype)

    def _bias(self, name: str) -> Tensor:
        return self.tensor(f"{name}.bias").to(self.dtype)


class _Vision:
    """A layer of the vision tower."""

    def __init__(self, model: Pi0, read: _Reader, name: str):
        self.layer = cast(VisionLayer, model.get_submodule(name))
        self.qkv = read(*(f"{name}.{part}_proj" for part in "qkv"))
        self.o, self.up, self.down = (read(f"{name}.{part}_proj") for part in ("o", "up", "down"))

    def __call__(self, x: Float[Tensor, "n t w"]) -> Float[Tensor, "n t w"]:
        qkv = self.qkv(self.layer.attention_norm(x)).unflatten(-1, (3, self.layer.num_heads, -1))
        x = self.o.plus(attend(*qkv.permute(2, 0, 3, 1, 4)), x)
        return self.down.plus(self.up.gelu(self.layer.mlp_norm(x)), x)


class _Decoder:
    """A layer of the language model or the expert."""

    def __init__(self, model: Pi0, read: _Reader, name: str, keys_values_only: bool = False):
        self.layer = cast(DecoderLayer, model.get_submodule(name))
        self.head_dim, self.keys_values_only = self.layer.head_dim, keys_values_only
        self.kv_heads = self.layer.k_proj.out_features // self.head_dim
        self.qkv = read(*(f"{name}.{part}_proj" for part in ("kv" if keys_values_only else "qkv")))
        if not keys_values_only:
            self.o, self.down = read(f"{name}.o_proj"), read(f"{name}.down_proj")
            self.hidden = read.gated(f"{name}.gate_proj", f"{name}.up_proj")

    def __call__(
        self,
        x: Float[Tensor, "b s w"],
        by: Rotation,
        keys: Float[Tensor, "b k t d"],
        values: Float[Tensor, "b k t d"],
        start: int,
        mask: Bool[Tensor, "b _"] | None,
    ) -> Float[Tensor, "b s w"]:
        """Write the tokens' keys and values at `start`; they see what stands there up to their own end."""
        qkv = self.qkv(self.layer.attention_norm(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        qk, v = qkv[:, : -self.kv_heads], qkv[:, -self.kv_heads :]
        qk, end = rotate(qk, by), start + x.shape[1]
        keys[:, :, start:end], values[:, :, start:end] = qk[:, -self.kv_heads :], v
        if self.keys_values_only:
            return x
        x = self.o.plus(attend(qk[:, : -self.kv_heads], keys[:, :, :end], values[:, :, :end], mask), x)
        return self.down.plus(self.hidden(self.layer.mlp_norm(x)), x)
