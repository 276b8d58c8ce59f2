"""`lerobot-pi0 report`: its flags, and what it prints."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np

from lerobot_pi0.inputs.dataset import dataset_metadata, open_dataset
from lerobot_pi0.inputs.policy import load_policy, read_config
from lerobot_pi0.tools.flags import ReportConfig
from lerobot_pi0.tools.open_loop import (
    Recording,
    Selection,
    draw_noise,
    observations,
    plan,
    prepare,
    read_recording,
    select_episodes,
)
from lerobot_pi0.tools.report.evaluation import evaluate

MOST_CHUNKS = 50  # of an episode, unless --stride says otherwise


def main(config: ReportConfig) -> str:
    """Run `lerobot-pi0 report`."""
    from lerobot_pi0.tools.report.page import write_page

    policy_config, folder = read_config(config.policy)
    metadata = dataset_metadata(config.dataset)
    selection = select_episodes(config.dataset.episodes, metadata, folder, config.max_episodes)
    dataset = open_dataset(config.dataset, episodes=selection.episodes)
    recording = read_recording(dataset.meta, policy_config, selection.episodes)
    loaded = load_policy(config.policy)
    stride = config.stride or _stride(loaded.config.n_action_steps, recording, selection)
    frames = np.concatenate([recording.frames(episode)[::stride] for episode in selection.episodes])
    chunks, pictures = [], {}
    for i, item in enumerate(observations(dataset, recording.index[frames], "planning")):
        batch = prepare(loaded, item)
        chunks.append(plan(loaded, batch, draw_noise(loaded.config, config.num_samples, seed=i)))
        if frames[i] in _key_frames(recording, frames, frames[i]):
            pictures[int(frames[i])] = {key: batch[key][0].cpu() for key in loaded.config.cameras.values()}
    planned = np.stack(chunks)
    report = evaluate(recording, frames, planned, stride)
    page = write_page(
        config.output, config.policy.path, report, recording, frames, planned, selection, pictures
    )
    summary: dict[str, Any] = (
        {"policy": config.policy.path, "dataset": metadata.repo_id} | asdict(selection) | asdict(report)
    )
    summary["verdict"] = report.verdict()
    (config.output / "report.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    warning = [] if selection.trained_on is False else [f"Note: {selection.note}"]
    counted = f"{len(frames)} chunks of {len(selection.episodes)} episodes"
    return "\n".join([*report.verdict(), *warning, f"From {counted}. Page: {page}"])


def _stride(n_action_steps: int, recording: Recording, selection: Selection) -> int:
    longest = max(len(recording.frames(episode)) for episode in selection.episodes)
    return n_action_steps * -(-longest // (n_action_steps * MOST_CHUNKS))


def _key_frames(recording: Recording, frames: np.ndarray, frame: int) -> np.ndarray:
    """Of the frames looked at in an episode, three to show: first, middle, last."""
    own = frames[recording.episode[frames] == recording.episode[frame]]
    return own[[0, len(own) // 2, -1]]
