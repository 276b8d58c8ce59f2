"""Sampling from a trained network without wasted work: the same actions as its own `sample`, to rounding.

A `Sampler` runs the network's own forwards over linear backends (`sampling.swap`). What depends on the
observation alone is computed once per observation: keys and values go into a buffer with room for the
actions, which every denoising step reads in place. What depends on the time alone is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lerobot_pi0.lerobot_compat import in_any_thread
from lerobot_pi0.model import Network, Observation
from lerobot_pi0.model.flow import Solver, integrate, step_times
from lerobot_pi0.model.gemma import Cache
from lerobot_pi0.sampling.buffer import Buffer, Context
from lerobot_pi0.sampling.linear import BackendName
from lerobot_pi0.sampling.rtc import ActionPrefix, Guidance, guided
from lerobot_pi0.sampling.swap import swapped, with_modulations_ahead

if TYPE_CHECKING:
    from jaxtyping import Float

type Chunk = Float[Tensor, "b a e"]  # of normalised actions, or of noise
# What a network prepares of each step's time and, last, of time 0, which committed actions have.
type Prepared = Float[Tensor, "n _ ..."]


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
        # Guidance needs gradients, which the backends do not have.
        self.guided_network = with_modulations_ahead(model, tensors)
        self.network, self.trims = swapped(self.guided_network, backend, tensors), backend != "fused"
        self._tables: dict[tuple[bool, int], Prepared] = {}
        self._graph, self._guided_graph = _sample, _guided_velocity
        if compiled:
            mode = "reduce-overhead" if model.action_out_proj.weight.is_cuda else None
            self._graph = in_any_thread(torch.compile(_sample, fullgraph=True, mode=mode))
            # One step: with its gradients, ten are more than one would like to wait for.
            guided_graph = torch.compile(_guided_velocity, fullgraph=True, mode=mode)
            self._guided_graph = in_any_thread(guided_graph)

    @gradient_free
    def context(self, observation: Observation, num_actions: int) -> Context:
        """What all chunks from an observation share."""
        observation = observation.trimmed() if self.trims else observation
        return Context(_context(self.network, observation, num_actions))

    @gradient_free
    def actions(self, context: Context, noise: Chunk, num_steps: int, solver: Solver = "euler") -> Chunk:
        """A chunk of normalised actions from noise."""
        steps = self._prepared(self.network, num_steps, noise.device)
        return _denoised(self.network, context.buffer, noise, steps, solver)

    @gradient_free
    def guided_actions(
        self, context: Context, noise: Chunk, num_steps: int, guidance: Guidance, solver: Solver = "euler"
    ) -> Chunk:
        """A chunk along the guided velocity, which the network computes over its own linear layers."""
        cache, guidance, noise = context.buffer.read(), ordinary(guidance), ordinary(noise).float()
        times = noise.new_tensor(step_times(num_steps)).split(1)
        prepared = self._prepared(self.guided_network, num_steps, noise.device)

        def velocity(x: Tensor, step: tuple[Tensor, Tensor]) -> Tensor:
            return self._guided_graph(self.guided_network, cache, x, *step, guidance)

        return integrate(velocity, noise, num_steps, zip(times, prepared, strict=False), solver)

    @gradient_free
    def sample(
        self,
        observation: Observation,
        noise: Chunk,
        num_steps: int,
        committed: ActionPrefix | None = None,
        solver: Solver = "euler",
    ) -> Chunk:
        """A chunk of normalised actions for each observation, which goes on from committed ones, if given."""
        observation = observation.trimmed() if self.trims else observation
        observation, noise, committed = ordinary(observation), ordinary(noise), ordinary(committed)
        steps = self._prepared(self.network, num_steps, noise.device)
        chunk = self._graph(self.network, observation, noise, steps, committed, solver)
        # A graph writes over its own memory.
        return chunk if self._graph is _sample else chunk.clone()

    def _prepared(self, network: Network, num_steps: int, device: torch.device) -> Prepared:
        """What a network prepares of each step's time, once for each number of steps."""
        key = network is self.guided_network, num_steps
        if key not in self._tables:
            times = torch.tensor([*step_times(num_steps), 0.0], dtype=torch.float32, device=device)
            self._tables[key] = network.prepare(times)
        return self._tables[key]


# What may be compiled. Functions of the network: methods would hold the sampler, and its weights, until
# Python collects garbage.


def _context(network: Network, observation: Observation, num_actions: int) -> Buffer:
    x, mask = network.embed_prefix(observation)
    # One more than the actions: the state's token.
    buffer = Buffer.allocate(x, mask, 1 + num_actions, network.vlm.heads)
    context = network.with_state(network.vlm.prefill(x, mask, buffer), observation.state)
    assert isinstance(context, Buffer)
    return context


def _denoised(
    network: Network,
    context: Buffer,
    noise: Chunk,
    steps: Prepared,
    solver: Solver,
    committed: ActionPrefix | None = None,
) -> Chunk:
    *prepared, at_zero = steps.unbind()

    def velocity(x: Tensor, step: Tensor) -> Tensor:
        if committed is not None:
            x, step = committed.put(x), committed.put_time(step, at_zero)
        return network.velocity_at(context, x, step)

    x = integrate(velocity, noise.float(), len(prepared), prepared, solver)
    return x if committed is None else committed.put(x)


def _sample(
    network: Network,
    observation: Observation,
    noise: Chunk,
    steps: Prepared,
    committed: ActionPrefix | None,
    solver: Solver,
) -> Chunk:
    context = _context(network, observation, noise.shape[1])
    return _denoised(network, context, noise, steps, solver, committed)


def _guided_velocity(
    network: Network, cache: Cache, x: Chunk, time: Tensor, step: Tensor, guidance: Guidance
) -> Chunk:
    return guided(lambda x, _: network.velocity_at(cache, x, step), guidance)(x, time)
