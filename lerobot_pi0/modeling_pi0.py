"""LeRobot's contract (queue, loss, loading) over the network: the only place that knows LeRobot's keys."""

import json
import logging
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from huggingface_hub import ModelCard
from lerobot.configs import PolicyFeature, PreTrainedConfig
from lerobot.policies import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from safetensors.torch import save_file
from torch import Tensor

from lerobot_pi0.configuration_pi0 import SMALL_TOKENIZER, Pi0Config
from lerobot_pi0.inference import Context, Sampler
from lerobot_pi0.linear import Form, Packed
from lerobot_pi0.model import Observation, Pi0
from lerobot_pi0.model.flow import sample_time
from lerobot_pi0.model.gemma import Cache
from lerobot_pi0.model.observation import letterbox
from lerobot_pi0.prefix_cache import PrefixCache, open_prefix_cache
from lerobot_pi0.statistics import check_statistics
from lerobot_pi0.weights import WEIGHTS_FILE, Checkpoint, CheckpointError, find_checkpoint, load_weights

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


class Pi0Policy(PreTrainedPolicy):
    """π0 as a LeRobot policy.

    batch → Observation ─Pi0.sample→ (B, chunk, padded) ─[..., :action_dim]→ chunk ─queue→ action, normalised

    `Pi0Policy(config)` has random weights; `from_pretrained` never has. The action queue is the only state.
    """

    # LeRobot declares both as None.
    config_class = Pi0Config  # pyrefly: ignore[bad-assignment]
    name = "lerobot_pi0"  # pyrefly: ignore[bad-assignment]
    config: Pi0Config  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self, config: Pi0Config, dataset_stats: dict | None = None, dataset_meta: Any = None, **_: Any
    ):
        """LeRobot gives `dataset_stats` and `dataset_meta` when it trains; what else it gives is not used."""
        super().__init__(config)
        config.validate_features()
        trains = dataset_stats is not None or dataset_meta is not None
        if trains and config.int8:
            raise ValueError("--policy.int8 is for running a policy: train without it")
        if trains and config.statistics == "dataset":
            check_statistics(config, dataset_stats or {}, "the dataset")
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
        for stack in (self.model.vision, self.model.vlm, self.model.expert):
            stack.gradient_checkpointing = config.gradient_checkpointing
        self._dataset_meta = dataset_meta
        self._prefix_cache: PrefixCache | None = None
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

        Built without initialisation and from memory-mapped files; loading is strict. Trained parameters are
        held in float32 when LeRobot trains (it then passes `dataset_meta`), all others in `config.dtype`; on
        a CPU they stay as the file has them, because sampling has its own form of them.
        Raises FileNotFoundError or CheckpointError that says what is wrong; it never returns a policy without
        its weights.
        """
        folder = find_checkpoint(
            pretrained_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
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
        with torch.device("meta"):
            policy = cls(config, dataset_stats, dataset_meta)
        own_form = dataset_meta is None and policy._form() != "fused"
        dtypes = {
            name: torch.float32
            if dataset_meta is not None and parameter.requires_grad
            else policy.model.dtype
            for name, parameter in policy.model.named_parameters()
        }
        load_weights(policy.model, checkpoint, None if own_form else dtypes, config.device)
        if own_form:
            policy._loaded = [(policy._version(), checkpoint)]
        if not checkpoint.is_ours:
            # LeRobot builds processors after the policy, from the folder in `pretrained_path` if there is
            # one. Those of another policy are not ours (another prompt, a gated tokenizer): without the path
            # it asks our own factory, and a --rename_map of its finds no step to go to.
            config.base_checkpoint, config.base_revision = str(pretrained_name_or_path), revision
            config.pretrained_path = config.pretrained_revision = None
            logger.info("weights of another layout: the processors are new, and --rename_map has no effect")
        logger.info("%d tensors from %s, all of them used", len(checkpoint), folder)
        return policy.eval()

    def observation(self, batch: Batch) -> Observation:
        """The model's observation of a processed batch: cameras in slot order, state padded with zeros."""
        missing = [key for key in (*self.config.cameras.values(), OBS_STATE) if key not in batch]
        if missing:
            raise ValueError(
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
        """Flow-matching loss of a processed batch: a scalar, or with "none" one per sample, whose mean it is.

        A sample's loss is the mean over the padded action's dimensions, as in openpi, and over its valid
        steps. In eval mode noise and time are a function of the batch's first index, so that a held-out loss
        can be compared between steps.
        """
        if torch.is_grad_enabled():
            self._samplers, self._loaded = [], []  # an optimizer is about to change the weights
        actions = self._pad(batch[ACTION], self.config.max_action_dim, ACTION, self.config.action_feature)
        noise, time = self._draw(batch, actions)
        # Precision has one owner, the model: an autocast around it would round what it keeps in float32.
        observation, prefix = self.observation(batch), None
        with torch.autocast(actions.device.type, enabled=False):
            if self.config.freeze == "vlm":
                prefix = self._prefix(batch, observation)
            losses = self.model.loss(observation, actions, noise, time, prefix)
        losses = losses.mean(-1).unflatten(0, (len(actions), -1)).mean(1)
        valid = torch.ones_like(losses)
        if self.config.mask_padded_actions and "action_is_pad" in batch:
            valid = (~batch["action_is_pad"]).to(losses.dtype)
        per_sample = (losses * valid).sum(1) / valid.sum(1).clamp(min=1)
        return (per_sample if reduction == "none" else per_sample.mean()), {}

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

        The last three keywords are LeRobot's for real-time chunking, which this policy says it does not
        support: they change nothing.
        """
        observation = self.observation(batch)
        noise = self._noise(len(observation.state)) if noise is None else noise
        with torch.autocast(noise.device.type, enabled=False):
            actions = self._sampler().sample(observation, noise, self.config.num_inference_steps)
        return actions[..., : self._action_size]

    def encode(self, batch: Batch) -> Context:
        """What all chunks from an observation share. `plan` after it is `predict_action_chunk`."""
        observation = self.observation(batch)
        with torch.autocast(observation.state.device.type, enabled=False):
            return self._sampler().context(observation, self.config.chunk_size)

    def plan(self, context: Context, noise: Tensor | None = None, num_samples: int = 1) -> Tensor:
        """Actions (B · num_samples, chunk, action size) from what was encoded, as often as you like.

        The samples of an observation stand in a row; `noise` is of their number. The same noise gives what
        `predict_action_chunk` gives, bit for bit, for the price of the denoising steps.
        """
        context = context.repeat(num_samples)
        noise = self._noise(context.batch_size) if noise is None else noise
        with torch.autocast(noise.device.type, enabled=False):
            actions = self._sampler().actions(context, noise, self.config.num_inference_steps)
        return actions[..., : self._action_size]

    @torch.no_grad()
    def select_action(  # pyrefly: ignore[bad-override]  # as above
        self, batch: Batch, *, noise: Tensor | None = None
    ) -> Tensor:
        """The next action (B, action size), normalised; after `n_action_steps` a new chunk is predicted."""
        if not self._action_queue:
            chunk = self.predict_action_chunk(batch, noise=noise)
            self._action_queue.extend(chunk[:, : self.config.n_action_steps].unbind(1))
        return self._action_queue.popleft()

    def reset(self) -> None:
        """Forget the actions that were not executed yet."""
        self._action_queue: deque[Tensor] = deque()

    # The base says dict, LeRobot's optimizers take what torch's do.
    def get_optim_params(self) -> list[dict[str, Any]]:  # pyrefly: ignore[bad-override]
        """What trains, as one group, updated by torch's fused kernels (CPU, CUDA, MPS and XPU have them)."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "fused": True}]

    def train(self, mode: bool = True) -> Self:
        """Frozen parts stay in eval mode. What sampling keeps of the weights is given back for training."""
        super().train(mode)
        if mode:
            self._samplers, self._loaded = [], []
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
        """LeRobot's card, with the licence that PaliGemma's weights bring along, and what to install."""
        license = license or ("apache-2.0" if self.config.tokenizer == SMALL_TOKENIZER else "gemma")
        card = super().generate_model_card(dataset_repo_id, model_type, license, tags, cfg, dataset_meta)
        hint = "This policy needs the plugin, which LeRobot then finds: `pip install lerobot-policy-pi0`."
        card.text = f"{hint}\n\n{card.text}"
        return card

    def _validate_peft_config(self, peft_config: Any) -> None:
        if self.config.base_checkpoint and not self.config.pretrained_path:
            raise ValueError(
                f"adapters over '{self.config.base_checkpoint}', whose layout is another, could not be "
                "loaded again: train a checkpoint of this policy from it first (--steps=1 will do), and "
                "give that as --policy.path"
            )
        super()._validate_peft_config(peft_config)

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Config and weights. Renamed when complete: our weights may be mapped from the file in its place."""
        # How this process runs the policy is no property of it.
        replace(self.config, int8=False, compile=False)._save_pretrained(save_directory)
        tensors = {name: tensor.contiguous() for name, tensor in (state_dict or self.state_dict()).items()}
        unfinished = save_directory / f"{WEIGHTS_FILE}.unfinished"
        save_file(tensors, unfinished, metadata={"format": "pt"})
        unfinished.replace(save_directory / WEIGHTS_FILE)

    def _prefix(self, batch: Batch, observation: Observation) -> Cache:
        """The frozen model's prefix, without a graph: from the cache beside the dataset, or computed."""
        if self.config.cache_prefix and self._dataset_meta is not None:
            if self._prefix_cache is None:
                self._prefix_cache = open_prefix_cache(self.config, self.model, self._dataset_meta)
            return self._prefix_cache.lookup(observation, batch["index"], self.model.prefix)
        with torch.no_grad():
            return self.model.prefix(observation)

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
            raise ValueError(f"--policy.int8 is for CPUs, and this policy runs on '{self.config.device}'")
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
    def _action_size(self) -> int:
        return cast(PolicyFeature, self.config.action_feature).shape[0]

    def _frozen(self) -> list[torch.nn.Module]:
        vlm: list[torch.nn.Module] = [self.model.vision, self.model.token_embedding, self.model.vlm]
        return vlm[: {"nothing": 0, "vision": 1, "vlm": 3}[self.config.freeze]]

    def _draw(self, batch: Batch, actions: Tensor) -> tuple[Tensor, Tensor]:
        num, device, generator = len(actions) * self.config.num_flow_samples, actions.device, None
        if not self.training:
            index = batch.get("index")
            generator = torch.Generator(device).manual_seed(0 if index is None else int(index.flatten()[0]))
        noise = torch.randn((num, *actions.shape[1:]), device=device, generator=generator)
        return noise, sample_time(num, device, generator)

    def _image(self, image: Tensor, key: str) -> Tensor:
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"'{key}' must be (batch, 3, height, width), got {tuple(image.shape)}")
        image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        return letterbox(image, self.config.vision.image_size) * 2 - 1

    def _pad(self, vector: Tensor, size: int, key: str, feature: Any) -> Tensor:
        if vector.shape[-1] != feature.shape[0]:
            raise ValueError(
                f"'{key}' has {vector.shape[-1]} dimensions, the policy was made for {feature.shape[0]}"
            )
        return torch.nn.functional.pad(vector.float(), (0, size - vector.shape[-1]))


def _policy_type(folder: Path) -> str | None:
    """What LeRobot calls the policy in a checkpoint; None where it is not LeRobot's."""
    file = folder / "config.json"
    return json.loads(file.read_text()).get("type") if file.is_file() else None
