"""Action limits: actions are clamped to the range and the step size of the training data.

It knows chunks of normalized actions (b batch, a steps, d dimensions) and limits, and nothing of the policy.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lerobot_pi0.configuration_pi0 import ActionLimits
from lerobot_pi0.errors import UserError

logger = logging.getLogger(__name__)

MARGIN = 0.1  # beyond the data's range, and its largest step, as a share of either
LEAST = 1e-2  # of such a margin, in robot units: for dimensions that hardly move in the data
# Any step may be so large, as a share of the range: what stands still within each episode (a gripper that
# only opens between them) has no largest step to speak of.
SMALL_STEP = 0.02

MANY = 10  # chunks, from which on their share says something

MAX_LEVEL = 2.0  # of a float image, with room for what resizing overshoots: 0 to 255 was meant


def not_finite(values: Tensor, names: Sequence[str] | None, largest: float | None = None) -> list[str]:
    """Names (or numbers) of the last dimension where some of the values (…, d) are NaN, infinite, or beyond
    `largest`.
    """
    finite = values.isfinite() if largest is None else values.abs() <= largest
    if finite.all():
        return []
    dimensions = finite.flatten(0, -2).all(0).tolist()
    return [names[i] if names else str(i) for i, is_finite in enumerate(dimensions) if not is_finite]


def check_observation(batch: Mapping[str, Tensor], features: Mapping[str, Sequence[str] | None]) -> None:
    """Check these features of a batch, whose last dimension has names.

    Raises UserError for NaN or Inf, and for float images (b, 3, h, w) that are not in [0, 1].
    """
    # A GPU is waited for once, for all of them.
    checked = [_is_fine(batch[key]) for key in features if batch[key].is_floating_point()]
    if not checked or torch.stack(checked).all():
        return
    for key, names in features.items():
        if bad := not_finite(batch[key], names):
            raise UserError(
                f"'{key}' of the observation is NaN or infinite in {bad}; no action was sent. Look at the "
                "robot's sensor or camera, and at the statistics that normalize it"
            )
        if batch[key].ndim == 4 and batch[key].is_floating_point() and batch[key].max() > MAX_LEVEL:
            raise UserError(
                f"'{key}' has values up to {float(batch[key].max()):g}, but float images are in [0, 1]; no "
                "action was sent. Divide by 255, or give uint8"
            )


def _is_fine(values: Tensor) -> Tensor:
    """Whether they are finite, and an image's in [0, 1]."""
    if values.ndim != 4:
        return values.isfinite().all()
    low, high = values.aminmax()  # NaN if there is one
    return (low > -torch.inf) & (high <= MAX_LEVEL)


COPY_AGAIN = "Copy or download the checkpoint again"


class ChunkGuard:
    """Clamps chunks to `limits`, and logs a `summary` of where when it has clamped 1, 10, 100, … of them."""

    def __init__(self, limits: ActionLimits, names: Sequence[str]):
        self.names = names
        self.num_chunks = self.num_clamped = 0  # each row of a batch is one
        self.num_held = Counter[str]()  # chunks in which a joint was clamped
        self._clamped: set[tuple[int, int]] = set()  # of the last batch: row and joint
        self._last: dict[str, str] = {}  # by joint
        self._counts = True
        vectors = ("low", "high", "step", "gain", "offset")
        given = {name: values for name in vectors if (values := getattr(limits, name))}
        if wrong := {name: len(values) for name, values in given.items() if len(values) != len(names)}:
            raise UserError(
                f"action_limits in the policy's config.json have other sizes than the {len(names)} actions: "
                f"{wrong}. {COPY_AGAIN}"
            )
        for values in given.values():
            if bad := not_finite(torch.tensor(values, device="cpu")[None], names):
                raise UserError(
                    f"action_limits in the policy's config.json are NaN or infinite for {bad}: actions "
                    f"cannot be held to them. {COPY_AGAIN}, or train again with data that has finite actions"
                )
        if (
            any(low > high for low, high in zip(limits.low, limits.high, strict=True))
            or any(gain == 0 for gain in limits.gain)
            or any(step < 0 for step in limits.step or ())
        ):
            raise UserError(
                "action_limits in the policy's config.json allow no action: 'low' is above 'high', a 'gain' "
                f"is 0 or a 'step' is negative. {COPY_AGAIN}"
            )
        low, high, self._gain, self._offset = (
            torch.tensor(values, device="cpu")  # a policy that is loaded is made on torch's meta device
            for values in (limits.low, limits.high, limits.gain, limits.offset)
        )
        margin = (MARGIN * (high - low)).clamp(min=LEAST)
        self._low, self._high = low - margin, high + margin
        self._step = None
        if limits.step is not None:
            step = torch.tensor(limits.step, device="cpu")
            self._step = (step + (MARGIN * step).clamp(min=LEAST)).maximum(SMALL_STEP * (high - low))

    def hold(self, chunk: Tensor, before: Tensor | None = None) -> Tensor:
        """The chunk (b, a, d), normalized, where it keeps to the limits; at the limit where it does not.

        `before` (b, d) is the action that it follows, if it follows one; NaN where it does not. Computed on
        the CPU, whatever the device of the chunk: there it takes less time than a GPU's kernels take to
        start.
        """
        on_host = chunk.cpu()
        held = on_host.clamp(*(limit * self._gain + self._offset for limit in (self._low, self._high)))
        if self._step is not None:
            first = held[:, 0]
            if before is not None:
                before = before.cpu()
                first = torch.where(before.isnan(), first, before)
            held = _slowed(torch.cat((first[:, None], held), 1), self._step * self._gain)[:, 1:]
        changed = not torch.equal(held, on_host)
        if self._counts:
            if before is None:
                self.num_chunks += len(chunk)
                self._clamped = set()
            if changed:
                self._count(on_host, held)
        return held.to(chunk.device) if changed else chunk

    @contextmanager
    def not_counting(self) -> Iterator[None]:
        """Meanwhile chunks are clamped and neither counted nor logged: those that no robot gets."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    @property
    def summary(self) -> str:
        """How many chunks were clamped, in which joints, by how much in the worst one, and what that means.

        Empty if none was.
        """
        if not self.num_clamped:
            return ""
        (worst, _), *_ = ranked = self.num_held.most_common()
        joints = ", ".join(f"{name} in {count:,}" for name, count in ranked[:3])
        joints += f" and {len(ranked) - 3} more" if len(ranked) > 3 else ""
        if self.num_clamped >= MANY and self.num_clamped > self.num_chunks / 2:
            meaning = (
                "Most chunks are clamped: the policy is not trained enough, or sees what its data does not "
                "show (`lerobot-pi0 report` and `lerobot-pi0 doctor` tell which)"
            )
        else:
            meaning = "Where the robot may leave this range: --policy.chunk_guard=false"
        return (
            f"chunk guard: {self.num_clamped:,} of {self.num_chunks:,} chunks were clamped to the range and "
            f"the steps of the training data: {joints}. The last of {worst}: {self._last[worst]}. {meaning}"
        )

    def beyond_one_step(self, actions: Tensor, pose: Tensor) -> str:
        """Where actions (b, d) are more than the largest step from a pose (b, d), NaN where it is not known:
        in words, in the robot's units; empty if nowhere.
        """
        if self._step is None:
            return ""
        distance = ((actions - pose).cpu().abs() / self._gain.abs()).amax(0)
        far = distance > self._step  # NaN is not
        return ", ".join(
            f"{self.names[i]} by {distance[i]:.4g} (a step is at most {self._step[i]:.4g})"
            for i in far.nonzero()[:, 0].tolist()
        )

    def _count(self, chunk: Tensor, held: Tensor) -> None:
        """Count what a call of `hold` has clamped. A chunk may come twice, then with the action `before`."""
        clamped = {(row, joint) for row, joint in (held != chunk).any(1).nonzero().tolist()}
        new = clamped - self._clamped
        due = 10 ** len(str(self.num_clamped)) if self.num_clamped else 1
        self.num_clamped += len({row for row, _ in clamped} - {row for row, _ in self._clamped})
        self.num_held.update(self.names[joint] for _, joint in sorted(new))
        self._clamped |= clamped
        raw, kept = (((x.float() - self._offset) / self._gain).flatten(0, 1) for x in (chunk, held))
        for i in {joint for _, joint in clamped}:
            at = (raw[:, i] - kept[:, i]).abs().argmax()
            step = "" if self._step is None else f", in steps of at most {self._step[i]:.4g}"
            self._last[self.names[i]] = (
                f"held at {kept[at, i]:.4g} instead of {raw[at, i]:.4g}; the data, with a margin, has "
                f"{self._low[i]:.4g} to {self._high[i]:.4g}{step}"
            )
        if self.num_clamped >= due:
            logger.warning("%s", self.summary)


def _slowed(actions: Tensor, step: Tensor) -> Tensor:
    """Actions (b, a, d) of which none is further than `step` (d,) from the one before it."""
    # What is too fast is rare: the loop over steps is for those chunks alone.
    if not bool((actions.diff(dim=1).abs() > step).any()):
        return actions
    slowed = [actions[:, 0]]
    for action in actions[:, 1:].unbind(1):
        change = action - slowed[-1]
        slowed.append(torch.where(change.abs() > step, slowed[-1] + change.clamp(-step, step), action))
    return torch.stack(slowed, 1)
