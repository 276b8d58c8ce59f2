"""Raw batch → model batch, and action chunk → robot units.

LeRobot's standard steps, and a tokenizer that travels with the checkpoint.
"""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lerobot.configs import PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.processor import (
    DefaultPolicyProcessorSteps,
    PolicyAction,
    PolicyProcessorPipeline,
    ProcessorStep,
    ProcessorStepRegistry,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from tokenizers import Tokenizer
from torch import Tensor

from lerobot_pi0.configuration_pi0 import SMALL_TOKENIZER, Pi0Config, Statistics, TrainingData
from lerobot_pi0.data.aloha import AdaptFromPiStep, AdaptToPiStep
from lerobot_pi0.errors import CheckpointError, UnavailableError, UserError

logger = logging.getLogger(__name__)

MAX_PROMPT = 10_000  # characters: what is beyond is not tokenized, since far fewer tokens are kept
# Keys of a batch: tokens of the prompts and which are real; the same without the instruction.
LANGUAGE = OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK
WITHOUT_TASK = f"{OBS_LANGUAGE_TOKENS}_without_task", f"{OBS_LANGUAGE_ATTENTION_MASK}_without_task"
SHOWN = 500  # characters of a prompt in a message
MAX_REMEMBERED = 100  # prompts that were warned about


class Word(NamedTuple):
    """A word of a prompt, and the number of its tokens."""

    text: str
    num_tokens: int
    is_state: bool = False  # a number of the state


@dataclass(frozen=True)
class Prompt:
    """The text of a prompt behind its beginning of sequence."""

    parts: tuple[str, ...]  # each encoded by itself
    state: range = range(0)  # the characters that the state's numbers stand in

    @property
    def text(self) -> str:
        return "".join(self.parts)


@ProcessorStepRegistry.register("lerobot_pi0_tokenizer")
@dataclass
class Pi0TokenizerStep(ProcessorStep):
    """The instruction as token ids: cleaned as openpi cleans it, beginning of sequence, text, newline.

    The tokenizer itself is the step's saved state, so a checkpoint needs neither a network nor a gated
    repository. In training, i.e. with actions, the batch also gets each prompt without its instruction, for
    `--policy.prompt_dropout`. Prompts of one length are not padded, and have no mask: attention is faster
    without one. Others are padded on the right (id 0) to the batch's longest, rounded up to a multiple of 8
    so that shapes are few. Integer states and actions become float32: LeRobot's normalizer, which comes after
    this step, would round its statistics to their type.
    """

    tokenizer: str
    max_length: int
    vocab_size: int
    state_size: int | None = None  # of the robot; None, in checkpoints of before: not checked
    _tokenizer: Tokenizer | None = field(default=None, init=False, repr=False)
    _warned_of: set[str] = field(default_factory=set, init=False, repr=False)

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        transition = with_float_vectors(transition, self.state_size)
        prompts = self.encode_batch(_instructions(transition), transition)
        lengths = {len(row) for row in prompts[LANGUAGE]}
        length = max(len(row) for rows in prompts.values() for row in rows)
        padded = len(lengths) > 1 or not self.has_few_lengths
        if padded:
            length = min(self.max_length, 8 * math.ceil(length / 8))
        observation: Any = transition[TransitionKey.OBSERVATION]  # pyrefly: ignore[bad-typed-dict-key]
        for (tokens, mask), rows in prompts.items():
            observation[tokens] = torch.tensor([row + [0] * (length - len(row)) for row in rows])
            observation[mask] = torch.tensor(
                [[True] * len(row) + [False] * (length - len(row)) for row in rows]
            )
        if not padded:
            del observation[OBS_LANGUAGE_ATTENTION_MASK]
        return transition

    @property
    def has_few_lengths(self) -> bool:
        """Whether prompts have few lengths, those of the instructions, so that each may have shapes of its
        own."""
        return True

    def encode_batch(
        self, tasks: Sequence[str], transition: EnvTransition
    ) -> dict[tuple[str, str], list[list[int]]]:
        """Token ids of the prompts of a batch, under the keys of the observation that they and their mask
        get. With actions, i.e. in training, also those without the instruction.
        """
        given: Any = transition
        states = self.states(len(tasks), given)
        prompts = {LANGUAGE: [self.encode(*pair) for pair in zip(tasks, states, strict=True)]}
        if given.get(TransitionKey.ACTION) is not None:
            prompts[WITHOUT_TASK] = [self.encode("", state) for state in states]
        return prompts

    def states(self, count: int, transition: Any) -> Sequence[Tensor | None]:
        """The states (dims,) that stand in the prompts of a batch."""
        return [None] * count

    def prompt(self, task: str, state: Tensor | None = None) -> Prompt:
        """The prompt for an instruction and a state (dims,), normalized, which π0 does not write into it."""
        return Prompt((clean_prompt(task[:MAX_PROMPT]), "\n"))

    def encode(self, task: str, state: Tensor | None = None) -> list[int]:
        """Token ids of one prompt; one longer than `max_length` loses its end, with a warning."""
        prompt = self.prompt(task, state)
        tokens = self._tokens(prompt)
        assert self._tokenizer is not None
        beginning = self._tokenizer.token_to_id("<bos>")
        if beginning is None:
            raise UserError(
                f"the tokenizer '{self.tokenizer}' has no token '<bos>', with which a prompt begins: "
                "name PaliGemma's, or one made like it, with --policy.tokenizer"
            )
        ids = [beginning, *(token for token, _, _ in tokens)]
        if max(ids) >= self.vocab_size:
            raise UserError(
                f"the tokenizer '{self.tokenizer}' gives id {max(ids)} for {shown(task)}, but the model's "
                f"vocabulary has {self.vocab_size} entries: raise --policy.vlm.vocab_size (training from "
                "scratch), or name the tokenizer that belongs to the weights with --policy.tokenizer"
            )
        if len(ids) > self.max_length and first_time(task, self._warned_of):
            _, start, _ = tokens[self.max_length - 1]
            logger.warning(
                "the prompt has %d tokens and is cut to %d (--policy.tokenizer_max_length): %s. It loses its "
                "end, %s",
                len(ids),
                self.max_length,
                shown(task),
                shown(prompt.text[start:], 100),
            )
        return ids[: self.max_length]

    def words(self, task: str, state: Tensor | None = None) -> list[Word]:
        """The words of a prompt, each with the number of its tokens, in the order of `encode`.

        The beginning of sequence and the newline are words of their own; a cut prompt has fewer.
        """
        left = len(self.encode(task, state))
        prompt = self.prompt(task, state)
        spans = [word.span() for word in re.finditer(r"\n|\S+", prompt.text)]
        counts = [0] * len(spans)
        for _, _, end in self._tokens(prompt):
            # A token that is a space alone belongs to the word behind it, or to the last one.
            counts[min(sum(stop < end for _, stop in spans), len(spans) - 1)] += 1
        words = [Word("<bos>", 1)]
        for (start, stop), count in zip(spans, counts, strict=True):
            text, is_state = prompt.text[start:stop], start in prompt.state
            words.append(Word("newline" if text == "\n" else text.rstrip(";" * is_state), count, is_state))
        kept = []
        for word in words:
            if left > 0:
                kept.append(word._replace(num_tokens=min(word.num_tokens, left)))
            left -= word.num_tokens
        return kept

    def _tokens(self, prompt: Prompt) -> list[tuple[int, int, int]]:
        """Id of each token, and where in the text it starts and ends."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer)
        tokens, start = [], 0
        for part in prompt.parts:
            encoding = self._tokenizer.encode(part, add_special_tokens=False)
            tokens += [
                (token, start + a, start + b)
                for token, (a, b) in zip(encoding.ids, encoding.offsets, strict=True)
            ]
            start += len(part)
        return tokens

    def get_config(self) -> dict[str, Any]:
        names = ("tokenizer", "max_length", "vocab_size", "state_size")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Tensor]:
        """The tokenizer as the bytes of its JSON."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer)
        return {
            "tokenizer": torch.frombuffer(bytearray(self._tokenizer.to_str().encode()), dtype=torch.uint8)
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(bytes(state["tokenizer"].cpu().numpy()).decode())
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint's tokenizer (policy_preprocessor_step_*_tokenizer.safetensors) is damaged "
                f"({error!r}): copy or download the whole folder again"
            ) from error

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        return features


def with_float_vectors(transition: EnvTransition, state_size: int | None) -> EnvTransition:
    """A copy of a transition, with its own observation, whose state and actions are floats.

    Raises UserError for a state of another size, which the normalizer would broadcast.
    """
    transition = transition.copy()
    # LeRobot indexes by the enum and types by its values.
    of: Any = transition
    observation = {**(of.get(TransitionKey.OBSERVATION) or {})}
    of[TransitionKey.OBSERVATION] = observation
    for vectors, key in ((observation, OBS_STATE), (of, TransitionKey.ACTION)):
        values = vectors.get(key)
        if values is not None and not isinstance(values, Tensor | dict):
            raise UserError(
                f"'{key}' is a {type(values).__name__}, of which LeRobot makes no batch: give a tensor "
                "(torch.as_tensor)"
            )
        if isinstance(values, Tensor) and not values.is_floating_point():
            vectors[key] = values.float()
    state = observation.get(OBS_STATE)
    if state is not None and state_size not in (None, state.shape[-1]):
        raise UserError(
            f"'{OBS_STATE}' has {state.shape[-1]} numbers, and the policy was trained with {state_size}: "
            "give it the same joints, in the same order"
        )
    return transition


def _instructions(transition: EnvTransition) -> Sequence[str]:
    """The instructions of a batch. Raises UserError where there is none."""
    complementary: Any = transition.get(TransitionKey.COMPLEMENTARY_DATA)
    task = (complementary or {}).get("task")
    texts = [task] if isinstance(task, str) else task
    if not (texts and isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)):
        raise UserError(
            f"the policy needs an instruction, but 'task' is {task!r}. Datasets store one per episode; "
            'lerobot-rollout takes --task="..."'
        )
    return texts


def clean_prompt(prompt: str) -> str:
    """The prompt as openpi hands it to the tokenizer: stripped, underscores and line breaks as spaces."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


class InstructionCheck:
    """Warns of each instruction that is not one of the training data's, once."""

    def __init__(self, config: Pi0Config):
        self.config = config
        self._seen: set[str] = set()

    def __call__(self, task: str | Sequence[str] | None) -> None:
        """Check the instructions of a batch."""
        if (data := self.config.training_data) is None:
            return
        tasks = [task] if isinstance(task, str) else task or ()
        if self.config.prompt_dropout:  # it was trained without one as well
            tasks = [task for task in tasks if task]
        for prompt in set(tasks):
            if first_time(prompt, self._seen) and (message := unknown_instruction(prompt, data)):
                logger.warning(message)


def first_time(prompt: str, seen: set[str]) -> bool:
    """Is a prompt not among those that were seen? It is from now on. The set stays small."""
    prompt = prompt[:MAX_PROMPT]
    if prompt in seen:
        return False
    if len(seen) >= MAX_REMEMBERED:
        seen.clear()
    seen.add(prompt)
    return True


def shown(prompt: str, limit: int = SHOWN) -> str:
    """A prompt in quotes, for a message: control characters are escaped, and a long one is cut."""
    return repr(prompt) if len(prompt) <= limit else f"{prompt[:limit]!r}… ({len(prompt):,} characters)"


def unknown_instruction(prompt: str, data: TrainingData) -> str | None:
    """What to say of an instruction that the policy has never seen; None of one that it has."""
    known = {clean_prompt(task): task for task in data.tasks}
    if not known or clean_prompt(prompt) in known:
        return None
    if not prompt.strip():
        return "there is no instruction, and the policy was not trained without one"
    near = get_close_matches(clean_prompt(prompt[:SHOWN]), known, n=3, cutoff=0.0)
    others = f", and {len(known) - len(near)} others" if len(known) > len(near) else ""
    return (
        f"the instruction {shown(prompt)} is none of the training data's: "
        f"{', '.join(repr(known[task]) for task in near)}{others}. The policy may not know what is meant"
    )


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer by name: "small" (in the package), a folder or a tokenizer.json, a repository on the hub.

    Raises OSError that says why it cannot be had and what to do.
    """
    if name == SMALL_TOKENIZER:
        return Tokenizer.from_str(
            files("lerobot_pi0").joinpath("tokenizers", "small.json").read_text("utf-8")
        )
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return Tokenizer.from_file(str(path))

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Tokenizer.from_file(hf_hub_download(name, "tokenizer.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, GatedRepoError):
            why = "its licence has to be accepted on the hub, and you have to be logged in"
        elif isinstance(error, LocalEntryNotFoundError | ConnectionError):
            why = (
                "it is not in the local cache and the hub cannot be reached (no network, or HF_HUB_OFFLINE=1)"
            )
        else:
            why = str(error).strip().splitlines()[0]
        raise UnavailableError(
            f"the tokenizer '{name}' cannot be downloaded: {why}. Ways out: (1) accept the licence at "
            f"huggingface.co/{name} and run `hf auth login`; (2) --policy.tokenizer=FOLDER with a copy of "
            "its tokenizer.json; (3) start from a checkpoint of this policy, which carries its tokenizer: "
            "--policy.path=...; (4) for a small model from scratch, --policy.tokenizer=small"
        ) from error


Pipelines = tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]


def make_lerobot_pi0_pre_post_processors(
    config: Pi0Config, dataset_stats: Statistics | None = None
) -> Pipelines:
    """The pipelines of a new policy. As in openpi raw values are normalized, then padded (by the policy).

    Without statistics from a dataset, those of the checkpoint that the weights came from are taken.
    """
    steps = standard_steps(config, dataset_stats)
    sizes = config.tokenizer_max_length, config.vlm.vocab_size, config.state_size
    tokenize = Pi0TokenizerStep(config.tokenizer, *sizes)
    tokenize.state_dict()  # fetches the tokenizer: if it cannot be had, now is the time to say so
    return make_policy_processor_pipelines(
        input_steps=[
            steps.rename_observations,
            steps.add_batch_dim,
            tokenize,
            *[AdaptToPiStep()] * config.adapt_to_pi,
            steps.to_device,
            steps.normalize,
        ],
        output_steps=[steps.unnormalize, *[AdaptFromPiStep()] * config.adapt_to_pi, steps.to_cpu],
    )


def standard_steps(config: Pi0Config, dataset_stats: Statistics | None) -> DefaultPolicyProcessorSteps:
    """LeRobot's steps, with statistics that are prepared: the dataset's, or those of the base checkpoint."""
    from lerobot_pi0.data.normalization import NormalizationStatistics
    from lerobot_pi0.data.statistics import prepare_statistics

    prepared = NormalizationStatistics.known(dataset_stats)
    if prepared is None and (dataset_stats or config.base_checkpoint):
        if config.relative_actions or (config.adapt_to_pi and dataset_stats):
            setting = "relative_actions" if config.relative_actions else "adapt_to_pi"
            raise UserError(
                f"with --policy.{setting}=true the statistics are computed when the policy is made: "
                f"make it first, {type(config).__name__.removesuffix('Config')}Policy(config, "
                "dataset.meta.stats, dataset.meta), then these pipelines with dataset.meta.stats"
            )
        source = config if dataset_stats else replace(config, statistics="checkpoint")
        dataset_stats = prepare_statistics(
            source, dataset_stats, None, config.base_checkpoint, config.base_revision
        )
    if not dataset_stats:
        logger.warning(
            "no statistics: state and actions pass as they are. That is right for a policy with random "
            "weights only; a trained one carries its statistics (--policy.path=...)"
        )
    steps = make_default_policy_processor_steps(config, dataset_stats)
    steps.normalize.eps = steps.unnormalize.eps = 0.0  # it is in the statistics
    return steps
