"""The dataset that a command reads: flags, metadata, episodes, frames."""

from pathlib import Path

import pyarrow
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HFValidationError
from lerobot.configs import FeatureType
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.utils import CompatibilityError
from lerobot.utils.constants import HF_LEROBOT_HOME
from lerobot.utils.feature_utils import dataset_to_policy_features

from lerobot_pi0.checkpoints.reading import read_json
from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.data.frames import read_parquet
from lerobot_pi0.errors import MissingFileError, UserError
from lerobot_pi0.inputs.flags import DatasetFlags, DatasetSource, check_dataset_root


def read_dataset(source: DatasetSource) -> LeRobotDatasetMetadata:
    """A dataset's metadata, local or from the hub. Raises FileNotFoundError or ValueError with the fix."""
    if source.root is not None:
        check_dataset_root(source.root)
    try:
        dataset = LeRobotDatasetMetadata(source.repo_id, source.root, source.revision)
    except CompatibilityError as error:  # LeRobot's message says how to convert it
        raise UserError(str(error).strip()) from error
    except (ValueError, LookupError, TypeError) as error:
        root = source.root or HF_LEROBOT_HOME / source.repo_id
        raise UserError(f"the metadata of the dataset is damaged: {_damage(root, error)}") from error
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MissingFileError(
            f"the dataset '{source.repo_id}' is not in LeRobot's folder for local datasets, and could not be "
            f"downloaded from the hub ({reason}). Check --dataset.repo_id; give --dataset.root for a folder "
            "elsewhere; a private dataset needs `hf auth login`"
        ) from error
    if not dataset.total_frames:
        raise UserError(f"the dataset '{source.repo_id}' has no frames: record episodes first")
    return dataset


def _damage(root: Path, error: Exception) -> str:
    """The first file of a dataset that cannot be read, and why."""
    try:
        for file in sorted(root.glob("meta/*.json")):
            read_json(file)
        for file in sorted([*root.glob("meta/**/*.parquet"), *root.glob("data/**/*.parquet")]):
            read_parquet(file, [])
    except UserError as damaged:
        return str(damaged)
    return f"{root} ({error!r}): copy or download the dataset again"


def fit_to(policy: Pi0Config, dataset: LeRobotDatasetMetadata) -> None:
    """Give a config the features of a dataset, as LeRobot's make_policy does, and its cameras their slots."""
    policy.set_dataset_feature_metadata(dataset.features)
    for key, feature in dataset.features.items():
        if feature["dtype"] in ("image", "video") and not feature.get("names"):
            raise UserError(
                f"the camera '{key}' of the dataset does not name its axes: write "
                '"names": ["height", "width", "channels"] (in the order of its shape) into meta/info.json'
            )
    features = dataset_to_policy_features(dataset.features)
    policy.output_features = {key: f for key, f in features.items() if f.type is FeatureType.ACTION}
    policy.input_features = {key: f for key, f in features.items() if f.type is not FeatureType.ACTION}
    policy.validate_features()


def dataset_metadata(flags: DatasetFlags) -> LeRobotDatasetMetadata:
    """What a dataset says of itself. Raises FileNotFoundError when there is none."""
    if not flags.repo_id and flags.root is None:
        raise UserError("which dataset? Name it: --dataset.repo_id=user/name, or --dataset.root=FOLDER")
    return read_dataset(DatasetSource(_repo_id(flags), flags.root, flags.revision))


def check_episodes(chosen: list[int], metadata: LeRobotDatasetMetadata) -> None:
    """Raises ValueError for an episode that does not exist, and for none."""
    if not chosen or not set(chosen) <= set(range(metadata.total_episodes)):
        raise UserError(
            f"--dataset.episodes={chosen}, but the dataset has episodes 0 to {metadata.total_episodes - 1}"
        )


def open_dataset(
    flags: DatasetFlags, chunk_size: int | None = None, episodes: list[int] | None = None
) -> LeRobotDataset:
    """A dataset, or those `episodes` of it; with a `chunk_size` each item has as many actions to come."""
    metadata = dataset_metadata(flags)
    deltas = {"action": [step / metadata.fps for step in range(chunk_size)]} if chunk_size else None
    try:
        return LeRobotDataset(
            _repo_id(flags),
            root=flags.root,
            revision=flags.revision,
            episodes=episodes,
            delta_timestamps=deltas,
        )
    except (DatasetsError, pyarrow.ArrowException) as error:
        raise UserError(f"the dataset cannot be read: {_damage(Path(metadata.root), error)}") from error


def _repo_id(flags: DatasetFlags) -> str:
    return flags.repo_id or f"local/{flags.root.name if flags.root else 'dataset'}"
