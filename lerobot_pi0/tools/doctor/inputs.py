"""The inputs under test: a checkpoint, a dataset, a robot, an environment. Each is opened once, when needed.

Columns of all frames are read from parquet; pictures are decoded for `EPISODES` × `MOMENTS` frames only.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lerobot.configs import FeatureType
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.envs import EnvConfig
from lerobot.processor import RenameObservationsProcessorStep
from lerobot.robots import Robot
from lerobot.utils.constants import ACTION, HF_LEROBOT_HOME, OBS_STATE
from torch.utils.data import default_collate

from lerobot_pi0.checkpoints.reading import read_json, read_steps
from lerobot_pi0.configuration_pi0 import Pi0Config, Statistics, image_height_width, num_channels
from lerobot_pi0.data.frames import read_columns
from lerobot_pi0.data.statistics import PREPROCESSOR, read_statistics
from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.dataset import DatasetFlags, dataset_metadata, fit_to, open_dataset
from lerobot_pi0.inputs.policy import LoadedPolicy, PolicyFlags, load_policy, read_config
from lerobot_pi0.model.flow import sample_time
from lerobot_pi0.processor_pi0 import clean_prompt
from lerobot_pi0.tools.columns import Columns
from lerobot_pi0.tools.doctor.opened_env import OpenedEnv, open_env
from lerobot_pi0.tools.doctor.tries import Tries
from lerobot_pi0.tools.pairing import Pairing

EPISODES, MOMENTS = 4, 4
# Errors of reading a damaged checkpoint or dataset, by LeRobot, torch, pyarrow, PyAV.
UNREADABLE = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
FLOW_SAMPLES = 8  # (noise, time) pairs per frame, to reduce the variance of the loss


@dataclass(frozen=True)
class Trial:
    """Predictions at n frames of the dataset and the demonstrated actions, in the robot's units."""

    predicted: np.ndarray  # (n, chunk, dims)
    demonstrated: np.ndarray  # (n, chunk, dims)
    real: np.ndarray  # (n, chunk): False beyond an episode's end
    state: np.ndarray  # (n, dims)
    loss: float  # flow-matching loss
    baseline_loss: float  # of the optimal predictor that ignores the observation


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs that the flags name. Those that are not given are None."""

    policy_flags: PolicyFlags | None
    dataset_flags: DatasetFlags | None
    robot: Robot | None
    given_rename_map: dict[str, str] = field(default_factory=dict)
    env: EnvConfig | None = None

    @cached_property
    def checkpoint(self) -> tuple[Pi0Config, Path] | None:
        """The policy's config and folder."""
        return read_config(self.policy_flags) if self.policy_flags else None

    @property
    def folder(self) -> Path:
        """The checkpoint's."""
        assert self.checkpoint is not None
        return self.checkpoint[1]

    @cached_property
    def statistics(self) -> Statistics:
        """The checkpoint's normalization statistics."""
        return read_statistics(self.folder)

    @cached_property
    def config(self) -> Pi0Config:
        """The policy's config; without a policy, that of a new one for the dataset."""
        if self.checkpoint:
            return self.checkpoint[0]
        config = Pi0Config(device="cpu")
        if self.metadata:
            with suppress(ValueError):  # `cameras.features_fit` reports it
                fit_to(config, self.metadata)
        return config

    @cached_property
    def metadata(self) -> LeRobotDatasetMetadata | None:
        """The dataset's metadata."""
        return dataset_metadata(self.dataset_flags) if self.dataset_flags else None

    @cached_property
    def trained_dataset(self) -> tuple[str, Path] | None:
        """Name and folder of the dataset that the policy was trained on; None if its checkpoint has none."""
        file = self.folder / "train_config.json"
        trained = (read_json(file).get("dataset") or {}) if file.is_file() else {}
        if not (name := trained.get("repo_id")):
            return None
        return name, Path(trained.get("root") or HF_LEROBOT_HOME / name)

    @property
    def is_trained_dataset(self) -> bool:
        """Whether the dataset is the one that the policy was trained on, as far as the checkpoint says it."""
        trained = self.trained_dataset
        return (
            trained is not None
            and self.metadata is not None
            and trained[1].resolve() == Path(self.metadata.root).resolve()
        )

    @cached_property
    def recorded(self) -> Pi0Config:
        """The names of the dataset's joints, as a config has them."""
        assert self.metadata is not None
        config = Pi0Config(device="cpu")
        config.set_dataset_feature_metadata(self.metadata.features)
        return config

    @cached_property
    def columns(self) -> Columns:
        """Columns of the frames on this disk: of a dataset on the hub, of the downloaded episodes."""
        assert self.metadata is not None
        _ = self.dataset
        keys = [OBS_STATE, ACTION, "episode_index", "frame_index", "timestamp", "task_index"]
        missing = [key for key in keys if key not in self.metadata.features]
        found = {} if missing else read_columns(self.metadata, keys)
        if not found:
            raise UserError(
                f"the dataset '{self.metadata.repo_id}' has no {missing or 'frames'} to examine: its "
                f"features are {list(self.metadata.features)}"
            )
        flat = {key: found[key][:, 0] for key in keys[2:]}
        return Columns(*flat.values(), state=found[OBS_STATE], action=found[ACTION])

    @cached_property
    def pairing(self) -> Pairing:
        """The dataset's actions beside the joints that they move."""
        assert self.metadata is not None
        names = self.recorded
        return Pairing.of(
            self.columns, names.state_feature_names, names.action_feature_names, self.metadata.fps
        )

    @cached_property
    def dataset(self) -> LeRobotDataset:
        """A few episodes; each item has the chunk of actions that follows."""
        assert self.metadata is not None
        assert self.dataset_flags is not None
        chosen = self.dataset_flags.episodes
        if not chosen:
            total = self.metadata.total_episodes
            chosen = sorted({int(i) for i in np.linspace(0, total - 1, min(EPISODES, total))})
        return open_dataset(self.dataset_flags, self.config.chunk_size, chosen)

    @cached_property
    def frames(self) -> list[dict[str, Any]]:
        """Items of the dataset, evenly spaced within some episodes, from each one's first frame on."""
        episodes = np.asarray(self.dataset.hf_dataset["episode_index"])
        borders = np.flatnonzero(np.diff(episodes)) + 1
        starts, stops = np.append(0, borders), np.append(borders, len(episodes))
        keep = np.linspace(0, len(starts) - 1, min(EPISODES, len(starts))).astype(int)
        rows = [
            start + int((stop - start) * moment / MOMENTS)
            for start, stop in zip(starts[keep].tolist(), stops[keep].tolist(), strict=True)
            for moment in range(MOMENTS)
        ]
        return [cast(dict[str, Any], self.dataset[row]) for row in dict.fromkeys(rows)]

    def pictures_at(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The pictures at these rows of `columns`, as `pictures_of` gives them."""
        assert self.dataset_flags is not None
        wanted = [(int(self.columns.episode[row]), int(self.columns.frame[row])) for row in rows]
        dataset = open_dataset(self.dataset_flags, None, sorted({episode for episode, _ in wanted}))
        columns = [np.asarray(dataset.hf_dataset[name]).tolist() for name in ("episode_index", "frame_index")]
        place = {pair: i for i, pair in enumerate(zip(*columns, strict=True))}
        return self.pictures_of([cast(dict[str, Any], dataset[place[pair]]) for pair in wanted])

    def pictures_of(self, frames: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The pictures of each RGB camera (frames, 3, height, width) in [0, 1], by the policy's names."""
        names = {self.rename_map.get(key, key): key for key in frames[0]}
        stacks = {
            key: torch.stack([frame[names[key]] for frame in frames])
            for key in self.recorded_cameras
            if key in names and frames[0][names[key]].shape[0] == 3
        }
        return {key: x.float() / 255 if x.dtype == torch.uint8 else x for key, x in stacks.items()}

    @cached_property
    def tasks(self) -> dict[int, str]:
        """The dataset's instructions by their number (task_index)."""
        assert self.metadata is not None
        table = self.metadata.tasks
        assert table is not None
        return {int(index): str(text) for text, index in table["task_index"].items()}

    @cached_property
    def rename_map(self) -> dict[str, str]:
        """Dataset's key → policy's, by --rename_map: now, or when the policy was trained."""
        if self.given_rename_map:
            return self.given_rename_map
        file = self.folder / PREPROCESSOR if self.checkpoint else None
        for step in read_steps(file) if file and file.is_file() else ():
            if step.get("registry_name") == "rename_observations_processor":
                return step["config"].get("rename_map", {})
        return {}

    @cached_property
    def recorded_cameras(self) -> dict[str, tuple[int, int]]:
        """The dataset's RGB cameras by the policy's names: (height, width)."""
        assert self.metadata is not None
        cameras = {}
        for key, feature in self.metadata.features.items():
            if feature["dtype"] in ("image", "video") and num_channels(feature["shape"]) == 3:
                cameras[self.rename_map.get(key, key)] = image_height_width(feature["shape"])
        return cameras

    @cached_property
    def robot_cameras(self) -> dict[str, tuple[int, int]]:
        """The robot's cameras by the policy's names: (height, width)."""
        assert self.robot is not None
        cameras = {
            f"observation.images.{name}": image_height_width(shape)
            for name, shape in self.robot.observation_features.items()
            if isinstance(shape, tuple)
        }
        # As rollout has it, which does not know the map of the training.
        return {self.given_rename_map.get(key, key): shape for key, shape in cameras.items()}

    @cached_property
    def reference(self) -> "Inputs | None":
        """The policy with the data that its environment is compared with: the dataset that is given or, where
        it is on this disk, the one that the policy was trained on."""
        if self.dataset_flags:
            return self
        trained = self.trained_dataset if self.checkpoint else None
        if trained is None or not (trained[1] / "meta" / "info.json").is_file():
            return None
        return Inputs(self.policy_flags, DatasetFlags(*trained), None)

    def first_pictures(self, instruction: str) -> dict[str, torch.Tensor]:
        """The pictures with which episodes begin, of this instruction if the dataset has it."""
        starts = [episode.start for episode in self.columns.episodes]
        numbers = [i for i, text in self.tasks.items() if clean_prompt(text) == clean_prompt(instruction)]
        rows = [row for row in starts if self.columns.task[row] in numbers] or starts
        chosen = np.linspace(0, len(rows) - 1, min(EPISODES, len(rows))).astype(int)
        return self.pictures_at([rows[i] for i in chosen])

    @cached_property
    def tries(self) -> Tries | None:
        """What is tried in the environment; None without data."""
        of = self.reference
        if of is None:
            return None
        assert of.metadata is not None
        return Tries.of(of.columns, of.recorded.action_feature_names, of.pairing.kind, of.metadata.fps)

    @cached_property
    def opened_env(self) -> OpenedEnv:
        """The environment, reset. Raises what making it raises.

        lerobot-eval has the rename map from its command line alone, never from the checkpoint.
        """
        assert self.env is not None
        return open_env(self.env, self.given_rename_map, self.tries.actions if self.tries else [])

    @cached_property
    def env_error(self) -> str:
        """Why the environment does not open; empty if it does."""
        try:
            _ = self.opened_env
        except Exception as error:  # noqa: BLE001  # whatever a simulator raises; MuJoCo's have no other base
            return str(error) or type(error).__name__
        return ""

    @cached_property
    def policy_cameras(self) -> dict[str, tuple[int, int]]:
        """The policy's cameras: (height, width) in training."""
        shapes = {
            key: feature.shape
            for key, feature in (self.config.input_features or {}).items()
            if feature.type is FeatureType.VISUAL
        }
        return {key: image_height_width(shapes[key]) for key in self.config.cameras.values() if key in shapes}

    @cached_property
    def loaded(self) -> LoadedPolicy:
        """The policy and its processors. Raises what loading raises."""
        assert self.policy_flags is not None
        loaded = load_policy(self.policy_flags)
        loaded.policy.action_space.guard = None  # clamping would hide how far actions leave the data
        for step in loaded.preprocess.steps:
            if isinstance(step, RenameObservationsProcessorStep):
                step.rename_map = self.rename_map
        return loaded

    @cached_property
    def load_error(self) -> str:
        """Why the policy cannot be loaded; empty if it can."""
        try:
            _ = self.loaded
        except UNREADABLE as error:
            return str(error) or type(error).__name__
        return ""

    @cached_property
    def trial(self) -> Trial:
        """The policy's predictions at the decoded frames, always from the same noise."""
        policy, config = self.loaded.policy, self.loaded.config
        raw = default_collate([_plain(frame) for frame in self.frames])
        batch = self.loaded.preprocess(raw)
        config.num_flow_samples, before = FLOW_SAMPLES, config.num_flow_samples
        with torch.no_grad():
            loss, _ = policy.forward(batch)
        config.num_flow_samples = before
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(self.frames), config.chunk_size, config.max_action_dim, generator=generator)
        chunk = policy.predict_action_chunk(batch, noise=noise.to(batch[OBS_STATE].device))
        predicted = self.loaded.postprocess(chunk).float().cpu().numpy()
        padded = raw.get("action_is_pad", torch.zeros(raw[ACTION].shape[:2], dtype=torch.bool))
        target, reference = batch[ACTION].float(), policy.action_space.reference(batch[OBS_STATE])
        target = target if reference is None else target - reference[:, None]
        return Trial(
            predicted=predicted,
            demonstrated=raw[ACTION].float().numpy(),
            real=~padded.numpy(),
            state=raw[OBS_STATE].float().numpy(),
            loss=loss.item(),
            baseline_loss=baseline_loss(
                target[~padded.to(target.device)].var(0, correction=0), config.max_action_dim
            ),
        )


def baseline_loss(variance: torch.Tensor, max_action_dim: int) -> float:
    """The lowest flow-matching loss of a predictor that ignores the observation.

    `variance` (dims,) is that of the normalized actions; the other dimensions are padding. Given
    x = t · noise + (1 − t) · a with a normal of variance v, the variance of the velocity noise − a is
    v / (t² + (1 − t)² v).
    """
    times = sample_time((torch.arange(1000) + 0.5) / 1000)[:, None]
    v = variance.double().cpu()
    return (v / (times**2 + (1 - times) ** 2 * v)).mean(0).sum().item() / max_action_dim


def _plain(frame: dict[str, Any]) -> dict[str, Any]:
    """The entries that can be collated."""
    return {key: value for key, value in frame.items() if isinstance(value, torch.Tensor | str)}
