"""Sampling from a trained network without wasted work: the same actions as its own `sample`, to rounding.

A `Sampler` runs the network's own forwards over linear backends (`sampling.swap`). What depends on the
observation alone is computed once per observation: keys and values go into a buffer with room for the
actions, which every denoising step reads in place. What depends on the time alone is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lerobot_pi0.model import Network, Observation
from lerobot_pi0.model.flow import Solver, integrate, step_times
from lerobot_pi0.model.gemma import Cache
from lerobot_pi0.sampling.buffer import Buffer, Context
from lerobot_pi0.sampling.cuda_graph import Graphs, mapped
from lerobot_pi0.sampling.linear import BackendName
from lerobot_pi0.sampling.rtc import ActionPrefix, Guidance, guided
from lerobot_pi0.sampling.swap import swapped, with_modulations_ahead

if TYPE_CHECKING:
    from jaxtyping import Float

type Chunk = Float[Tensor, "b a e"]  # of normalized actions, or of noise
# What a network prepares of each step's time and, last, of time 0, which committed actions have.
type Prepared = Float[Tensor, "n _ ..."]


def gradient_free[**P, T](method: Callable[P, T]) -> Callable[P, T]:
    """Compute without gradients, and not in inference mode either, in which LeRobot evaluates.

    No tensor made in that mode can be trained, and fused weights become the network's own; nor does it have
    the gradients that guidance needs.
    """
    return torch.inference_mode(False)(torch.no_grad()(method))


def ordinary[T](given: T) -> T:
    """A tensor, or the tensors of a structure, with copies of those that were made in inference mode: they
    have no gradients, and a graph is compiled anew for them."""
    if torch.compiler.is_compiling():  # the caller's graph, who knows its mode
        return given
    return mapped(given, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


class Sampler:
    """Samples chunks of actions from a network, over linear backends.

    It reads the weights when it is made: make a new one when they have changed. `tensors` may give them in
    the network's stead, under its names: then of the network's own large parameters nothing is touched but
    the rows of the embedding that a prompt needs.

    "fused" and "fp8" have static shapes, for `torch.compile` and CUDA graphs: pad prompts to a few lengths.
    The others run on a CPU and drop what nobody in the batch has: absent cameras, the padding of prompts.
    """

    @gradient_free
    def __init__(
        self,
        model: Network,
        backend: BackendName,
        tensors: Mapping[str, Tensor] | None = None,
        compiled: bool = False,
        graphs: Graphs | None = None,
    ):
        """`compiled`: what an observation costs once, a step and a guided step are compiled, each by itself,
        and not their loop, whose compilation would take minutes. `graphs`: a chunk is launched as one CUDA
        graph. Both happen in the first call of each shape."""
        # Guidance needs gradients, which the backends do not have.
        self.guided_network = with_modulations_ahead(model, tensors)
        self.network = swapped(self.guided_network, backend, tensors)
        self.trims = backend not in ("fused", "fp8")
        self.graphs = graphs
        self._tables: dict[tuple[bool, int], tuple[Tensor, Prepared]] = {}
        pieces: tuple[Any, ...] = (_context, _velocity, _guided_velocity)
        if compiled:
            pieces = tuple(torch.compile(piece, fullgraph=True) for piece in pieces)
        self._context, self._velocity, self._guided_velocity = pieces

    @gradient_free
    def context(self, observation: Observation, num_actions: int) -> Context:
        """What all chunks from an observation share."""
        observation = observation.trimmed() if self.trims else observation
        return Context(self._run(self._encode, (num_actions,), observation))

    @gradient_free
    def actions(self, context: Context, noise: Chunk, num_steps: int, solver: Solver = "euler") -> Chunk:
        """A chunk of normalized actions from noise."""
        return self._run(self._denoise, (num_steps, solver), context.buffer, noise)

    @gradient_free
    def sample(
        self,
        observation: Observation,
        noise: Chunk,
        num_steps: int,
        by: ActionPrefix | Guidance | None = None,
        solver: Solver = "euler",
    ) -> Chunk:
        """A chunk of normalized actions for each observation.

        It goes on from committed actions, or is along the guided velocity, which the network computes over
        its own linear layers.
        """
        observation = observation.trimmed() if self.trims else observation
        return self._run(self._sample, (num_steps, solver), observation, noise, by)

    def _run[T](self, method: Callable[..., T], settings: tuple[Any, ...], *given: Any) -> T:
        given, call = ordinary(given), partial(method, *settings)
        return call(*given) if self.graphs is None else self.graphs((method.__name__, settings), call, *given)

    def _encode(self, num_actions: int, observation: Observation) -> Buffer:
        return self._context(self.network, observation, num_actions)

    def _sample(
        self,
        num_steps: int,
        solver: Solver,
        observation: Observation,
        noise: Chunk,
        by: ActionPrefix | Guidance | None,
    ) -> Chunk:
        return self._denoise(num_steps, solver, self._encode(noise.shape[1], observation), noise, by)

    def _denoise(
        self,
        num_steps: int,
        solver: Solver,
        context: Buffer,
        noise: Chunk,
        by: ActionPrefix | Guidance | None = None,
    ) -> Chunk:
        network = self.guided_network if isinstance(by, Guidance) else self.network
        times, table = self._prepared(network, num_steps, noise.device)
        *prepared, at_zero = table.unbind()
        if isinstance(by, Guidance):
            cache = context.read()

            def guided_velocity(x: Tensor, step: tuple[Tensor, Tensor]) -> Tensor:
                return self._guided_velocity(network, cache, x, *step, by)

            steps = zip(times.split(1), prepared, strict=False)
            return integrate(guided_velocity, noise.float(), num_steps, steps, solver)

        def velocity(x: Tensor, step: Tensor) -> Tensor:
            if by is not None:
                x, step = by.put(x), by.put_time(step, at_zero)
            return self._velocity(network, context, x, step)

        x = integrate(velocity, noise.float(), num_steps, prepared, solver)
        return x if by is None else by.put(x)

    def _prepared(self, network: Network, num_steps: int, device: torch.device) -> tuple[Tensor, Prepared]:
        """The times of the steps, and at last 0, and what a network prepares of each: once for each number of
        steps."""
        key = network is self.guided_network, num_steps
        if key not in self._tables:
            times = torch.tensor([*step_times(num_steps), 0.0], dtype=torch.float32, device=device)
            self._tables[key] = times, network.prepare(times)
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


def _velocity(network: Network, context: Buffer, x: Chunk, step: Tensor) -> Chunk:
    return network.velocity_at(context, x, step)


def _guided_velocity(
    network: Network, cache: Cache, x: Chunk, time: Tensor, step: Tensor, guidance: Guidance
) -> Chunk:
    return guided(lambda x, _: network.velocity_at(cache, x, step), guidance)(x, time)
