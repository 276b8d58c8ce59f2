"""The sampler that fits a policy's weights as they are now: its linear backend, when it is stale, real-time
chunking, warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from torch import Tensor

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.errors import UserError
from lerobot_pi0.model import Network, Observation
from lerobot_pi0.sampling.buffer import Context
from lerobot_pi0.sampling.cuda_graph import Graphs
from lerobot_pi0.sampling.linear import BackendName, Fp8, Packed
from lerobot_pi0.sampling.rtc import Remainder, action_prefix, guidance, read_remainder, warn_of_horizon
from lerobot_pi0.sampling.sampler import Sampler
from lerobot_pi0.training.lora import adapted_layers, adapter_state

if TYPE_CHECKING:
    from jaxtyping import Float

# With several environments at once, lerobot-eval calls one policy from several threads.
_BUILDING = Lock()


class PolicySampler:
    """Chunks of normalized actions, padded, from a network that may be trained or edited between them.

    It builds a `Sampler`, which keeps the weights in the layout of the config's backend, at the first chunk,
    and again when the parameters have changed. A copy (deepcopy, pickle) builds its own.
    """

    def __init__(self, network: Network, config: Pi0Config):
        self.network, self.config = network, config
        self._is_warm = False
        self.release()

    def __getstate__(self) -> dict[str, Any]:
        copied = PolicySampler(self.network, self.config)
        return vars(copied) | {"_is_warm": self._is_warm}

    def release(self) -> None:
        """Give back what sampling keeps of the weights, which are about to change."""
        self._sampler: Sampler | None = None
        self._version: Any = None
        self._source: Mapping[str, Tensor] | None = None
        self._source_version: Any = None
        # The network's parameters: to walk its modules for them takes longer than all else on the host. Found
        # anew when one of the dicts in which modules hold their parts has another part.
        self._holders: list[dict[str, Any]] = []
        self._parts: list[Any] = []
        self._parameters: Sequence[Tensor] = []
        self._adapted: list[Any] = []
        # Of the parameters at these places: rebuilt when one has moved.
        self._places: list[int] = []
        self._probes: list[Tensor] = []

    def read_from(self, source: Mapping[str, Tensor]) -> None:
        """As long as the parameters stay as they are, take the weights from this checkpoint that they came
        from.

        The network's own parameters then need not be touched, and stay unread in their memory-mapped file.
        """
        self._source, self._source_version = source, self._weights_version()

    @property
    def linear_backend(self) -> BackendName:
        """The linear backend for the config's `backend` where the network is."""
        # Callers move a policy and leave its config's device as it was. A network on the meta device is only
        # counted, for the device that the config names.
        is_meta = self.device.type == "meta"
        device = self.config.device if is_meta else str(self.device)
        wanted, on_cpu = self.config.backend, device == "cpu"
        if wanted == "int8" and not on_cpu:
            raise UserError(f"--policy.backend=int8 is for CPUs, and this policy runs on '{device}'")
        if wanted == "fp8":
            if not Fp8.runs(self.device, self.network.dtype):
                raise UserError(
                    "--policy.backend=fp8 is for NVIDIA GPUs of compute capability 8.9 or more (Ada, Hopper, "
                    f"Blackwell) and --policy.dtype=bfloat16; this policy is {self.config.dtype} on "
                    f"'{self.device}'"
                )
            return "fp8"
        if not on_cpu or wanted == "compile" or not Packed.runs(self.network.dtype):
            return "fused"
        return "int8" if wanted == "int8" else "packed"

    @property
    def _compiles(self) -> bool:
        return self.config.backend == "compile"

    @property
    def records(self) -> bool:
        """Whether chunks are launched as CUDA graphs."""
        return self.device.type == "cuda" and self.config.backend != "eager"

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.network.action_out_proj.weight.device

    def _padded(self, observation: Observation) -> Observation:
        """With prompts of one length where another one would be waited for: compiled, which takes long, or
        recorded while a robot moves by the actions that are left."""
        rtc = self.config.rtc_config
        if self._compiles or (self.records and rtc is not None and rtc.enabled):
            return observation.padded(self.config.tokenizer_max_length)
        return observation

    def noise(self, batch_size: int) -> Float[Tensor, "b a e"]:
        """Random noise to start from, on the network's device."""
        shape = (batch_size, self.config.chunk_size, self.config.max_action_dim)
        return torch.randn(shape, dtype=torch.float32, device=self.device)

    def remainder(
        self,
        actions: Tensor | None,
        delay: int,
        noise: Float[Tensor, "b a e"],
        reference: Float[Tensor, "b d"] | None,
        execution_horizon: int | None = None,
    ) -> Remainder | None:
        """The remainder of the previous chunk that the next one continues; None without real-time chunking.

        `actions` ((B,) steps, action size) and `delay` are those of `Pi0Policy.predict_action_chunk`. Raises
        UserError in training mode, and for a delay in which a whole chunk would be executed.
        """
        if delay >= self.config.chunk_size:
            raise UserError(
                f"the delay of {delay} steps is a whole chunk of {self.config.chunk_size}: each action would "
                "be out of date when it arrives, and the robot would not move. `lerobot-pi0 latency` says "
                "what this machine can hold; a lower --fps or fewer --policy.num_inference_steps helps"
            )
        if actions is None or not actions.numel() or not self._rtc.enabled:
            return None
        if self.network.training:
            raise UserError("real-time chunking is for running a policy: call policy.eval() first")
        remainder = read_remainder(actions, delay, noise, reference)
        if remainder is not None:
            self._is_warm = True
            horizon = execution_horizon or self._rtc.execution_horizon
            if delay > horizon:
                warn_of_horizon(delay, horizon, min(2 * delay, self.config.chunk_size))
        return remainder

    def sample(
        self,
        observation: Observation,
        noise: Float[Tensor, "b a e"],
        remainder: Remainder | None = None,
        execution_horizon: int | None = None,
    ) -> Float[Tensor, "b a e"]:
        """A chunk that continues the remainder, if there is one, over `execution_horizon` steps (default: the
        config's). It begins with the committed actions of the remainder.
        """
        by, horizon = None, execution_horizon or self._rtc.execution_horizon
        if remainder is not None and (max_delay := self.config.rtc_training_max_delay):
            by = action_prefix(remainder, max_delay)
        elif remainder is not None:
            schedule = self._rtc.prefix_attention_schedule.value
            by = guidance(remainder, schedule, horizon, self._rtc.max_guidance_weight)
        with torch.autocast(noise.device.type, enabled=False):
            steps, solver = self.config.num_inference_steps, self.config.solver
            actions = self.current().sample(self._padded(observation), noise, steps, by, solver)
        if remainder is None:
            return actions
        delay = remainder.delay
        return torch.cat((remainder.actions[:, :delay], actions[:, delay:]), 1)

    def context(self, observation: Observation) -> Context:
        """What all chunks from an observation share."""
        with torch.autocast(observation.state.device.type, enabled=False):
            return self.current().context(self._padded(observation), self.config.chunk_size)

    def sample_from(self, context: Context, noise: Float[Tensor, "b a e"]) -> Float[Tensor, "b a e"]:
        """A chunk from a context: `sample` for the price of the denoising steps."""
        with torch.autocast(noise.device.type, enabled=False):
            config = self.config
            return self.current().actions(context, noise, config.num_inference_steps, config.solver)

    def current(self) -> Sampler:
        """The sampler of the weights as they are now."""
        with _BUILDING:
            version = self._weights_version()
            if self._sampler is None or self._version != version:
                self._sampler = None  # before the next one takes its memory
                source = self._source if self._source_version == version else None
                graphs = Graphs() if self.records else None
                self._sampler = Sampler(self.network, self.linear_backend, source, self._compiles, graphs)
                # A backend may move the parameters into its own tensors.
                self._version = self._weights_version()
            return self._sampler

    @torch.no_grad()
    def warm_up_rtc(self, example: Callable[[], Observation], action_size: int) -> None:
        """Before real-time chunking: make the first chunk, and the first that continues another, once.

        `example` makes up an observation. LeRobot takes the longest inference so far for the delay of all
        that follow, so the first one must not take longer than they do.
        """
        rtc = self.config.rtc_config
        if rtc is None or not rtc.enabled or self._is_warm:
            return
        if self.config.lerobot_warms_up:
            # LeRobot waits for two slow chunks. After a fast one its queue is full, and it asks for no other.
            # What its own warm-up leaves cold is for the next reset.
            self.config.lerobot_warms_up = False
            return
        self._is_warm = True
        observation, shape = example(), (1, self.config.chunk_size, self.config.max_action_dim)
        noise = observation.state.new_zeros(shape)
        remainder = read_remainder(torch.ones_like(noise[0, :, :action_size]), 1, noise, None)
        self.sample(observation, noise)
        self.sample(observation, noise, remainder, self.config.chunk_size)

    @property
    def _rtc(self) -> RTCConfig:
        return self.config.rtc_config or RTCConfig()

    def _weights_version(self) -> list[Any]:
        """Changes with the parameters, with the adapters that act, and with edits of whole tensors that torch
        does not count (to `.data`, through numpy, by a fused optimizer).
        """
        parts = [part for holder in self._holders for part in holder.values()]
        if not parts or len(parts) != len(self._parts) or not all(map(is_, parts, self._parts)):
            modules: list[Any] = list(self.network.modules())
            self._holders = [holder for of in modules for holder in (of._parameters, of._modules)]
            self._parts = [part for holder in self._holders for part in holder.values()]
            self._parameters, self._adapted = list(self.network.parameters()), adapted_layers(self.network)
        places = [parameter.data_ptr() for parameter in self._parameters]
        if places != self._places:
            self._places, self._probes = places, probes_of(self._parameters)
        counts = [parameter._version for parameter in self._parameters]
        return [places, counts, numbers_at(self._probes), adapter_state(self._adapted)]


def probes_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Views of one number of each parameter; on a GPU, which has to be waited for, of every 16th."""
    looked_at = parameters if parameters[0].device.type == "cpu" else parameters[::16]
    return [parameter.detach()[tuple(size // 2 for size in parameter.shape)] for parameter in looked_at]


def numbers_at(probes: Sequence[Tensor]) -> list[list[int]]:
    """The bits of the numbers that probes see now, by their dtype."""
    dtypes = sorted({probe.dtype for probe in probes}, key=str)
    seen = [torch.stack([probe for probe in probes if probe.dtype == dtype]) for dtype in dtypes]
    return [numbers.float().view(torch.int32).tolist() for numbers in seen]
