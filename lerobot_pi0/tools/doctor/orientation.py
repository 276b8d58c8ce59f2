"""Orientation: an environment's pictures are upright, as the policy's training pictures were.

Compared are the first pictures of episodes, small and without their mean colour: the scene decides, not the
light.
"""

import itertools
import json
from collections.abc import Iterator

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from lerobot_pi0.tools.doctor.finding import Finding, error, fine, listed, warning
from lerobot_pi0.tools.doctor.inputs import Inputs

SIZE = 24  # pixels a side
# Another one fits clearly better: by this much in cosine similarity, and with less of the difference left.
BETTER, LEFT = 0.1, 0.6
STRANGE = 0.4  # the best similarity of pictures that are of another scene

# The eight flips and turns of a picture (…, height, width).
ORIENTATIONS = {
    "as it is": lambda x: x,
    "turned by 90°": lambda x: x.rot90(1, (-2, -1)),
    "turned by 180°": lambda x: x.rot90(2, (-2, -1)),
    "turned by 270°": lambda x: x.rot90(3, (-2, -1)),
    "mirrored left to right": lambda x: x.flip(-1),
    "mirrored top to bottom": lambda x: x.flip(-2),
    "mirrored at the falling diagonal": lambda x: x.mT,
    "mirrored at the rising diagonal": lambda x: x.rot90(2, (-2, -1)).mT,
}


def pictures_are_upright(inputs: Inputs) -> Iterator[Finding]:
    """No flip and no turn of the environment's pictures, nor another camera's, fits the training's better."""
    assert inputs.env is not None
    reference, here = inputs.reference, inputs.opened_env.cameras
    if reference is None:
        return
    trained = reference.first_pictures(inputs.opened_env.instructions[0])
    shared = [key for key in here if key in trained]
    alike = {
        (a, b): {name: _similarity(turn(here[a]), trained[b]) for name, turn in ORIENTATIONS.items()}
        for a, b in itertools.product(shared, repeat=2)
    }
    best_of = {pair: max(found.values()) for pair, found in alike.items()}
    exchanged = [
        (a, b)
        for a, b in itertools.combinations(shared, 2)
        if _clearly(best_of[a, b], best_of[a, a]) and _clearly(best_of[b, a], best_of[b, b])
    ]
    for a, b in exchanged:
        yield error(
            f"the cameras '{a}' and '{b}' are exchanged",
            f"in the environment '{a}' is like '{b}' of the data (similarity {best_of[a, b]:.2f}; to '{a}' "
            f"{best_of[a, a]:.2f}), and the other way round",
            f"--rename_map='{json.dumps({a: b, b: a})}'",
        )
    for key in shared:
        if any(key in pair for pair in exchanged):
            continue
        ranked = sorted(alike[key, key].items(), key=lambda item: -item[1])
        (best, most), same = ranked[0], alike[key, key]["as it is"]
        ranking = f"similarity to the first pictures of the data: {listed(f'{n} {s:.2f}' for n, s in ranked)}"
        if _clearly(most, same):
            yield error(
                f"'{key}' of the environment looks like the training pictures when {best}",
                f"{ranking} (as it is {same:.2f})",
                f"pictures come from the processors of --env.type={inputs.env.type} (get_env_processors): "
                "turn them there, or train on pictures as they are here",
            )
        elif most < STRANGE:
            yield warning(
                f"'{key}' of the environment looks like none of the training pictures",
                ranking,
                "another camera, scene or task? See --env.task and --rename_map",
            )
        else:
            yield fine(f"'{key}' is as in the data: {ranking}")


def _clearly(better: float, same: float) -> bool:
    return better - same > BETTER and 1 - better < LEFT * (1 - same)


def _similarity(pictures: Tensor, to: Tensor) -> float:
    """The mean cosine similarity of pictures (n, 3, …) to the most similar one of others (m, 3, …)."""
    return (_features(pictures) @ _features(to).T).amax(1).mean().item()


def _features(pictures: Tensor) -> Tensor:
    small = adaptive_avg_pool2d(pictures, SIZE)
    return normalize((small - small.mean((2, 3), keepdim=True)).flatten(1), dim=1)
