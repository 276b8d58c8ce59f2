"""A policy's files in another layout, all but its weights."""

import json
from pathlib import Path, PurePath
from typing import Any, cast

import numpy as np
from lerobot.configs import PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_pi0.checkpoints.layouts import PI0, PI05
from lerobot_pi0.configuration_pi0 import NUM_ALOHA_JOINTS, Pi0Config
from lerobot_pi0.configuration_pi05 import Pi05Config
from lerobot_pi0.conversion.flags import ConvertConfig
from lerobot_pi0.conversion.output import copy_processors
from lerobot_pi0.conversion.sources import IN_TREE, OURS, Policy, is_absolute
from lerobot_pi0.data.normalization import EPSILON, NormalizationStatistics
from lerobot_pi0.errors import UnavailableError, UserError
from lerobot_pi0.lerobot_compat import tokenizer_step
from lerobot_pi0.model import GemmaConfig, SiglipConfig
from lerobot_pi0.processor_pi0 import load_tokenizer

# The sizes that openpi's and LeRobot's own policies know by name: width, depth, MLP, heads, heads of keys,
# and the size of a head.
VARIANTS = {
    "gemma_2b": (2048, 18, 16384, 8, 1, 256),
    "gemma_300m": (1024, 18, 4096, 8, 1, 256),
}
VISION, VOCABULARY = SiglipConfig(), GemmaConfig().vocab_size  # and those that they have no name for


def write_ours(policy: Policy, folder: Path, flags: ConvertConfig) -> list[str]:
    """Write config, processors and tokenizer; returns what was set, as sentences."""
    config = policy.config
    if policy.layout in OURS:
        copy_processors(policy.folder, folder)
    else:
        try:
            load_tokenizer(config.tokenizer)
        except OSError as error:
            raise UnavailableError(
                f"{str(error).partition(' Ways out')[0]} A policy carries its tokenizer: give a folder "
                "that has "
                "it, --tokenizer=FOLDER, or accept the licence at "
                "huggingface.co/google/paligemma-3b-pt-224 and "
                "run `hf auth login`"
            ) from error
        pre, post = make_pre_post_processors(config, dataset_stats=cast(Any, policy.statistics))
        cast(Any, pre.steps[0]).rename_map = policy.rename
        pre.save_pretrained(folder)
        post.save_pretrained(folder)
        config.base_checkpoint = flags.source
    config._save_pretrained(folder)
    return _summary(policy)


def write_in_tree(policy: Policy, folder: Path, flags: ConvertConfig) -> list[str]:
    """The same for LeRobot's own π0 or π0.5."""
    import lerobot.policies  # noqa: F401  # registers their configs
    from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
    from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
    from lerobot.processor import (
        AbsoluteActionsProcessorStep,
        ProcessorStep,
        RelativeActionsProcessorStep,
        make_default_policy_processor_steps,
        make_policy_processor_pipelines,
    )

    config, family = policy.config, policy.family
    if config.adapt_to_pi:
        raise UserError(
            "LeRobot's own policies have no step that adapts ALOHA's joints to openpi's, as this policy "
            "learned them (adapt_to_pi=true): only this package and openpi run it"
        )
    if isinstance(config, Pi05Config) and not config.state_in_prompt:
        raise UserError(
            "LeRobot's own π0.5 always writes the state into the prompt, and this policy was trained without "
            "(state_in_prompt=false): only this package and openpi run it"
        )
    paligemma, expert = _variants(config)
    words, names = _in_tree_joints(config)
    theirs: Any = PreTrainedConfig.get_choice_class(family.in_tree)(
        paligemma_variant=paligemma,
        action_expert_variant=expert,
        dtype=config.dtype,
        chunk_size=config.chunk_size,
        n_action_steps=config.n_action_steps,
        max_state_dim=config.max_state_dim,
        max_action_dim=config.max_action_dim,
        num_inference_steps=config.num_inference_steps,
        use_relative_actions=config.relative_actions,
        relative_exclude_joints=words,
        action_feature_names=names,
        image_resolution=(config.vision.image_size, config.vision.image_size),
        normalization_mapping=config.normalization_mapping,
        tokenizer_max_length=config.tokenizer_max_length,
        input_features={
            **{key: config.image_features[key] for key in config.cameras.values()},
            OBS_STATE: cast(PolicyFeature, config.robot_state_feature),
        },
        output_features=config.output_features,
        device=config.device,
        repo_id=config.repo_id,
    )
    theirs._save_pretrained(folder)
    steps = make_default_policy_processor_steps(theirs, policy.statistics)
    steps.rename_observations.rename_map = policy.rename
    steps.normalize.eps = steps.unnormalize.eps = 0.0  # it is in the statistics
    tokenize = tokenizer_step(config.tokenizer, config.tokenizer_max_length)
    relative = RelativeActionsProcessorStep(config.relative_actions, words, names)
    state_in_prompt = Pi05PrepareStateTokenizerProcessorStep(config.max_state_dim)
    first: list[ProcessorStep] = [
        steps.rename_observations,
        steps.add_batch_dim,
        *(
            [relative, steps.normalize, state_in_prompt, tokenize, steps.to_device]
            if family is PI05
            else [Pi0NewLineProcessor(), tokenize, steps.to_device, relative, steps.normalize]
        ),
    ]
    last: list[ProcessorStep] = [
        steps.unnormalize,
        AbsoluteActionsProcessorStep(config.relative_actions, relative),
        steps.to_cpu,
    ]
    for pipeline in make_policy_processor_pipelines(first, last):
        pipeline.save_pretrained(folder)
    summary = _summary(policy)
    if config.solver != "euler":
        summary.append(
            f"LeRobot's own {family.name} integrates by Euler: its {config.num_inference_steps} steps are "
            f"less accurate than those of solver={config.solver}. Set num_inference_steps=10 for it."
        )
    return summary


def write_openpi(policy: Policy, folder: Path, flags: ConvertConfig) -> list[str]:
    """openpi's config and statistics; the rest is in openpi's code and is reported."""
    config, summary = policy.config, _summary(policy)
    paligemma, expert = _variants(config)
    saved = {
        "action_dim": config.max_action_dim,
        "action_horizon": config.chunk_size,
        "paligemma_variant": paligemma,
        "action_expert_variant": expert,
        "precision": config.dtype,
    }
    (folder / "config.json").write_text(json.dumps(saved, indent=2))
    if isinstance(config, Pi05Config):
        summary.append(
            "openpi's train config must say what the files do not: Pi0Config(pi05=True, "
            f"action_horizon={config.chunk_size}, discrete_state_input={config.state_in_prompt})."
        )
    if config.adapt_to_pi:
        summary.append("openpi's data config must be LeRobotAlohaDataConfig(adapt_to_pi=True).")
    if policy.statistics is not None:
        asset_id = flags.asset_id or "lerobot"
        if (path := PurePath(asset_id)).is_absolute() or ".." in path.parts:
            raise UserError(f"--asset_id={asset_id} leads out of TARGET/assets: give a plain name")
        file = folder / "assets" / asset_id / "norm_stats.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"norm_stats": _openpi_norm_stats(policy, policy.statistics)}, indent=2))
        summary.append(
            f"openpi's train config must name these statistics: AssetsConfig(asset_id={asset_id!r})."
        )
    if config.reference_state is not None:
        size = cast(PolicyFeature, config.action_feature).shape[0]
        joints = _relative_dimensions(config)
        mask = ["True" if i in joints else "False" for i in range(size)]
        summary.append(
            f"Actions are relative: openpi needs DeltaActions and AbsoluteActions with the mask "
            f"({', '.join(mask)})."
        )
    return summary


def _variants(config: Pi0Config) -> tuple[str, str]:
    """openpi's names of the sizes of language model and expert. Raises ValueError where there are none."""
    vlm, expert = config.vlm, config.expert
    rest = vlm.num_heads, vlm.num_kv_heads, vlm.head_dim
    by_size = {size: name for name, size in VARIANTS.items()}
    found = (
        by_size.get((vlm.width, vlm.depth, vlm.mlp_dim, *rest)),
        by_size.get((expert.width, vlm.depth, expert.mlp_dim, *rest)),
    )
    if None in found or config.vision != VISION or vlm.vocab_size != VOCABULARY:
        raise UserError(
            f"openpi and LeRobot's own policies know SigLIP So400m at {VISION.image_size} pixels and Gemma "
            f"as {' or '.join(VARIANTS)} with {VOCABULARY} words, and this policy is another size: only this "
            "package runs it"
        )
    return cast(tuple[str, str], found)


def _in_tree_joints(config: Pi0Config) -> tuple[list[str], list[str] | None]:
    """Words and names by which LeRobot's step finds the absolute joints."""
    names = config.action_feature_names
    if config.reference_state is None:
        return config.absolute_joints, names
    size, relative = cast(PolicyFeature, config.action_feature).shape[0], _relative_dimensions(config)
    names = names or [f"action {i:02}." for i in range(size)]
    for words in (config.absolute_joints, [name for i, name in enumerate(names) if i not in relative]):
        if [i for i in range(size) if not is_absolute(names, i, words)] == relative:
            return words, names
    raise UserError(
        "LeRobot's own policies distinguish relative from absolute joints by words in their names, and "
        f"{names} has no words for {[names[i] for i in relative]} alone"
    )


def _relative_dimensions(config: Pi0Config) -> list[int]:
    """The relative dimensions of actions. Raises ValueError unless each is relative to its own number."""
    reference = config.reference_state
    assert reference is not None
    if reference.actions != reference.states:
        raise UserError(
            "openpi and LeRobot's own policies take an action to be relative to the dimension of the state "
            "with the "
            f"same number; here actions {reference.actions} are relative to {reference.states} "
            "of the state"
        )
    return sorted(reference.actions)


def _openpi_norm_stats(policy: Policy, statistics: NormalizationStatistics) -> dict[str, Any]:
    """openpi's file: what openpi adds to deviations and ranges is taken off again.

    Raises UserError for a policy that normalizes otherwise than openpi's of the same model.
    """
    config, found = policy.config, {}
    wanted = type(config).default_normalization
    for theirs, ours, kind in (("state", OBS_STATE, "STATE"), ("actions", ACTION, "ACTION")):
        if config.normalization_mapping[kind] is not wanted[kind]:
            raise UserError(
                f"openpi's {policy.family.name} normalizes {kind} by {wanted[kind].value}, and this policy "
                f"by {config.normalization_mapping[kind].value}. Use --to=lerobot, or train with openpi's "
                "--policy.normalization_mapping"
            )
        of = {name: np.ravel(np.asarray(value, np.float64)) for name, value in statistics[ours].items()}
        if missing := {"mean", "std"} - of.keys():
            raise UserError(
                f"the statistics of '{ours}' have no {sorted(missing)}, as openpi's file must: train with a "
                "dataset that has them (lerobot-edit-dataset --operation.type=recompute_stats)"
            )
        saved = {"mean": of["mean"], "std": np.maximum(of["std"] - EPSILON, 0)}
        if {"q01", "q99"} <= of.keys():
            saved |= {"q01": of["q01"], "q99": np.maximum(of["q99"] - EPSILON, of["q01"])}
        found[theirs] = {name: value.tolist() for name, value in saved.items()}
    return found


def _summary(policy: Policy) -> list[str]:
    """What a person should look at, since it came from flags or defaults."""
    config = policy.config
    state, action = (
        cast(PolicyFeature, of).shape[0] for of in (config.robot_state_feature, config.action_feature)
    )
    cameras = ", ".join(f"{slot} ← {key}" for slot, key in config.cameras.items())
    lines = [
        f"State of {state}, chunks of {config.chunk_size} actions of {action}, computed in {config.dtype}. "
        f"Cameras: {cameras}.",
    ]
    if isinstance(config, Pi05Config):
        lines.append(f"The state is {'' if config.state_in_prompt else 'not '}in the prompt.")
    if config.adapt_to_pi:
        relative = config.reference_state.actions if config.reference_state else "none"
        lines.append(
            "The joints are ALOHA's, adapted to openpi's (--adapt_to_pi); actions relative to the state: "
            f"{relative} (--delta_mask)."
        )
    elif state == action == NUM_ALOHA_JOINTS and policy.layout not in (*OURS, *IN_TREE):
        lines.append(
            "If these 14 joints are ALOHA's: openpi adapts them unless told otherwise, which the files do "
            "not say. Convert it with --adapt_to_pi=true then."
        )
    elif policy.family is PI0 and policy.layout not in (*OURS, *IN_TREE) and policy.statistics is not None:
        relative = config.reference_state.actions if config.reference_state else "none"
        lines.append(
            f"Actions relative to the state: {relative} (--delta_mask). openpi's files do not say which are; "
            "its training config does (make_bool_mask)."
        )
    if policy.statistics is None:
        lines.append("Without statistics: fine-tune it before it drives a robot.")
    elif policy.family is PI05 and policy.layout in IN_TREE:
        lines.append(
            "If LeRobot up to 0.4.4 trained it, which the files do not say: the prompt then had the state "
            "padded to 32 numbers, and the bars around pictures were -3. It acts differently here, and in "
            "LeRobot since 0.5. Train it for some thousand steps more."
        )
    return lines
