"""Every setting of the policy: default, meaning, validation. The defaults are openpi's π0 as published."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from draccus.parsers.encoding import encode, encode_choice, encode_dataclass
from draccus.utils import is_choice_type
from huggingface_hub.constants import CONFIG_NAME
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.utils.constants import (
    ACTION,
    OBS_IMAGES,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
    OBS_STATE,
)
from lerobot.utils.feature_utils import dataset_to_policy_features
from torch import Tensor

from lerobot_pi0.errors import UserError
from lerobot_pi0.lerobot_compat import dataset_key, log_versions
from lerobot_pi0.model import ExpertConfig, GemmaConfig, SiglipConfig
from lerobot_pi0.model.flow import Solver
from lerobot_pi0.training.optimizer import ResumableAdamWConfig
from lerobot_pi0.training.randomness import bytes_of, normal_of
from lerobot_pi0.training.schedule import CosineAfterWarmupConfig

logger = logging.getLogger(__name__)

# What LeRobot keeps of a dataset: {"action": {"mean": …, "std": …, …}, …}.
Statistics = dict[str, dict[str, Any]]
# Named, because draccus finds the comment above a field only when quotes are not in its type.
StatisticsSource = Literal["dataset", "checkpoint"]
Dtype = Literal["bfloat16", "float32"]
Frozen = Literal["nothing", "vision", "vlm"]
Backend = Literal["auto", "eager", "compile", "int8", "fp8"]
FirstAction = Literal["clamp", "refuse", "free"]

RETIRED = {"int8", "compile", "cache_prefix", "anchor"}
SMALL_TOKENIZER = "small"  # ships with the package
ABSOLUTE_JOINTS = ("gripper",)  # openpi's π0 learns all others relative to the state
NUM_ALOHA_JOINTS = 14
CAMERA_SLOTS = ("base", "left_wrist", "right_wrist")  # the order in which openpi's π0 sees its cameras
WRIST_WORDS = ("wrist", "hand", "gripper")  # in the name of a camera: it goes to a wrist slot


@dataclass(frozen=True)
class ReferenceState:
    """How a chunk of relative actions becomes absolute, in normalized units.

    To dimension `actions[i]` of each action is added: dimension `states[i]` of the observation's state
    · `gain[i]` + `offset[i]`.
    """

    actions: list[int]
    states: list[int]
    gain: list[float]
    offset: list[float]


@dataclass(frozen=True)
class ActionLimits:
    """What actions the training data has, dimension by dimension, in the robot's units (in openpi's, with
    `adapt_to_pi`).

    A normalized action is action · `gain` + `offset`. `pose` gives the normalized action at which the robot
    stays where it is; None where actions are no positions, or it is not known.
    """

    low: list[float]
    high: list[float]
    step: list[float] | None  # the largest between two successive actions; None: not known
    gain: list[float]
    offset: list[float]
    pose: ReferenceState | None = None


@dataclass(frozen=True)
class TrainingData:
    """What a policy keeps of its training data, to warn of being run otherwise than it was trained."""

    fps: float  # actions per second
    tasks: list[str]  # its instructions; none if there are too many to keep


@PreTrainedConfig.register_subclass("lerobot_pi0")
@dataclass
class Pi0Config(PreTrainedConfig):
    """Settings of `--policy.type=lerobot_pi0`, saved beside the weights: a checkpoint describes itself."""

    # What messages call the model, and the published weights that a fine-tuning starts from.
    model_name: ClassVar[str] = "π0"
    published_base: ClassVar[str] = "lerobot/pi0_base"
    # Whether quantiles are those of a dataset's frames, where they are on this disk: those that LeRobot 0.6
    # records are averages of the episodes'. Runs of older versions go on with these.
    quantiles_of_frames: ClassVar[bool] = False
    default_normalization: ClassVar[dict[str, NormalizationMode]] = {
        "VISUAL": NormalizationMode.IDENTITY,
        "STATE": NormalizationMode.MEAN_STD,
        "ACTION": NormalizationMode.MEAN_STD,
    }

    # Sizes. A published checkpoint fits the defaults; a small model is a few smaller numbers.
    vision: SiglipConfig = field(default_factory=SiglipConfig)
    vlm: GemmaConfig = field(default_factory=GemmaConfig)
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    # Shorter state and action vectors are padded with zeros to these sizes.
    max_state_dim: int = 32
    max_action_dim: int = 32

    # Actions predicted at once, and how many of them are executed before the next prediction.
    chunk_size: int = 50
    n_action_steps: int = 50
    # Steps from noise to actions, each of which evaluates the velocity once.
    num_inference_steps: int = 10
    # How: euler, as published, or ab2 (second-order Adams–Bashforth), of which six steps are about as
    # accurate as ten of Euler (docs/robots.md).
    solver: Solver = "euler"

    # Actions outside the range of the training data by more than a tenth of it, or in larger steps than any
    # there, are held at the limit and reported. Off for simulators, where nothing breaks.
    chunk_guard: bool = True
    # The first action, which no other one precedes: at most one of the data's steps from the measured pose
    # (clamp: the robot approaches by such steps), an error if it is further (refuse), or as it is (free).
    first_action: FirstAction = "clamp"

    # Which camera fills which slot, for example '{"base": "front", "left_wrist": "wrist"}'. Empty: assigned
    # by name, logged and saved. A slot without a camera costs nothing: it is neither encoded nor attended to.
    cameras: dict[str, str] = field(default_factory=dict)

    # A repository on the hub, a folder, or "small" (in the package, for small models from scratch).
    # A checkpoint of this policy carries its tokenizer and maximum length, and keeps them (--policy.path).
    tokenizer: str = "google/paligemma-3b-pt-224"
    # Prompt tokens, from beginning of sequence to closing newline; a longer prompt is cut, with a warning.
    tokenizer_max_length: int = 48

    # Kinds of features that it does not name have the default mode.
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=dict)
    # Normalize by the dataset's statistics, or by those of the checkpoint that training starts from.
    statistics: StatisticsSource = "dataset"

    # Learn actions relative to the state of the observation that a chunk is predicted from, joint by joint as
    # they are called. Their statistics are computed when training starts. What leaves the policy is absolute.
    relative_actions: bool = False
    # Joints that stay absolute all the same: those with one of these words in their name.
    absolute_joints: list[str] = field(default_factory=lambda: list(ABSOLUTE_JOINTS))

    # ALOHA alone: learn the joints that openpi's base models were trained with, of which some turn the other
    # way and grippers are angles of their motors (data/aloha.py). What enters and leaves is ALOHA's.
    adapt_to_pi: bool = False

    # What the network computes in. Trained parameters are held in float32 all the same; frozen ones and those
    # of a deployed policy in this.
    dtype: Dtype = "bfloat16"
    # How a policy is run; not stored in the checkpoint. auto: the fastest exact linear layers of the device,
    # on CUDA as a CUDA graph, which the first chunk records. eager: without one. compile: in the graph, the
    # prefix, a step and a guided step are compiled (GPU), which takes the first chunk longer, for prompts of
    # `tokenizer_max_length`; a training compiles its layers (not with FSDP). int8: dynamic int8 linear
    # layers, a third faster (CPU only). fp8: 8-bit floats in vision and language model (GPU of compute
    # capability 8.9).
    backend: Backend = "auto"

    # What stays as it is in training. With "vlm" no gradient runs through the prefix: half the work, the same
    # gradients for the expert.
    freeze: Frozen = "nothing"
    # Recompute activations in the backward pass: less memory, about a quarter more work.
    gradient_checkpointing: bool = False
    # (noise, time) pairs drawn per observation and step, over one pass of the vision-language model.
    num_flow_samples: int = 1
    # Training sees frames cropped by a twentieth, turned by up to 5° (not wrist cameras), in other colours.
    augmentation: bool = True
    # The share of training samples whose instruction is left out, so that the policy also acts without one.
    prompt_dropout: float = 0.0
    # Leave actions beyond the end of an episode out of the loss. openpi trains on them (false).
    mask_padded_actions: bool = True

    # Training-time real-time chunking: the policy learns to continue an action prefix of up to so many
    # committed actions, which then costs nothing at run time. Set it to the largest delay (latency · fps, in
    # steps) that you expect. 0 disables it; --inference.type=rtc then uses guidance.
    rtc_training_max_delay: int = 0

    # EMA of the trained weights, which is evaluated and saved as the policy's; openpi's decay.
    # 0 is without. LoRA and DDP keep one as well; with FSDP it has to be 0.
    ema_decay: float = 0.99
    # Loss by joint and by part of the chunk, computed every so many steps (0: never).
    log_joints_every: int = 10

    optimizer_lr: float = 2.5e-5
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = 1e-10
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 1_000
    scheduler_decay_steps: int = 30_000
    scheduler_decay_lr: float = 2.5e-6

    # Filled from the dataset: what each dimension of actions and state is called.
    action_feature_names: list[str] | None = None
    state_feature_names: list[str] | None = None
    # Filled when training starts with relative actions: what makes them absolute.
    reference_state: ReferenceState | None = None
    # Filled when training starts: what the chunk guard holds actions to.
    action_limits: ActionLimits | None = None
    # Filled when training starts: what the policy is run with is compared to it.
    training_data: TrainingData | None = None
    # Filled by lerobot-rollout while it runs with --inference.type=rtc, and not saved.
    rtc_config: RTCConfig | None = None
    # Filled when weights come from a checkpoint of another layout: where they came from.
    base_checkpoint: str | None = None
    base_revision: str | None = None
    # Filled when adapters are made: the fingerprint of the weights that they are over.
    base_fingerprint: str | None = None

    # Retired names, which flags and saved configs may have for one release; they are not written (RETIRED).
    # Retired, set --policy.backend to int8.
    int8: bool = False
    # Retired, set --policy.backend to compile.
    compile: bool = False
    # Retired, has no effect: the prefix is always computed.
    cache_prefix: bool = False
    # Retired, the old name of reference_state.
    anchor: ReferenceState | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._translate_retired()
        self.normalization_mapping = self.default_normalization | self.normalization_mapping

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write config.json, without how this process runs the policy, which is no property of it. The file
        replaces the one in its place when it is complete.
        """
        saved = replace(self, backend="auto", rtc_config=None)
        unfinished = save_directory / f"{CONFIG_NAME}.unfinished"
        unfinished.write_text(json.dumps(encode(saved, PreTrainedConfig), indent=4))
        unfinished.replace(save_directory / CONFIG_NAME)

    def validate_settings(self) -> None:
        """Check the settings that do not depend on features. Raises UserError that names the flag.

        Not part of construction: draccus replaces the message of a ValueError that it meets there by
        "Couldn't instantiate class".
        """
        self._check_sizes()
        plain = [of.name for of in fields(self) if of.type in (bool, int, float)]
        if missing := [name for name in plain if getattr(self, name) is None]:
            raise UserError(f"--policy.{missing[0]} must not be null")
        if unknown := [kind for kind in self.normalization_mapping if kind not in self.default_normalization]:
            raise UserError(
                f"--policy.normalization_mapping names {unknown}, which do not exist: the kinds are "
                f"{', '.join(self.default_normalization)}"
            )
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise UserError(
                f"n_action_steps ({self.n_action_steps}) must be between 1 and chunk_size "
                f"({self.chunk_size}): set --policy.n_action_steps or --policy.chunk_size"
            )
        if not 0 <= self.ema_decay < 1 or not 0 <= self.prompt_dropout < 1:
            raise UserError(
                "--policy.ema_decay and --policy.prompt_dropout must be at least 0 and less than 1, got "
                f"{self.ema_decay} and {self.prompt_dropout}"
            )
        if not 0 <= self.rtc_training_max_delay < self.chunk_size:
            raise UserError(
                f"--policy.rtc_training_max_delay ({self.rtc_training_max_delay}) must be less than a chunk "
                f"(--policy.chunk_size={self.chunk_size}): a chunk of committed actions alone has no loss"
            )
        for name in ("num_inference_steps", "num_flow_samples", "max_state_dim", "max_action_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"--policy.{name} must be at least 1, got {getattr(self, name)}")
        if self.tokenizer_max_length < 3:
            raise UserError(
                "--policy.tokenizer_max_length must leave room for a beginning, a word and a newline, got "
                f"{self.tokenizer_max_length}"
            )

    def _check_adapters(self) -> None:
        """Raises UserError for a checkpoint without the adapters that LeRobot would look for in it."""
        if not self.use_peft or self.pretrained_path is None:
            return
        folder = Path(self.pretrained_path)
        if folder.is_dir() and not (folder / "adapter_config.json").is_file():
            raise UserError(
                f"--policy.use_peft=true goes on with adapters, and '{folder}' has none. For new ones over "
                "these weights, leave it out and give --peft.method_type=LORA"
            )

    def _check_schedule(self) -> None:
        """Of a training alone: a checkpoint loads whatever it was trained with."""
        if not 0 <= self.scheduler_warmup_steps < self.scheduler_decay_steps:
            raise UserError(
                f"--policy.scheduler_warmup_steps ({self.scheduler_warmup_steps}) must be at least 0 and "
                f"less than --policy.scheduler_decay_steps ({self.scheduler_decay_steps}), which counts it in"
            )
        if not self.optimizer_lr > 0 or not self.scheduler_decay_lr >= 0:
            raise UserError(
                "--policy.optimizer_lr must be more than 0 and --policy.scheduler_decay_lr at least 0, got "
                f"{self.optimizer_lr} and {self.scheduler_decay_lr}"
            )

    def _check_sizes(self) -> None:
        for part in ("vision", "vlm", "expert"):
            for name, size in vars(getattr(self, part)).items():
                if size < 1:
                    raise UserError(f"--policy.{part}.{name} must be at least 1, got {size}")
        for part, whole, divisor in (
            ("vision", "image_size", "patch_size"),
            ("vision", "width", "num_heads"),
            ("vlm", "num_heads", "num_kv_heads"),
        ):
            sizes = vars(getattr(self, part))
            if sizes[whole] % sizes[divisor]:
                raise UserError(
                    f"--policy.{part}.{whole} ({sizes[whole]}) must be a multiple of "
                    f"--policy.{part}.{divisor} ({sizes[divisor]})"
                )
        if self.vlm.head_dim % 2:
            raise UserError(f"--policy.vlm.head_dim ({self.vlm.head_dim}) must be even")
        if self.expert.width % 2:
            raise UserError(
                f"--policy.expert.width ({self.expert.width}) must be even: half sines, half cosines of time"
            )

    def _translate_retired(self) -> None:
        for name in ("int8", "compile"):
            if getattr(self, name):
                logger.warning("--policy.%s=true is retired: use --policy.backend=%s", name, name)
                self.backend = name
        if self.cache_prefix:
            logger.warning("--policy.cache_prefix is retired, and has no effect")
        self.reference_state = self.reference_state or self.anchor
        self.int8 = self.compile = self.cache_prefix = False
        self.anchor = None

    def validate_features(self) -> None:
        """Check settings and the dataset's or environment's features, and give each camera its slot.

        Raises UserError for an impossible setting, when there is no camera, no state or no action, or when
        one does not fit.
        """
        self.validate_settings()
        for kind, feature, flag in (
            (OBS_STATE, self.robot_state_feature, "max_state_dim"),
            (ACTION, self.action_feature, "max_action_dim"),
        ):
            if feature is None:
                features = [*(self.input_features or ()), *(self.output_features or ())]
                raise UserError(
                    f"{self.model_name} needs '{kind}'. The features are {features}. LeRobot trains on "
                    f"'{OBS_STATE}', '{ACTION}' and '{OBS_IMAGES}.NAME' alone, and in 0.6.1 --rename_map "
                    "does not change what it reads: write the dataset again under these names, by the script "
                    'in docs/finetuning.md ("Datasets with other names")'
                )
            if len(feature.shape) != 1:
                raise UserError(f"'{kind}' has shape {feature.shape}; the model takes vectors")
            if self.adapt_to_pi and feature.shape != (NUM_ALOHA_JOINTS,):
                raise UserError(
                    f"--policy.adapt_to_pi=true is for ALOHA's {NUM_ALOHA_JOINTS} joints, six and a gripper "
                    f"of each arm, and '{kind}' has shape {feature.shape}: leave it out for other robots"
                )
            limit = self.padded_state_dim if kind == OBS_STATE else self.max_action_dim
            if feature.shape[0] > limit:
                raise UserError(
                    f"'{kind}' has shape {feature.shape}; the model takes vectors of at most {limit}. "
                    f"A model trained from scratch can be larger: --policy.{flag}={feature.shape[0]}"
                )
        if not self.image_features:
            raise UserError(
                f"{self.model_name} needs at least one camera. The input features are "
                f"{list(self.input_features or ())}: use a dataset with images or videos"
            )
        given, images = self.cameras, self.image_features
        not_rgb = {key: of.shape for key, of in images.items() if num_channels(of.shape) != 3}
        self.cameras = assign_cameras([key for key in images if given or key not in not_rgb], given)
        if wrong := [key for key in not_rgb if key in self.cameras.values() or not self.cameras]:
            shapes = ", ".join(f"'{key}' has shape {not_rgb[key]}" for key in wrong)
            raise UserError(
                f"the model takes RGB pictures; {shapes}: name RGB cameras alone in --policy.cameras"
            )
        if not_rgb and not given:
            logger.warning("cameras left out, because they are not RGB: %s", not_rgb)

    @property
    def state_size(self) -> int | None:
        """Size of the robot's state; None until the features are known."""
        feature = self.robot_state_feature
        return None if feature is None else feature.shape[0]

    @property
    def padded_state_dim(self) -> int:
        """Size of the state in the observation that the network is given."""
        return self.max_state_dim

    @property
    def has_published_sizes(self) -> bool:
        """Whether published weights fit the network."""
        return (self.vision, self.vlm, self.expert) == (SiglipConfig(), GemmaConfig(), ExpertConfig())

    def set_dataset_feature_metadata(self, features: dict[str, dict[str, Any]]) -> None:
        """Called by LeRobot with the dataset's features before it builds a policy to train: keeps the names
        of their dimensions, and checks the cameras. Raises UserError for a slot that does not exist.
        """
        log_versions()
        self._check_slots()
        self._add_cameras(features)
        self.action_feature_names = _dimension_names(features.get(dataset_key(ACTION, features), {}))
        self.state_feature_names = _dimension_names(features.get(dataset_key(OBS_STATE, features), {}))

    def _check_slots(self) -> None:
        wrong = [
            slot
            for slot, name in self.cameras.items()
            if slot not in CAMERA_SLOTS and slot != name.removeprefix(f"{OBS_IMAGES}.")
        ]
        if wrong:
            raise UserError(
                f"--policy.cameras names the slots {wrong}, which do not exist: the slots are "
                f"{', '.join(CAMERA_SLOTS)}, and for a further camera its own name"
            )

    def _add_cameras(self, features: dict[str, dict[str, Any]]) -> None:
        """Add the dataset's cameras that --policy.cameras names to those of the checkpoint, whose features
        LeRobot keeps with --policy.path; log the ones that are left out.
        """
        cameras = {key: of for key, of in features.items() if of.get("dtype") in ("image", "video")}
        before = list(self.image_features)
        others = [key for key in cameras if key not in before]
        named = [key for key in others if any(_is_called(key, name) for name in self.cameras.values())]
        if named:
            added = dataset_to_policy_features({key: cameras[key] for key in named})
            self.input_features = {**(self.input_features or {}), **added}
        left = [key for key in others if key not in named]
        # Where the checkpoint's are not in the dataset, --rename_map gives it their names.
        if before and left and {*before} <= {*cameras}:
            both = {
                slot: key.removeprefix(f"{OBS_IMAGES}.")
                for slot, key in slots_by_name([*before, *left]).items()
            }
            logger.warning(
                "cameras of the dataset that the policy does not have, and that are left out: %s. To train "
                "with them: --policy.cameras='%s'",
                left,
                json.dumps(both),
            )

    def example_observation(
        self,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
        image_size: tuple[int, int] | None = None,
        prompt_length: int = 8,
    ) -> dict[str, Tensor]:
        """A made-up batch as the processor gives it, always the same for the same config and arguments.

        Images are uint8 (batch, 3, height, width) of each camera's size, or of `image_size` (height, width);
        the state is float32 (batch, dims); tokens and their mask are (batch, prompt_length).
        """
        assert self.robot_state_feature is not None
        batch: dict[str, Tensor] = {}
        for camera in self.cameras.values():
            height, width = image_size or image_height_width(self.image_features[camera].shape)
            batch[camera] = bytes_of(camera, 3 * height * width).view(1, 3, height, width)
        batch[OBS_STATE] = normal_of("state", self.robot_state_feature.shape[0])[None]
        ids = bytes_of("prompt", 2 * prompt_length).view(1, -1, 2).long()
        batch[OBS_LANGUAGE_TOKENS] = (ids[..., 0] * 256 + ids[..., 1]) % self.vlm.vocab_size
        batch[OBS_LANGUAGE_ATTENTION_MASK] = torch.ones(1, prompt_length, dtype=torch.bool)
        return {name: x.repeat_interleave(batch_size, 0).to(device) for name, x in batch.items()}

    def get_optimizer_preset(self) -> ResumableAdamWConfig:
        self.validate_settings()  # lerobot-train calls this first, before it loads the dataset
        self._check_schedule()
        self._check_adapters()
        return ResumableAdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            eps=self.optimizer_eps,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> "CosineAfterWarmupConfig":
        return CosineAfterWarmupConfig(
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
            decay_factor=self.scheduler_decay_lr / self.optimizer_lr,
        )

    # No field: a run's, not the policy's.
    lerobot_warms_up = False

    @property
    def compile_model(self) -> bool:
        """LeRobot's name for `backend="compile"`, which lerobot-rollout sets to its own --use_torch_compile.
        It then warms up by itself."""
        return self.backend == "compile"

    @compile_model.setter
    def compile_model(self, value: bool) -> None:
        self.backend, self.lerobot_warms_up = "compile" if value else self.backend, value

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None


@encode.register(Pi0Config, include_subclasses=True)  # pyrefly: ignore[missing-attribute]
def _encode(config: Pi0Config, declared: Any = None) -> dict[str, Any]:
    """As draccus encodes a config that is declared to be of this type, without retired names."""
    encoded = encode_choice(config, declared) if is_choice_type(declared) else encode_dataclass(config)
    return {name: value for name, value in encoded.items() if name not in RETIRED}


def num_channels(shape: Sequence[int]) -> int:
    """Channels of an image of this shape, first or last; 0 where neither end can be channels."""
    ends = (shape[0], shape[-1]) if len(shape) == 3 else ()
    return next((size for size in ends if size <= 4), 0)


def image_height_width(shape: Sequence[int]) -> tuple[int, int]:
    """Height and width of an image of this shape, wherever its channels stand."""
    height, width = shape[1:] if shape[0] <= 4 else shape[:2]
    return height, width


def assign_cameras(keys: list[str], given: dict[str, str]) -> dict[str, str]:
    """Slot → image feature, in the order in which the model sees them.

    `given` maps slots to features, which may be named by their last part ("front" for
    "observation.images.front").
    Without it, they go by their names (`slots_by_name`). Raises UserError for a camera that does not exist
    or that stands in two slots.
    """
    if given:
        chosen = {slot: _find_camera(name, slot, keys) for slot, name in given.items()}
        if len(set(chosen.values())) < len(chosen):
            raise UserError(f"--policy.cameras puts one camera into two slots: {given}")
    else:
        chosen = slots_by_name(keys)
        logger.info("cameras, assigned by name: %s (change with --policy.cameras)", chosen)
    slots = [
        *(slot for slot in CAMERA_SLOTS if slot in chosen),
        *(slot for slot in chosen if slot not in CAMERA_SLOTS),
    ]
    return {slot: chosen[slot] for slot in slots}


def slots_by_name(keys: list[str]) -> dict[str, str]:
    """Slot → image feature: a wrist camera goes to a wrist slot by its name, the first other one to the base,
    and the rest where there is room.
    """
    chosen: dict[str, str] = {}
    wrists = [key for key in keys if any(word in key.lower() for word in WRIST_WORDS)]
    others = [key for key in keys if key not in wrists]
    # Cameras with a side first: they know where they belong.
    for key in sorted(wrists, key=lambda key: "right" not in key.lower() and "left" not in key.lower()):
        sides = ["right_wrist", "left_wrist"] if "right" in key.lower() else ["left_wrist", "right_wrist"]
        _fill(chosen, sides, key)
    for key in others:
        _fill(chosen, list(CAMERA_SLOTS), key)
    return chosen


def _fill(chosen: dict[str, str], slots: list[str], key: str) -> None:
    """Put a camera into the first free one of the slots, or into one of its own name."""
    free = [slot for slot in slots if slot not in chosen]
    chosen[free[0] if free else key.removeprefix(f"{OBS_IMAGES}.")] = key


def _find_camera(name: str, slot: str, keys: list[str]) -> str:
    for key in keys:
        if _is_called(key, name):
            return key
    raise UserError(f"--policy.cameras puts '{name}' into slot '{slot}', but the cameras are {keys}")


def _is_called(key: str, name: str) -> bool:
    return name in (key, key.removeprefix(f"{OBS_IMAGES}."), key.removeprefix("observation."))


def _dimension_names(feature: dict[str, Any]) -> list[str] | None:
    """Names as datasets have them: a list, {"motors": [...]}, or each with its place, {"delta_x": 0, ...}.
    None unless each dimension has one.
    """
    names = feature.get("names")
    if isinstance(names, dict) and all(isinstance(place, int) for place in names.values()):
        names = sorted(names, key=names.__getitem__)
    elif isinstance(names, dict):
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    # Some datasets name the whole vector: ["state"].
    return [str(name) for name in names] if names and len(names) == feature["shape"][0] else None
