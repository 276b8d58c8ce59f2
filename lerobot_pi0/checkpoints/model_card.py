"""The README of a policy on the hub (`model_card.md`, filled in): how to run it, and where it is from.

LeRobot's own card has no hint that a policy needs a plugin, and knows the base models of its own policies
alone.
"""

import shlex
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from lerobot.utils.constants import OBS_IMAGES

from lerobot_pi0.checkpoints.adapters import Base
from lerobot_pi0.configuration_pi0 import SMALL_TOKENIZER, Pi0Config
from lerobot_pi0.lerobot_compat import make_card_by

GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
TRAINED = {
    "nothing": "all weights",
    "vision": "all weights but the vision tower's",
    "vlm": "the action expert, over the frozen vision-language model",
}


class CardHooks:
    """LeRobot's hook for the card of a policy; stands before `PreTrainedPolicy` among a policy's bases."""

    config: Pi0Config
    base: Base | None

    def offer_card(self) -> None:
        """Let LeRobot publish this policy with its own card, from the start of a run on."""
        make_card_by(self)

    def generate_model_card(
        self,
        dataset_repo_id: str,
        model_type: str,
        license: str | None,
        tags: list[str] | None,
        cfg: Any = None,
        dataset_meta: Any = None,
    ) -> ModelCard:
        """The card of this module."""
        return make_model_card(
            self.config,
            dataset_repo_id,
            base=self.base,
            licence=license,
            tags=tags,
            train=cfg,
            dataset=dataset_meta,
        )


def make_model_card(
    config: Pi0Config,
    dataset_repo_id: str,
    *,
    base: Base | None,
    licence: str | None,
    tags: list[str] | None,
    train: Any,
    dataset: Any,
) -> ModelCard:
    """The card of a policy that was trained on a dataset, starting from the weights of `base`.

    `train` and `dataset` are LeRobot's train config and dataset metadata; what they would say is left out
    without them. Asks nobody: huggingface_hub has the header checked when it uploads the card.
    """
    # The tokenizer is always in the checkpoint; PaliGemma's weights are where its tokenizer is.
    licence = licence or ("apache-2.0" if config.tokenizer == SMALL_TOKENIZER else "gemma")
    base_model, base_revision = _published(config, base)
    model = config.type.removeprefix("lerobot_")
    data = ModelCardData(
        license=licence,
        library_name="lerobot",
        pipeline_tag="robotics",
        tags=sorted({"robotics", "lerobot", "vision-language-action", model, config.type, *(tags or ())}),
        datasets=[dataset_repo_id],
        base_model=base_model,
        base_model_relation=("adapter" if config.use_peft else "finetune") if base_model else None,
    )
    name = config.repo_id or "USER/POLICY"
    has_tasks = dataset is not None and dataset.tasks is not None
    tasks = [_one_line(task) for task in dataset.tasks.index] if has_tasks else []
    cameras = {
        slot: dict(zip(("key", "height", "width"), (key, *config.image_features[key].shape[1:]), strict=True))
        for slot, key in config.cameras.items()
    }
    return ModelCard.from_template(
        data,
        template_str=files("lerobot_pi0.checkpoints").joinpath("model_card.md").read_text("utf-8"),
        name=name,
        model=model,
        title=name.rpartition("/")[2],
        config=config,
        adapters=config.use_peft,
        cameras=cameras,
        state=_dimensions(config.robot_state_feature, config.state_feature_names),
        action=_dimensions(config.action_feature, config.action_feature_names),
        dataset=dataset,
        robot_type=dataset.robot_type if dataset else None,
        tasks=tasks,
        robot_cameras=_robot_cameras(cameras.values(), dataset.fps if dataset else 30),
        task=shlex.quote(tasks[0]) if tasks else "'INSTRUCTION'",
        env=train.env if train else None,
        base_model=base_model,
        base_revision=base_revision,
        dataset_repo_id=dataset_repo_id,
        dataset_revision=train.dataset.revision if train else None,
        trained="adapters" if config.use_peft else TRAINED[config.freeze],
        train=train,
        learning_rate=train.optimizer.lr if train and train.optimizer else config.optimizer_lr,
        versions={package: version(package) for package in ("lerobot_policy_pi0", "lerobot", "torch")},
        licence=licence,
        gemma_terms=GEMMA_TERMS,
    )


def _published(config: Pi0Config, base: Base | None) -> tuple[str | None, str | None]:
    """The repository that the weights descend from, and its revision. A folder's name helps nobody."""
    bases = [(config.base_checkpoint, config.base_revision)]
    if base is not None:
        bases.insert(0, (base.name, base.revision))
    for name, revision in bases:
        if name and _is_repository(name):
            return name, revision
    return None, None


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _dimensions(feature: Any, names: list[str] | None) -> str:
    return ", ".join(f"`{name}`" for name in names) if names else f"{feature.shape[0]} numbers"


def _robot_cameras(cameras: Any, fps: int) -> str | None:
    """For --robot.cameras, quoted; None where a camera is none of a robot's (`observation.images.<name>`)."""
    prefix = f"{OBS_IMAGES}."
    if not all(camera["key"].startswith(prefix) for camera in cameras):
        return None
    each = (
        f"{camera['key'].removeprefix(prefix)}: {{type: opencv, index_or_path: INDEX, "
        f"width: {camera['width']}, height: {camera['height']}, fps: {fps}}}"
        for camera in cameras
    )
    return shlex.quote("{" + ", ".join(each) + "}")
