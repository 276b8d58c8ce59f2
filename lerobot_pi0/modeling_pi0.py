"""LeRobot's contract (queue, loss, loading) over the network: the only place that knows LeRobot's keys."""

import itertools
import json
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, Self, cast

import torch
from huggingface_hub import ModelCard
from huggingface_hub.constants import CONFIG_NAME
from lerobot.configs import PolicyFeature, PreTrainedConfig
from lerobot.policies import PreTrainedPolicy
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from lerobot_pi0.checkpoints import adapters
from lerobot_pi0.checkpoints.files import WEIGHTS_FILE, Checkpoint, load_weights
from lerobot_pi0.checkpoints.golden_actions import check_certificate, write_certificate
from lerobot_pi0.checkpoints.model_card import make_model_card
from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.data.normalization import Prepared
from lerobot_pi0.data.relative_actions import make_anchor
from lerobot_pi0.data.statistics import prepare_statistics
from lerobot_pi0.data.training_data import check_first_batch, describe_data, make_limits
from lerobot_pi0.errors import CheckpointError, UserError
from lerobot_pi0.model import Observation, Pi0
from lerobot_pi0.model.flow import sample_time
from lerobot_pi0.model.layers import Layer
from lerobot_pi0.model.observation import letterbox
from lerobot_pi0.processor_pi0 import load_tokenizer, unknown_instruction
from lerobot_pi0.sampling.guard import ChunkGuard, not_finite
from lerobot_pi0.sampling.linear import Form, Packed
from lerobot_pi0.sampling.rtc import (
    Leftover,
    decided,
    decided_times,
    guidance,
    read_leftover,
    sample_delays,
    tell_of_horizon,
)
from lerobot_pi0.sampling.sampler import Context, Sampler
from lerobot_pi0.training.augmentation import augment, drop_prompts
from lerobot_pi0.training.ema import ParameterGroups, TrainedWeights
from lerobot_pi0.training.fsdp import whole_state
from lerobot_pi0.training.lora import compute_as_given, summary
from lerobot_pi0.training.randomness import normal, sample_keys, uniform

logger = logging.getLogger(__name__)

Batch = dict[str, Any]

# Streams of random numbers (see `augmentation` for the others).
NOISE, TIME, DELAY = 0, 1, 4


class Pi0Policy(PreTrainedPolicy):
    """π0 as a LeRobot policy.

    batch → Observation ─Pi0.sample→ (B, chunk, padded) ─[..., :action_dim]→ chunk ─queue→ action, normalised

    `Pi0Policy(config)` has random weights; `from_pretrained` never has. The action queue is the only state.
    The policy never gives an action that is no number.
    """

    # LeRobot declares both as None.
    config_class = Pi0Config  # pyrefly: ignore[bad-assignment]
    name = "lerobot_pi0"  # pyrefly: ignore[bad-assignment]
    config: Pi0Config  # pyrefly: ignore[bad-override-mutable-attribute]
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

        In `dataset_meta.stats`, where LeRobot looks next, it then finds the statistics to normalise by.
        `checkpoint`: where training starts, for its statistics on request.
        """
        super().__init__(config)
        config.validate_features()
        trains = dataset_stats is not None or dataset_meta is not None
        if trains and config.int8:
            raise UserError("--policy.int8 is for running a policy: train without it")
        self._statistics: Prepared | None = None
        if trains:
            self._statistics = prepare_statistics(
                config, dataset_stats, dataset_meta, checkpoint, config.pretrained_revision
            )
            config.anchor = make_anchor(config, self._statistics)
            config.action_limits = make_limits(config, self._statistics, dataset_meta)
            config.training_data = describe_data(dataset_meta)
            if dataset_meta is not None:
                dataset_meta.stats = self._statistics
        elif config.relative_actions != (config.anchor is not None):
            raise UserError(
                f"--policy.relative_actions={str(config.relative_actions).lower()}, but the policy was not "
                "trained so: leave the flag out to run a checkpoint, or give a dataset to train"
            )
        if not torch.empty(0).is_meta:
            logger.warning(
                "random weights. To start from published ones: --policy.pretrained_path=lerobot/pi0_base"
            )
        self.model = Pi0(
            config.vision,
            config.vlm,
            config.expert,
            config.max_state_dim,
            config.max_action_dim,
            getattr(torch, config.dtype),
        )
        for frozen in self._frozen():
            frozen.requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, Layer):
                module.gradient_checkpointing = config.gradient_checkpointing
        self._dataset_meta = dataset_meta
        self._trained = TrainedWeights(config.ema_decay)
        self.register_state_dict_post_hook(_averaged)
        self._base: adapters.Base | None = None
        self._guard: ChunkGuard | None = None
        if config.chunk_guard and config.action_limits is not None:
            self._guard = ChunkGuard(config.action_limits, self._joints)
        self._is_warm = False
        self._instructions: set[str] = set()  # that it was given
        # In lists, where torch's modules look for no parameters.
        self._samplers: list[tuple[Any, Sampler]] = []
        self._loaded: list[tuple[Any, Checkpoint]] = []
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
        dataset_stats: dict | None = None,
        dataset_meta: Any = None,
    ) -> Self:
        """A policy with a checkpoint's weights: one of ours, or of a published layout (then with a `config`).

        Built without initialisation and from memory-mapped files; loading is strict. Parameters are held in
        `config.dtype`. Those that train (LeRobot then passes `dataset_meta`) stay as the file has them until
        `get_optim_params` makes them float32, and on a CPU all do, because sampling has its own form of them.
        Raises FileNotFoundError or CheckpointError that says what is wrong; it never returns a policy without
        its weights.
        """
        find = partial(
            adapters.find_base,
            pretrained_name_or_path,
            config,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        trains = isinstance(config, Pi0Config) and dataset_meta is not None
        needs_tokenizer = trains and not adapters.loads_adapters(config)  # those have it with them
        if needs_tokenizer and _policy_type(find(ignore_patterns="*.safetensors")) != cls.name:
            # Of a checkpoint that is not ours it is gated: told before gigabytes of weights are fetched.
            load_tokenizer(config.tokenizer)
        folder = find(force_download=force_download)
        if config is None:
            kind = _policy_type(folder)
            if kind != cls.name:
                found = f"a policy of type '{kind}'" if kind else "no LeRobot policy"
                raise CheckpointError(
                    f"'{pretrained_name_or_path}' is {found}. "
                    "To take its weights for this policy, give it a config: "
                    f"--policy.type={cls.name} --policy.pretrained_path={pretrained_name_or_path}"
                )
            config = PreTrainedConfig.from_pretrained(folder)
        if not isinstance(config, Pi0Config):
            raise TypeError(f"config is a {type(config).__name__}, this policy takes a Pi0Config")
        checkpoint = Checkpoint(folder)
        base = adapters.Base.of(pretrained_name_or_path, revision, folder, checkpoint)
        below_adapters = adapters.loads_adapters(config)
        if below_adapters:
            adapters.check_base(config, base)
        with torch.device("meta"):
            # An adapter's own folder has its statistics, not the one of the weights that it is for.
            source = config.pretrained_path if below_adapters else folder
            policy = cls(config, dataset_stats, dataset_meta, source)
        own_form = dataset_meta is None and policy._form() != "fused"
        dtypes = {
            name: None
            if own_form or (dataset_meta is not None and parameter.requires_grad)
            else policy.model.dtype
            for name, parameter in policy.model.named_parameters()
        }
        if below_adapters:
            dtypes |= adapters.dtypes_in_full(policy.model, config)
        load_weights(policy.model, checkpoint, dtypes, config.device)
        policy._base = base
        if own_form:
            policy._loaded = [(policy._version(), checkpoint)]
        if not checkpoint.is_ours:
            config.base_checkpoint, config.base_revision = str(pretrained_name_or_path), base.revision
        if not checkpoint.is_ours and not below_adapters:
            # LeRobot builds processors after the policy, from the folder in `pretrained_path` if there is
            # one (that of adapters has ours). Those of another policy are not ours (another prompt, a gated
            # tokenizer): without the path it asks our own factory, and a --rename_map of its finds no step
            # to go to.
            config.pretrained_path = config.pretrained_revision = None
            logger.info("weights of another layout: the processors are new, and --rename_map has no effect")
        logger.info("%d tensors from %s, all of them used", len(checkpoint), folder)
        policy.eval()
        if checkpoint.is_ours and dataset_meta is None and not below_adapters:
            check_certificate(policy, folder)
        return policy

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
        images = torch.stack(images, dim=1)
        return Observation(
            images=images,
            image_mask=torch.ones(images.shape[:2], dtype=torch.bool, device=images.device),
            tokens=batch[OBS_LANGUAGE_TOKENS],
            token_mask=batch[OBS_LANGUAGE_ATTENTION_MASK].bool(),
            state=self._pad(
                batch[OBS_STATE], self.config.max_state_dim, OBS_STATE, self.config.robot_state_feature
            ),
        )

    def forward(
        self, batch: Batch, reduction: Literal["mean", "none"] = "mean"
    ) -> tuple[Tensor, dict[str, float]]:
        """Flow-matching loss of a processed batch: a scalar, or with "none" one per sample, whose mean it is;
        and figures to log, on some of the training batches.

        A sample's loss is the mean over the padded action's dimensions, as in openpi, and over its valid
        steps. Noise, time and augmentation are a function of the seed, the number of the training batch and
        the frame's index in the dataset; in eval mode, without augmentation, of the index alone, so that
        a held-out loss can be compared between steps.
        """
        if torch.is_grad_enabled():
            self._samplers, self._loaded = [], []  # an optimizer is about to change the weights
        if self.training and self._statistics is not None:
            check_first_batch(self.config, self._statistics, self._dataset_meta, batch)
            self._statistics = None
        actions, anchor = batch[ACTION].float(), self._anchor(batch)
        if anchor is not None:
            actions = actions - anchor[:, None]
        actions = self._pad(actions, self.config.max_action_dim, ACTION, self.config.action_feature)
        keys = self._keys(batch, len(actions))
        noise = normal(keys, tuple(actions.shape[1:]), NOISE)
        time, learnt = sample_time(uniform(keys, (), TIME)), None
        if self.training and self.config.rtc_training_max_delay:
            delays = sample_delays(uniform(keys, (), DELAY), self.config.rtc_training_max_delay)
            time, learnt = decided_times(time, delays, self.config.chunk_size)
        observation, prefix = self.observation(batch), None
        if self.training:
            observation = self._augmented(observation, keys[:: self.config.num_flow_samples])
        # Precision has one owner, the model: an autocast around it would round what it keeps in float32.
        with torch.autocast(actions.device.type, enabled=False):
            if self.config.freeze == "vlm":
                with torch.no_grad():
                    prefix = self.model.prefix(observation)
            losses = self.model.loss(observation, actions, noise, time, prefix)
        losses = losses.unflatten(0, (len(actions), -1))
        if learnt is None:
            losses = losses.mean(1)
            valid = torch.ones_like(losses[..., 0])
        else:
            learnt = learnt.unflatten(0, (len(actions), -1)).to(losses.dtype)
            losses = (losses * learnt[..., None]).sum(1) / learnt.sum(1).clamp(min=1)[..., None]
            valid = learnt.amax(1)
        if self.config.mask_padded_actions and "action_is_pad" in batch:
            valid = valid * ~batch["action_is_pad"]
        per_sample = (losses.mean(-1) * valid).sum(1) / valid.sum(1).clamp(min=1)
        return (per_sample if reduction == "none" else per_sample.mean()), self._figures(losses, valid)

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
        """Actions (B, chunk, action size), normalised; `noise` (B, chunk, padded size) makes them repeatable.

        Real-time chunking, as LeRobot calls it: `prev_chunk_left_over` ((B,) steps, action size) are actions
        of the last chunk, normalised, that were not executed when the observation was taken;
        `inference_delay` of them will have been when these actions arrive. From there on the chunk goes on
        where the last one is: by what the policy has learnt (`rtc_training_max_delay`), or else guided, over
        `execution_horizon` steps. Raises ValueError for a delay in which a whole chunk would be executed,
        and for what is no number, in the observation or in the actions.
        """
        delay = inference_delay or 0
        if delay >= self.config.chunk_size:
            raise UserError(
                f"the delay of {delay} steps is a whole chunk of {self.config.chunk_size}: each action would "
                "be out of date when it arrives, and the robot would not move. `lerobot-pi0 latency` says "
                "what this machine can hold; a lower --fps or fewer --policy.num_inference_steps helps"
            )
        observation = self._checked_observation(batch)
        noise = self._noise(len(observation.state)) if noise is None else noise
        anchor, leftover = self._anchor(batch), None
        rtc = self.config.rtc_config or RTCConfig()
        if prev_chunk_left_over is not None and prev_chunk_left_over.numel() and rtc.enabled:
            if self.training:
                raise UserError("real-time chunking is for running a policy: call policy.eval() first")
            leftover = read_leftover(prev_chunk_left_over, delay, noise, anchor)
            self._is_warm = self._is_warm or leftover is not None
        horizon = execution_horizon or rtc.execution_horizon
        if leftover is not None and delay > horizon:
            tell_of_horizon(delay, horizon, min(2 * delay, self.config.chunk_size))
        return self._finished(self._sample(observation, noise, leftover, rtc, horizon), anchor, leftover)

    def encode(self, batch: Batch) -> Context:
        """What all chunks from an observation share. `plan` after it is `predict_action_chunk`."""
        observation = self._checked_observation(batch)
        with torch.autocast(observation.state.device.type, enabled=False):
            context = self._sampler().context(observation, self.config.chunk_size)
        return replace(context, anchor=self._anchor(batch))

    def plan(self, context: Context, noise: Tensor | None = None, num_samples: int = 1) -> Tensor:
        """Actions (B · num_samples, chunk, action size) from what was encoded, as often as you like.

        The samples of an observation stand in a row; `noise` is of their number. The same noise gives what
        `predict_action_chunk` gives, bit for bit, for the price of the denoising steps.
        """
        context = context.repeat(num_samples)
        noise = self._noise(context.batch_size) if noise is None else noise
        with torch.autocast(noise.device.type, enabled=False):
            actions = self._sampler().actions(context, noise, self.config.num_inference_steps)
        return self._finished(actions, context.anchor)

    @torch.no_grad()
    def select_action(  # pyrefly: ignore[bad-override]  # as above
        self, batch: Batch, *, noise: Tensor | None = None
    ) -> Tensor:
        """The next action (B, action size), normalised; after `n_action_steps` a new chunk is predicted."""
        if not self._action_queue:
            chunk = self.predict_action_chunk(batch, noise=noise)
            if self._guard is not None and self._last_action is not None:
                chunk = self._guard.hold(chunk, self._last_action)
            self._action_queue.extend(chunk[:, : self.config.n_action_steps].unbind(1))
        self._last_action = self._action_queue.popleft()
        return self._last_action

    def reset(self) -> None:
        """Forget the actions that were not executed yet. Before real-time chunking, warm up.

        LeRobot takes the longest inference so far for the delay of all that follow, so the first one must not
        be longer than they are.
        """
        self._action_queue: deque[Tensor] = deque()
        self._last_action: Tensor | None = None
        rtc = self.config.rtc_config
        if rtc is None or not rtc.enabled or self._is_warm:
            return
        if self.config.lerobot_warms_up:
            # It waits for two slow chunks: of a fast one the queue is full, and nobody asks for another. What
            # they leave cold is for the reset after them.
            self.config.lerobot_warms_up = False
            return
        self._warm_up(rtc)

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
        return self._trained.take(self, self.model.dtype)

    def update(self) -> None:
        """Called by LeRobot after each step of the optimizer: moves the average."""
        if self.config.ema_decay and not self._trained.parameters:
            raise UserError(
                "the moving average of the weights needs this policy's own optimizer: leave "
                "--use_policy_training_preset=true, or train with --policy.ema_decay=0"
            )
        self._trained.update()

    def train(self, mode: bool = True) -> Self:
        """To train, the weights; to evaluate, their average, if there is one. Frozen parts stay in eval mode.

        What sampling keeps of the weights is given back for training.
        """
        super().train(mode)
        if mode:
            self._samplers, self._loaded = [], []
            if self._dataset_meta is not None:
                self._trained.check(self)
        self._trained.show(average=not mode)
        for frozen in self._frozen():
            frozen.eval()
        return self

    def generate_model_card(
        self,
        dataset_repo_id: str,
        model_type: str,
        license: str | None,
        tags: list[str] | None,
        cfg: Any = None,
        dataset_meta: Any = None,
    ) -> ModelCard:
        """Our own card, not LeRobot's: see `model_card`."""
        return make_model_card(
            self.config,
            dataset_repo_id,
            base=self._base,
            licence=license,
            tags=tags,
            train=cfg,
            dataset=dataset_meta,
        )

    def wrap_with_peft(self, peft_config: Any = None, peft_cli_overrides: dict | None = None) -> Any:
        """The policy with new LoRA adapters, which train in its stead; `adapters` says where they go."""
        wrapped = super().wrap_with_peft(peft_config, peft_cli_overrides)
        assert self._base is not None
        adapters.name_base(wrapped, self.config, self._base)
        logger.info(summary(self.model))
        return wrapped

    def _get_default_peft_targets(self) -> dict[str, Any]:
        return adapters.default_targets()

    def _build_peft_config(self, cli_overrides: dict) -> Any:
        return super()._build_peft_config(adapters.lora_settings(self.config, cli_overrides))

    def _validate_peft_config(self, peft_config: Any) -> None:
        if self._base is None:
            raise UserError(
                "adapters over random weights are of no use: start from a checkpoint (--policy.path=... or "
                "--policy.pretrained_path=lerobot/pi0_base), or train without --peft"
            )
        adapters.check_settings(peft_config)

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Config and weights, written by the first process; under FSDP all must call this.

        Renamed when complete, lest a killed process leave half a file, and because our own weights may be
        mapped from the one in its place.
        """
        state_dict = whole_state(self) if state_dict is None else state_dict
        if dist.is_available() and dist.is_initialized() and dist.get_rank():
            return
        with TemporaryDirectory(dir=save_directory) as folder:
            # How this process runs the policy is no property of it.
            replace(self.config, int8=False, compile=False, rtc_config=None)._save_pretrained(Path(folder))
            Path(folder, CONFIG_NAME).replace(save_directory / CONFIG_NAME)
        tensors = {name: tensor.contiguous() for name, tensor in state_dict.items()}
        unfinished = save_directory / f"{WEIGHTS_FILE}.unfinished"
        save_file(tensors, unfinished, metadata={"format": "pt"})
        unfinished.replace(save_directory / WEIGHTS_FILE)
        write_certificate(self, save_directory)

    def _anchor(self, batch: Batch) -> Tensor | None:
        """What relative actions are relative to: float32 (B, action size), normalised, zero where they are
        absolute. None if all are."""
        anchor = self.config.anchor
        if anchor is None:
            return None
        state = batch[OBS_STATE].float()
        at = state.new_zeros(len(state), self._action_size)
        at[:, anchor.actions] = state[:, anchor.states] * state.new_tensor(anchor.gain) + state.new_tensor(
            anchor.offset
        )
        return at

    def _sample(
        self, observation: Observation, noise: Tensor, leftover: Leftover | None, rtc: RTCConfig, horizon: int
    ) -> Tensor:
        """A chunk as the network gives it, which goes on from the leftover if there is one."""
        if self.config.compile:  # one graph for all prompts
            observation = observation.padded(self.config.tokenizer_max_length)
        with torch.autocast(noise.device.type, enabled=False):
            sampler, steps = self._sampler(), self.config.num_inference_steps
            if leftover is None:
                return sampler.sample(observation, noise, steps)
            if learnt := self.config.rtc_training_max_delay:
                return sampler.sample(observation, noise, steps, decided(leftover, learnt))
            by = guidance(leftover, rtc.prefix_attention_schedule.value, horizon, rtc.max_guidance_weight)
            context = sampler.context(observation, self.config.chunk_size)
            return sampler.guided_actions(context, noise, steps, by)

    def _finished(self, actions: Tensor, anchor: Tensor | None, leftover: Leftover | None = None) -> Tensor:
        """What leaves the policy, of what the network gave: absolute, numbers, within the guard's limits.

        It begins with those of the leftover that will have been executed: what they lead to is guarded too.
        """
        if leftover is not None:
            actions = torch.cat((leftover.actions[:, : leftover.delay], actions[:, leftover.delay :]), 1)
        actions = actions[..., : self._action_size]
        actions = actions if anchor is None else actions + anchor[:, None]
        if bad := not_finite(actions, self._joints):
            raise UserError(
                f"the policy gave no numbers for {bad}, although its observation has numbers alone: nothing "
                "is sent. Its weights are damaged, or overflow: `lerobot-pi0 doctor --policy.path=...` looks"
            )
        return actions if self._guard is None else self._guard.hold(actions)

    def _checked_observation(self, batch: Batch) -> Observation:
        """The model's observation, of which every number is one."""
        observation = self.observation(batch)
        tasks = batch.get("task") or ()
        self._check_instructions([tasks] if isinstance(tasks, str) else tasks)
        for key in (OBS_STATE, *self.config.cameras.values()):
            names = self.config.state_feature_names if key == OBS_STATE else None
            if bad := not_finite(batch[key], names):
                raise UserError(
                    f"'{key}' of the observation is NaN or infinite in {bad}: no action is sent. Look at the "
                    "robot's sensor or camera, and at the statistics that normalise it"
                )
        return observation

    def _check_instructions(self, tasks: Sequence[str]) -> None:
        """Tell of each that is not of the training data, once."""
        if (data := self.config.training_data) is None:
            return
        if self.config.prompt_dropout:  # it was trained without one as well
            tasks = [task for task in tasks if task]
        for task in set(tasks) - self._instructions:
            self._instructions.add(task)
            if message := unknown_instruction(task, data):
                logger.warning(message)

    @torch.no_grad()
    def _warm_up(self, rtc: RTCConfig) -> None:
        """The first chunk, and the first that goes on from another, of an observation that nobody made."""
        self._is_warm = True
        device, size = self.model.action_out_proj.weight.device, self.config.vision.image_size
        state = torch.zeros(1, self.config.max_state_dim, device=device)
        tokens = torch.zeros(1, 8, dtype=torch.long, device=device)
        images = torch.zeros(1, len(self.config.cameras), 3, size, size, device=device)
        mask = torch.ones(images.shape[:2], dtype=torch.bool, device=device)
        observation = Observation(images, mask, tokens, torch.ones_like(tokens, dtype=torch.bool), state)
        noise = torch.zeros(1, self.config.chunk_size, self.config.max_action_dim, device=device)
        left = torch.ones_like(noise[0, :, : self._action_size])
        leftover = read_leftover(left, 1, noise, None)
        for _ in range(3 if self.config.compile else 1):  # a CUDA graph is recorded in the second call
            self._sample(observation, noise, None, rtc, 1)
            self._sample(observation, noise, leftover, rtc, self.config.chunk_size)

    def _sampler(self) -> Sampler:
        """The network in the form that is fastest here, made anew when its parameters have changed."""
        version = self._version()
        if not self._samplers or self._samplers[0][0] != version:
            self._samplers = []  # before the next one takes its memory
            loaded = next((checkpoint for of, checkpoint in self._loaded if of == version), None)
            sampler = Sampler(self.model, self._form(), loaded, self.config.compile)
            self._samplers = [(self._version(), sampler)]
        return self._samplers[0][1]

    def _form(self) -> Form:
        on_cpu = self.config.device == "cpu"
        if self.config.int8 and not on_cpu:
            raise UserError(f"--policy.int8 is for CPUs, and this policy runs on '{self.config.device}'")
        if not on_cpu or self.config.compile or not Packed.runs(self.model.dtype):
            return "fused"
        return "int8" if self.config.int8 else "packed"

    def _version(self) -> list[tuple[int, int]]:
        """Changes with the parameters, unless one writes to their `.data` or by a fused optimizer."""
        return [(parameter.data_ptr(), parameter._version) for parameter in self.model.parameters()]

    def _noise(self, batch_size: int) -> Tensor:
        shape = (batch_size, self.config.chunk_size, self.config.max_action_dim)
        return torch.randn(shape, device=self.model.action_out_proj.weight.device)

    @property
    def _joints(self) -> list[str]:
        """What the dimensions of actions are called, or their numbers."""
        return self.config.action_feature_names or [str(i) for i in range(self._action_size)]

    @property
    def _action_size(self) -> int:
        return cast(PolicyFeature, self.config.action_feature).shape[0]

    def _frozen(self) -> list[torch.nn.Module]:
        vlm: list[torch.nn.Module] = [self.model.vision, self.model.token_embedding, self.model.vlm]
        return vlm[: {"nothing": 0, "vision": 1, "vlm": 3}[self.config.freeze]]

    def _keys(self, batch: Batch, batch_size: int) -> Tensor:
        """A key for the random numbers of each (sample, flow sample)."""
        index = batch.get("index")
        if index is None:
            index = torch.arange(batch_size, device=batch[ACTION].device)
        seed, step = 0, 0
        if self.training:
            seed, step = self._trained.seed, self._trained.num_draws
            self._trained.num_draws += 1
        return sample_keys(seed, step, index.flatten(), self.config.num_flow_samples)

    def _augmented(self, observation: Observation, keys: Tensor) -> Observation:
        if self.config.augmentation:
            geometric = ["wrist" not in slot for slot in self.config.cameras]
            observation = replace(observation, images=augment(observation.images, keys, geometric))
        if self.config.prompt_dropout:
            mask = drop_prompts(observation.token_mask, keys, self.config.prompt_dropout)
            observation = replace(observation, token_mask=mask)
        return observation

    def _figures(self, losses: Tensor, valid: Tensor) -> dict[str, float]:
        """Loss by joint and by part of the chunk, as numbers: the one place where training waits for them."""
        every = self.config.log_joints_every
        if not (self.training and every and self._trained.num_draws % every == 0):
            return {}
        losses = losses.detach()[..., : self._action_size]
        sums, counts = (losses * valid[..., None]).sum(0), valid.sum(0)[:, None]
        joints = sums.sum(0) / counts.sum().clamp(min=1)
        parts = list(zip(sums.chunk(5), counts.chunk(5), strict=True))
        horizon = [part.mean(1).sum() / count.sum().clamp(min=1) for part, count in parts]
        ends = torch.tensor([0, *(len(part) for part, _ in parts)]).cumsum(0).tolist()
        names = [*self._joints, *(f"steps_{a}-{b - 1}" for a, b in itertools.pairwise(ends))]
        values = torch.cat((joints, torch.stack(horizon))).tolist()
        figures = {f"loss/{name}": value for name, value in zip(names, values, strict=True)}
        return figures | {"ema_decay": self.config.ema_decay}

    def _image(self, image: Tensor, key: str) -> Tensor:
        if image.ndim != 4 or image.shape[1] != 3:
            raise UserError(f"'{key}' must be (batch, 3, height, width), got {tuple(image.shape)}")
        image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        return letterbox(image, self.config.vision.image_size) * 2 - 1

    def _pad(self, vector: Tensor, size: int, key: str, feature: Any) -> Tensor:
        if vector.shape[-1] != feature.shape[0]:
            raise UserError(
                f"'{key}' has {vector.shape[-1]} dimensions, the policy was made for {feature.shape[0]}"
            )
        return torch.nn.functional.pad(vector.float(), (0, size - vector.shape[-1]))


def _policy_type(folder: Path) -> str | None:
    """What LeRobot calls the policy in a checkpoint; None where it is not LeRobot's."""
    file = folder / "config.json"
    try:
        return json.loads(file.read_text()).get("type") if file.is_file() else None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} cannot be read ({error}): copy or download it again") from error


def _averaged(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Whoever saves the policy, PEFT included, saves the average of what trained."""
    for name, average in cast(Pi0Policy, module)._trained.averages().items():
        state_dict[prefix + name] = average
