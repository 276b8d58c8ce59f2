"""LeRobot's contract (queue, loss, loading) over the network, which knows none of LeRobot's keys."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies import PreTrainedPolicy
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor
from torch import distributed as dist

from lerobot_pi0.checkpoints import adapters, loading
from lerobot_pi0.checkpoints.golden_actions import check_golden_actions, write_golden_actions
from lerobot_pi0.checkpoints.model_card import CardHooks
from lerobot_pi0.checkpoints.peft_hooks import PeftHooks
from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.data.action_space import ActionSpace, pad
from lerobot_pi0.data.training_data import check_first_batch, describe_training
from lerobot_pi0.errors import UserError
from lerobot_pi0.model import Network, Observation, Pi0
from lerobot_pi0.model.flow import Solver
from lerobot_pi0.model.layers import Layer
from lerobot_pi0.model.observation import letterbox
from lerobot_pi0.processor_pi0 import WITHOUT_TASK, InstructionCheck, load_tokenizer
from lerobot_pi0.sampling.action_queue import ActionQueue
from lerobot_pi0.sampling.buffer import Context
from lerobot_pi0.sampling.guard import check_observation
from lerobot_pi0.sampling.policy_sampler import PolicySampler
from lerobot_pi0.training.augmentation import augment_observation
from lerobot_pi0.training.compilation import compile_layers
from lerobot_pi0.training.ema import ParameterGroups, TrainedWeights, save_ema
from lerobot_pi0.training.fsdp import is_sharded, whole_state
from lerobot_pi0.training.lora import compute_as_given
from lerobot_pi0.training.loss import flow_matching_loss, loss_figures, loss_per_sample

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


class Pi0Policy(PeftHooks, CardHooks, PreTrainedPolicy):
    """π0 as a LeRobot policy.

    batch → Observation ─network→ (B, chunk, padded) ─action space→ chunk ─queue→ action, normalized

    It adapts LeRobot's batches and calls to what does the work:
    - `model`, the network
    - `trained`, which parameters train, their EMA and random keys
    - `sampler`, the network over the backend that is fastest here, warm-up and real-time chunking
    - `action_space`, padding, relative actions and action limits
    - `action_queue`, the actions that were not executed yet, and the last one
    - `base`, the checkpoint that the weights came from, if any

    Besides these it keeps what it has checked or warned of once. `Pi0Policy(config)` has random weights;
    `from_pretrained` never has.
    No action that is NaN or infinite leaves the policy.
    """

    # LeRobot declares both as None.
    config_class = Pi0Config  # pyrefly: ignore[bad-assignment]
    name = "lerobot_pi0"  # pyrefly: ignore[bad-assignment]
    config: Pi0Config  # pyrefly: ignore[bad-override-mutable-attribute]
    model: Network
    # What FSDP shards and gathers as one: modules that are only ever used by calling them.
    _fsdp_wrap_modules: ClassVar[list[str]] = ["DecoderLayer", "VisionLayer", "Embedding"]

    def __init__(
        self,
        config: Pi0Config,
        dataset_stats: dict | None = None,
        dataset_meta: Any = None,
        checkpoint: str | Path | None = None,
        **_: Any,
    ):
        """LeRobot gives `dataset_stats` and `dataset_meta` when it trains; what else it gives is not used.

        In `dataset_meta.stats`, where LeRobot looks next, it then finds the statistics to normalize by.
        `checkpoint`: where training starts, for its statistics on request.
        """
        super().__init__(config)
        config.validate_features()
        # Until the first batch was checked against them; None if nothing trains.
        self._statistics = describe_training(config, dataset_stats, dataset_meta, checkpoint)
        self._dataset_meta = dataset_meta
        if not torch.empty(0).is_meta and (config.pretrained_path or config.has_published_sizes):
            logger.warning(
                "random weights%s. To start from published ones: --policy.pretrained_path=%s",
                f", until those of '{config.pretrained_path}' are put in" if config.pretrained_path else "",
                config.published_base,
            )
        self.model = self.make_network(config)
        for frozen in self._frozen():
            frozen.requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, Layer):
                module.gradient_checkpointing = config.gradient_checkpointing
        self.trained = TrainedWeights(config.ema_decay)
        self.register_state_dict_post_hook(save_ema)
        self.sampler = PolicySampler(self.model, config)
        self.action_space = ActionSpace(config)
        self.base: adapters.Base | None = None
        self._check_instructions = InstructionCheck(config)
        self.action_queue = ActionQueue()
        self.reset()

    @classmethod
    def from_pretrained(  # pyrefly: ignore[bad-override]  # no keyword is taken that would do nothing
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        strict: bool = True,
        dataset_stats: dict | None = None,
        dataset_meta: Any = None,
    ) -> Self:
        """A policy with a checkpoint's weights: one of ours, or of a published layout (then with a `config`).

        Built without initialization and from memory-mapped files; loading is strict. Parameters are held in
        `config.dtype`. Those that train (LeRobot then passes `dataset_meta`) stay as the file has them until
        `get_optim_params` makes them float32, and on a CPU all do, because the sampler has its own copy of
        them. Raises FileNotFoundError or CheckpointError that says what is wrong; it never returns a policy
        without its weights.
        """
        if not strict:
            raise UserError("a policy is never built without some of its weights: leave strict=False out")
        name, trains = pretrained_name_or_path, dataset_meta is not None
        find = partial(
            adapters.find_base,
            name,
            config,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        # Adapters have their tokenizer with them, and so has a checkpoint of ours. That of another one is
        # gated: raise before gigabytes of weights are fetched.
        needs_tokenizer = trains and isinstance(config, Pi0Config) and not adapters.loads_adapters(config)
        if needs_tokenizer and not loading.is_own(str(cls.name), name, find(ignore_patterns="*.safetensors")):
            load_tokenizer(config.tokenizer)
        folder = find(force_download=force_download)
        source = loading.open_source(str(cls.name), name, folder, config, revision)
        with torch.device("meta"):
            policy = cls(source.config, dataset_stats, dataset_meta, source.statistics)
        copies = not trains and policy.sampler.linear_backend != "fused"
        source.load(policy.model, policy.model.dtype, lambda p: copies or (trains and p.requires_grad))
        policy.base = source.base
        if copies:
            policy.sampler.read_from(source.base.checkpoint)
        policy.eval()
        if source.is_ours and not trains and not source.is_below_adapters:
            check_golden_actions(folder, policy.config, policy.predict_with_network, policy.device)
        return policy

    @staticmethod
    def make_network(config: Any) -> Network:
        """The network that a config describes, with random weights."""
        dims = config.max_state_dim, config.max_action_dim
        return Pi0(config.vision, config.vlm, config.expert, *dims, getattr(torch, config.dtype))

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.model.action_out_proj.weight.device

    def observation(self, batch: Batch) -> Observation:
        """The model's observation of a processed batch: cameras in slot order, state padded with zeros."""
        missing = [key for key in (*self.config.cameras.values(), OBS_STATE) if key not in batch]
        if missing:
            raise UserError(
                f"the observation has no {missing}; it has "
                f"{sorted(key for key in batch if key.startswith('obs'))}. "
                "Give the robot or environment these names with --rename_map, or train with --policy.cameras"
            )
        images = [self._image(batch[key], key) for key in self.config.cameras.values()]
        real = batch.get(OBS_LANGUAGE_ATTENTION_MASK)  # none: no prompt is padded
        return Observation(
            images=torch.stack(images, dim=1),
            image_mask=None,  # a camera that is absent has no slot
            tokens=batch[OBS_LANGUAGE_TOKENS],
            token_mask=None if real is None else real.bool(),
            state=pad(batch, OBS_STATE, self.config.robot_state_feature, self.config.padded_state_dim),
        )

    def forward(
        self, batch: Batch, reduction: Literal["mean", "none"] = "mean"
    ) -> tuple[Tensor, dict[str, float]]:
        """Flow-matching loss of a processed batch: a scalar, or with "none" one per sample, whose mean it is;
        and figures to log, of the last training batch that they were computed for.

        A sample's loss is the mean over the padded action's dimensions, as in openpi, and over its valid
        steps. Noise, time and augmentation are a function of the seed, the number of the training batch and
        the frame's index in the dataset; in eval mode, without augmentation, of the index alone, so that
        a held-out loss can be compared between steps.
        """
        config = self.config
        if torch.is_grad_enabled():
            self.sampler.release()  # an optimizer is about to change the weights
        if self.training and self._statistics is not None:
            check_first_batch(config, self._statistics, self._dataset_meta, batch)
            self._statistics = None
        actions = self.action_space.to_network(batch, self.action_space.reference(batch[OBS_STATE]))
        index = batch.get("index")
        index = torch.arange(len(actions), device=actions.device) if index is None else index.flatten()
        keys = self.trained.keys(index, config.num_flow_samples, self.training)
        observation = self.observation(batch)
        if self.training:
            of_samples = keys[:: config.num_flow_samples]
            without_task = tuple(batch[key] for key in WITHOUT_TASK if key in batch)
            observation = augment_observation(
                observation,
                of_samples,
                list(config.cameras),
                config.augmentation,
                config.prompt_dropout,
                without_task or None,
            )
        max_delay = config.rtc_training_max_delay if self.training else 0
        losses, valid = flow_matching_loss(
            self.model, observation, actions, keys, max_delay, config.freeze != "vlm"
        )
        if config.mask_padded_actions and "action_is_pad" in batch:
            valid = valid * ~batch["action_is_pad"]
        per_sample = loss_per_sample(losses, valid)
        if self.training:
            self.trained.note(per_sample, index)
        if self.training and (every := config.log_joints_every) and self.trained.num_draws % every == 0:
            figures = loss_figures(losses, valid, self.action_space.names)
            self.trained.figures = figures | {"ema_decay": config.ema_decay}
        figures = dict(self.trained.figures) if self.training else {}
        return (per_sample if reduction == "none" else per_sample.mean()), figures

    @torch.compiler.disable  # by LeRobot's --use_torch_compile: what can be one graph is in the sampler
    @torch.no_grad()
    def predict_action_chunk(  # pyrefly: ignore[bad-override]  # the base hides its keywords in **kwargs
        self,
        batch: Batch,
        *,
        noise: Tensor | None = None,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
    ) -> Tensor:
        """Actions (B, chunk, action size), normalized; `noise` (B, chunk, padded size) makes them repeatable.

        Real-time chunking, as LeRobot calls it: `prev_chunk_left_over` ((B,) steps, action size) are actions
        of the last chunk, normalized, that were not executed when the observation was taken;
        `inference_delay` of them will have been when these actions arrive. From there on the chunk continues
        the last one: by what the policy has learnt (`rtc_training_max_delay`), or else guided, over
        `execution_horizon` steps. With a delay and no such actions, it begins where the robot is
        (`first_action`). Raises UserError for a delay of a whole chunk, and for NaN or Inf.
        """
        observation = self._checked_observation(batch)
        noise = self.sampler.noise(len(observation.state)) if noise is None else noise
        reference = self.action_space.reference(batch[OBS_STATE])
        left, delay = prev_chunk_left_over, inference_delay or 0
        remainder = self.sampler.remainder(left, delay, noise, reference, execution_horizon)
        sampled = self.sampler.sample(observation, noise, remainder, execution_horizon)
        actions = self.action_space.from_network(sampled, reference)
        # Real-time chunking gives a delay with each chunk, and the first one continues none.
        begins = inference_delay is not None and remainder is None
        return self.action_space.first(actions, batch[OBS_STATE]) if begins else actions

    def encode(self, batch: Batch) -> Context:
        """What all chunks from an observation share. `plan` after it is `predict_action_chunk`."""
        context = self.sampler.context(self._checked_observation(batch))
        return replace(context, reference=self.action_space.reference(batch[OBS_STATE]))

    def plan(self, context: Context, noise: Tensor | None = None, num_samples: int = 1) -> Tensor:
        """Actions (B · num_samples, chunk, action size) from what was encoded, as often as you like.

        The samples of an observation stand in a row; `noise` is of their number. The same noise gives what
        `predict_action_chunk` gives, bit for bit, for the price of the denoising steps.
        """
        context = context.repeat(num_samples)
        noise = self.sampler.noise(context.batch_size) if noise is None else noise
        return self.action_space.from_network(self.sampler.sample_from(context, noise), context.reference)

    @torch.no_grad()
    def predict_with_network(self, batch: Batch, noise: Tensor, num_steps: int, solver: Solver) -> Tensor:
        """`predict_action_chunk` by the network as it is written: no backend, no action limits, no checks."""
        batch = {key: value.to(self.device) for key, value in batch.items()}
        with torch.autocast(self.device.type, enabled=False):
            actions = self.model.sample(self.observation(batch), noise.to(self.device), num_steps, solver)
        actions = actions[..., : self.action_space.size]
        reference = self.action_space.reference(batch[OBS_STATE])
        return actions if reference is None else actions + reference[:, None]

    @torch.no_grad()
    def select_action(  # pyrefly: ignore[bad-override]  # as above
        self, batch: Batch, *, noise: Tensor | None = None
    ) -> Tensor:
        """The next action (B, action size), normalized; after `n_action_steps` a new chunk is predicted."""
        if not self.action_queue:
            chunk, before = self.predict_action_chunk(batch, noise=noise), self.action_queue.last
            if before is None:
                chunk = self.action_space.first(chunk, batch[OBS_STATE])
            else:
                chunk = self.action_space.held(chunk, before)
            self.action_queue.extend(chunk[:, : self.config.n_action_steps].unbind(1))
        return self.action_queue.popleft()

    def reset(self) -> None:
        """Forget this thread's actions that were not executed yet. Before real-time chunking, warm up."""
        self.action_queue.clear()
        self.sampler.warm_up_rtc(self._example, self.action_space.size)

    def drop_queued_actions(self) -> None:
        """Predict anew at the next step, for example because the instruction has changed."""
        self.action_queue.drop()

    def supports_rtc(self) -> bool:
        """`predict_action_chunk` does real-time chunking (asked by lerobot-rollout)."""
        return True

    def init_rtc_processor(self) -> None:
        """Called by LeRobot when it has set `config.rtc_config`, which is all that there is to know."""
        rtc = self.config.rtc_config
        if rtc is not None and rtc.execution_horizon > self.config.chunk_size:
            raise UserError(
                f"--inference.rtc.execution_horizon={rtc.execution_horizon} is more than the chunk has "
                f"({self.config.chunk_size} actions)"
            )

    # The base says dict, LeRobot's optimizers take what torch's do.
    def get_optim_params(self) -> ParameterGroups:  # pyrefly: ignore[bad-override]
        """What trains from now on, in float32, for `ResumableAdamW` or any optimizer of torch.

        LeRobot calls this once per run: after adapters were put in, before an optimizer is restored.
        """
        compute_as_given(self.model)
        self.offer_card()
        return self.trained.take(self, self.model.dtype)

    def update(self) -> None:
        """Called by LeRobot after each step of the optimizer: updates the EMA."""
        self.trained.update()

    def train(self, mode: bool = True) -> Self:
        """To train, the weights; to evaluate, their EMA, if there is one. Frozen parts stay in eval mode.

        What sampling keeps of the weights is given back for training, for which layers may be compiled.
        """
        super().train(mode)
        if mode:
            self.sampler.release()
            if self._dataset_meta is not None:
                self.trained.check(self)
        compile_layers(self.model, mode and self.config.backend == "compile")
        self.trained.show(ema=not mode)
        for frozen in self._frozen():
            frozen.eval()
        return self

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Config, weights and golden actions, written by the first process; under FSDP all must call this."""
        state_dict = whole_state(self) if state_dict is None else state_dict
        if dist.is_available() and dist.is_initialized() and dist.get_rank():
            return
        self.trained.check_finite(state_dict)
        loading.save(save_directory, self.config, state_dict)
        if not is_sharded(self):  # of which one process alone cannot run its part
            trains = self.training
            self.eval()  # shows the EMA, which is what was saved
            write_golden_actions(save_directory, self.config, self.predict_with_network, self.device)
            self.train(trains)

    def _checked_observation(self, batch: Batch) -> Observation:
        """The model's observation, all of it finite."""
        observation, config = self.observation(batch), self.config
        self._check_instructions(batch.get("task"))
        check_observation(
            batch, {OBS_STATE: config.state_feature_names} | dict.fromkeys(config.cameras.values())
        )
        return observation

    def _example(self) -> Observation:
        return self.observation(self.config.example_observation(device=self.device))

    def _image(self, image: Tensor, key: str) -> Tensor:
        if image.ndim != 4 or image.shape[1] != 3:
            raise UserError(f"'{key}' must be (batch, 3, height, width), got {tuple(image.shape)}")
        image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        return letterbox(image, self.config.vision.image_size) * 2 - 1

    def _frozen(self) -> list[torch.nn.Module]:
        vlm: list[torch.nn.Module] = [self.model.vision, self.model.token_embedding, self.model.vlm]
        return vlm[: {"nothing": 0, "vision": 1, "vlm": 3}[self.config.freeze]]
