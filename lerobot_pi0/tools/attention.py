"""`lerobot-pi0 attention`: where the action tokens look: at which patches of the pictures, which words, the
state, one another.

The network keeps no attention probabilities: they are computed again from the queries and keys of its layers,
which hooks record while it samples. What is attended to need not be what matters for the actions;
`lerobot-pi0 language` tests that for words.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from lerobot_pi0.configuration_pi0 import Pi0Config
from lerobot_pi0.errors import UserError
from lerobot_pi0.inputs.dataset import dataset_metadata, open_dataset
from lerobot_pi0.inputs.policy import LoadedPolicy, load_policy, read_config
from lerobot_pi0.model import Network, Observation
from lerobot_pi0.model.flow import Solver, integrate
from lerobot_pi0.model.gemma import Decoder, DecoderLayer, rotate
from lerobot_pi0.processor_pi0 import Pi0TokenizerStep, Word
from lerobot_pi0.tools.flags import AttentionConfig
from lerobot_pi0.tools.open_loop import draw_noise, observations, prepare, read_recording, select_episodes

NUM_SAMPLES = 4  # of noise, that attention is averaged over
COLOUR, WIDTH, DPI = "#1f5fbf", 3.0, 120


@dataclass(frozen=True)
class Look:
    """Shares of the action tokens' attention, which sum to 1."""

    cameras: dict[str, np.ndarray]  # patches (rows, columns) of the square that the model sees, by camera
    words: list[tuple[str, float]]  # of the prompt, but for the state's numbers
    state_words: list[tuple[str, float]]  # those numbers, where the prompt has them
    state_token: float  # 0 where there is none
    actions: float

    def shares(self) -> list[tuple[str, float]]:
        """What is looked at, and how much."""
        return [
            *((_short(camera), float(patches.sum())) for camera, patches in self.cameras.items()),
            ("instruction", sum(share for _, share in self.words)),
            ("state", self.state_token + sum(share for _, share in self.state_words)),
            ("actions", self.actions),
        ]


def main(config: AttentionConfig) -> str:
    """Run `lerobot-pi0 attention`."""
    policy_config, folder = read_config(config.policy)
    for name, limit in (("layer", policy_config.vlm.depth), ("head", policy_config.vlm.num_heads)):
        value = getattr(config, name)
        if value is not None and not 0 <= value < limit:
            raise UserError(f"--{name}={value}, but the policy has {name}s 0 to {limit - 1}")
    metadata = dataset_metadata(config.dataset)
    (episode, *_) = select_episodes(config.dataset.episodes, metadata, folder, 1).episodes
    dataset = open_dataset(config.dataset, episodes=[episode])
    recording = read_recording(dataset.meta, policy_config, [episode])
    rows = recording.frames(episode)
    frame = len(rows) // 2 if config.frame is None else config.frame
    if not 0 <= frame < len(rows):
        raise UserError(f"--frame={frame}, but episode {episode} has frames 0 to {len(rows) - 1}")
    loaded = load_policy(config.policy)
    (item,) = observations(dataset, recording.index[rows[[frame]]], "looking")
    batch = prepare(loaded, item)
    words = _named(tokenizer_of(loaded).words(item["task"], batch[OBS_STATE][0]), policy_config)
    seen = look(loaded, batch, words, config.layer, config.head)
    pictures = {key: batch[key][0].cpu() for key in seen.cameras}
    title = f"Episode {episode}, frame {frame}: {item['task']}"
    output = config.output if config.output.suffix else config.output / "attention.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    _figure(seen, pictures, title, policy_config.vision.image_size).savefig(output, dpi=DPI)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in seen.shares())
    words_said = ", ".join(f"{word!r} {share:.1%}" for word, share in (*seen.words, *seen.state_words))
    return f"{title}\nThe actions look at: {shares}\nWords: {words_said}\nPicture: {output}"


@torch.no_grad()
def look(
    loaded: LoadedPolicy,
    batch: dict[str, Any],
    words: Sequence[Word],
    layer: int | None = None,
    head: int | None = None,
) -> Look:
    """Where the actions look at a prepared item, whose prompt has these words.

    The mean over denoising steps, actions and a few samples of noise; over layers and heads too, unless one
    is named.
    """
    policy, config = loaded.policy, loaded.config
    observation = policy.observation(batch)
    noise = draw_noise(config, NUM_SAMPLES, seed=0).to(observation.state.device)
    attention = sampling_attention(
        policy.model, observation, noise, config.num_inference_steps, config.solver
    )
    attention = attention.mean(0) if layer is None else attention[layer]
    attention = attention.mean(0) if head is None else attention[head]
    grid = config.vision.image_size // config.vision.patch_size
    cameras = list(config.cameras.values())
    padded, actions = observation.tokens.shape[1], config.chunk_size
    return divide(attention.double().cpu().numpy(), cameras, grid, words, padded, actions)


def tokenizer_of(loaded: LoadedPolicy) -> Pi0TokenizerStep:
    """The step of a policy's processors that tokenizes."""
    (step,) = (step for step in loaded.preprocess.steps if isinstance(step, Pi0TokenizerStep))
    return step


def divide(
    attention: np.ndarray,
    cameras: Sequence[str],
    grid: int,
    words: Sequence[Word],
    padded: int,
    num_actions: int,
) -> Look:
    """Attention (T,) by what the tokens stand for.

    They are `grid` by `grid` patches of each camera, the words' tokens (a prompt of `padded` in all), the
    state's token in a network that has one, and the actions.
    """
    end_of_patches = len(cameras) * grid**2
    places = [end_of_patches, end_of_patches + padded, len(attention) - num_actions]
    patches, prompt, state, actions = np.split(attention, places)
    ends = np.cumsum([word.num_tokens for word in words])
    shares = [
        (word.text, float(prompt[end - word.num_tokens : end].sum()))
        for word, end in zip(words, ends, strict=True)
    ]
    return Look(
        cameras=dict(zip(cameras, patches.reshape(-1, grid, grid), strict=True)),
        words=[share for word, share in zip(words, shares, strict=True) if not word.is_state],
        state_words=[share for word, share in zip(words, shares, strict=True) if word.is_state],
        state_token=float(state.sum()),
        actions=float(actions.sum()),
    )


def _named(words: Sequence[Word], config: Pi0Config) -> list[Word]:
    """Words of which the state's numbers say whose they are."""
    names = iter(config.state_feature_names or map(str, count()))
    return [word._replace(text=f"{next(names)} {word.text}") if word.is_state else word for word in words]


def sampling_attention(
    model: Network, observation: Observation, noise: Tensor, num_steps: int, solver: Solver = "euler"
) -> Tensor:
    """Attention (layers, H, T) of the action tokens while chunks are sampled from noise (K, A, E) at one
    observation: the mean over steps, actions and samples."""
    context = model.with_state(model.prefix(observation), observation.state).repeat(len(noise))
    means = []

    def velocity(actions: Tensor, time: Tensor) -> Tensor:
        with recorded_attention(model.expert) as attention:
            v = model.velocity(context, actions, time)
        means.append(torch.stack([of_layer.mean((0, 2)) for of_layer in attention]))
        return v

    integrate(velocity, noise, num_steps, solver=solver)
    return torch.stack(means).mean(0)


@contextmanager
def recorded_attention(decoder: Decoder) -> Iterator[list[Tensor]]:
    """A list that gets the attention (B, H, S, T) of each pass of tokens through a layer, in float32."""
    recorded: list[Tensor] = []

    def record(layer: DecoderLayer, given: tuple[Any, ...], queries: Tensor, keys: Tensor) -> None:
        _, by, _, mask, *_ = given
        q = rotate(queries.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2), by)
        k = keys.repeat_interleave(q.shape[1] // keys.shape[1], 1)
        logits = q.float() @ k.float().mT * layer.head_dim**-0.5
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
        recorded.append(logits.softmax(-1))

    with ExitStack() as hooks:
        for layer in cast(Iterable[DecoderLayer], decoder.layers):
            queries: list[Tensor] = []
            for hook in (
                layer.q_proj.register_forward_hook(lambda _, __, out, to=queries: to.append(out)),
                layer.register_forward_hook(
                    lambda layer, given, out, to=queries: record(layer, given, to.pop(), out[1][0])
                ),
            ):
                hooks.callback(hook.remove)
        yield recorded


def without_letterbox(patches: np.ndarray, size: int, height: int, width: int) -> np.ndarray:
    """A square map of patches as one over the picture (height, width) that was fitted into `size` pixels."""
    ratio = max(height, width) / size
    new_height, new_width = int(height / ratio), int(width / ratio)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    rows = (top + (np.arange(height) + 0.5) * new_height / height) * len(patches) // size
    columns = (left + (np.arange(width) + 0.5) * new_width / width) * patches.shape[1] // size
    return patches[np.ix_(rows.astype(int), columns.astype(int))]


def _figure(seen: Look, pictures: dict[str, Tensor], title: str, size: int) -> Any:
    from matplotlib.figure import Figure

    count = len(pictures)
    figure = Figure(figsize=(2 * WIDTH, WIDTH * count + 2.6), layout="constrained")
    grid = figure.add_gridspec(count + 1, 2, height_ratios=[*[WIDTH] * count, 2.4])
    figure.suptitle(title, fontsize=10)
    all_patches = np.concatenate([patches.ravel() for patches in seen.cameras.values()])
    least, most = all_patches.min(), all_patches.max()
    for row, (camera, picture) in enumerate(pictures.items()):
        pixels = picture.float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        heat = without_letterbox(seen.cameras[camera], size, *pixels.shape[:2])
        heat = (heat - least) / (most - least or 1.0)
        grey = np.repeat(pixels.mean(2, keepdims=True), 3, axis=2) * 0.8
        for column, shown in enumerate((pixels, grey)):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(shown)
            axes.set_axis_off()
            if column:
                axes.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.8 * heat)
                share = seen.cameras[camera].sum()
                scale = f"a patch: {least:.1%} (grey) to {most:.1%} (yellow)"
                axes.set_title(f"{share:.0%} of the attention\n{scale}", fontsize=8)
            else:
                axes.set_title(_short(camera), fontsize=9)
    for column, (heading, shares) in enumerate(
        (("all", seen.shares()), ("prompt", [*seen.words, *seen.state_words]))
    ):
        axes = figure.add_subplot(grid[count, column])
        names, values = [name for name, _ in shares], [100 * share for _, share in shares]
        axes.barh(range(len(names)), values, color=COLOUR, height=0.7)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.tick_params(axis="x", labelsize=8)
        axes.set_xlabel("% of the attention", fontsize=8)
        axes.set_title(heading, fontsize=9, loc="left")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def _short(camera: str) -> str:
    """A camera's name without LeRobot's prefix."""
    return camera.removeprefix("observation.").removeprefix("images.")
