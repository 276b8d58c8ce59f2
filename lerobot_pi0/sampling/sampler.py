"""Sampling from a trained network without wasted work: the same actions as its own `sample`, to rounding.

A `Sampler` runs the network's own forwards over linear backends (`sampling.swap`). What depends on the
observation alone is computed once per observation: keys and values go into a buffer with room for the
actions, which every denoising step reads in place. What depends on the time alone is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lerobot_pi0.lerobot_compat import in_any_thread
from lerobot_pi0.model import Network, Observation
from lerobot_pi0.model.flow import integrate, step_times
from lerobot_pi0.model.gemma import Cache
from lerobot_pi0.sampling.buffer import Buffer
from lerobot_pi0.sampling.linear import BackendName
from lerobot_pi0.sampling.rtc import ActionPrefix, Guidance, guided
from lerobot_pi0.sampling.swap import swapped

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Context:
    """All that an observation costs once. Sampling writes behind the prefix and the state, never over them.

    It may be sampled from any number of times, one after the other.
    """

    buffer: Buffer  # prefix, state, room for the actions
    reference: Float[Tensor, "b d"] | None = None  # relative actions are made absolute by adding it

    @property
    def batch_size(self) -> int:
        return len(self.buffer.layers[0][0])

    def repeat(self, times: int) -> Context:
        """The context of a batch in which every observation stands `times` times in a row."""
        reference = None if self.reference is None else self.reference.repeat_interleave(times, 0)
        return Context(self.buffer.repeat(times), reference)


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
    """Samples chunks of actions from a network, over linear backends.

    It reads the weights when it is made: make a new one when they have changed. `tensors` may give them in
    the network's stead, under its names: then of the network's own large parameters nothing is touched but
    the rows of the embedding that a prompt needs.

    "fused" has static shapes, for `torch.compile`: pad prompts to a few lengths. The others run on a CPU and
    drop what nobody in the batch has: absent cameras, the padding of prompts.
    """

    @gradient_free
    def __init__(
        self,
        model: Network,
        backend: BackendName,
        tensors: Mapping[str, Tensor] | None = None,
        compiled: bool = False,
    ):
        """`compiled`: `sample` runs as one graph, and so does each guided step. The first call of each shape
        compiles it."""
        self.model, self.network = model, swapped(model, backend, tensors)
        self.trims = backend != "fused"
        self._prepared: dict[int, Tensor] = {}
        # Not bound to this object: it would hold itself, and its weights, until Python collects garbage.
        self._graph, self._guided_graph = Sampler._sample, Sampler._guided_velocity
        if compiled:
            mode = "reduce-overhead" if model.action_out_proj.weight.is_cuda else None
            self._graph = in_any_thread(torch.compile(Sampler._sample, fullgraph=True, mode=mode))
            # One step: with its gradients, ten are more than one would like to wait for.
            guided_graph = torch.compile(Sampler._guided_velocity, fullgraph=True, mode=mode)
            self._guided_graph = in_any_thread(guided_graph)

    @gradient_free
    def context(self, observation: Observation, num_actions: int) -> Context:
        """What all chunks from an observation share."""
        return Context(self._context(observation.trimmed() if self.trims else observation, num_actions))

    @gradient_free
    def actions(
        self, context: Context, noise: Float[Tensor, "b a e"], num_steps: int
    ) -> Float[Tensor, "b a e"]:
        """A chunk of normalised actions, by Euler steps from noise."""
        return self._actions(context.buffer, noise, self._steps(num_steps, noise.device))

    @gradient_free
    def guided_actions(
        self, context: Context, noise: Float[Tensor, "b a e"], num_steps: int, guidance: Guidance
    ) -> Float[Tensor, "b a e"]:
        """A chunk along the guided velocity. That one needs gradients: it is computed by the network itself,
        not over linear backends."""
        cache, guidance = context.buffer.read(), ordinary(guidance)
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
        action_prefix: ActionPrefix | None = None,
    ) -> Float[Tensor, "b a e"]:
        """A chunk of normalised actions for each observation; it continues the action prefix, if given."""
        observation = observation.trimmed() if self.trims else observation
        observation, noise, action_prefix = ordinary(observation), ordinary(noise), ordinary(action_prefix)
        steps = self._steps(num_steps, noise.device, action_prefix)
        chunk = self._graph(self, observation, noise, steps, action_prefix)
        # A graph writes over its own memory.
        return chunk if self._graph is Sampler._sample else chunk.clone()

    def _sample(
        self,
        observation: Observation,
        noise: Float[Tensor, "b a e"],
        steps: Float[Tensor, "n _ ..."],
        action_prefix: ActionPrefix | None,
    ) -> Float[Tensor, "b a e"]:
        return self._actions(self._context(observation, noise.shape[1]), noise, steps, action_prefix)

    def _guided_velocity(
        self, cache: Cache, x: Float[Tensor, "b a e"], time: Float[Tensor, " b"], guidance: Guidance
    ) -> Float[Tensor, "b a e"]:
        return guided(lambda x, time: self.model.velocity(cache, x, time), guidance)(x, time)

    def _steps(
        self, num_steps: int, device: torch.device, action_prefix: ActionPrefix | None = None
    ) -> Float[Tensor, "n _ ..."]:
        """What the network prepares of each step's time, which is 0 for committed actions."""
        if num_steps not in self._prepared:
            times = torch.tensor([*step_times(num_steps), 0.0], dtype=torch.float32, device=device)
            self._prepared[num_steps] = self.network.prepare(times)
        steps, at_zero = self._prepared[num_steps].split((num_steps, 1))
        return steps if action_prefix is None else torch.where(action_prefix.mask[:, None], at_zero, steps)

    def _context(self, observation: Observation, num_actions: int) -> Buffer:
        x, mask = self.network.embed_prefix(observation)
        # One more than the actions: the state's token.
        buffer = Buffer.allocate(x, mask, 1 + num_actions, self.network.vlm.heads)
        prefix = self.network.vlm.prefill(x, mask, buffer)
        context = self.network.with_state(prefix, observation.state)
        assert isinstance(context, Buffer)
        return context

    def _actions(
        self,
        context: Buffer,
        noise: Float[Tensor, "b a e"],
        steps: Float[Tensor, "n _ ..."],
        action_prefix: ActionPrefix | None = None,
    ) -> Float[Tensor, "b a e"]:
        def velocity(x: Tensor, step: Tensor) -> Tensor:
            x = x if action_prefix is None else action_prefix.put(x)
            return self.network.velocity_at(context, x, step)

        x = integrate(velocity, noise.float(), len(steps), steps.unbind())
        return x if action_prefix is None else action_prefix.put(x)
