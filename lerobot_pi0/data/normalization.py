"""Normalization modes, and statistics to which epsilon and floor are already applied."""

import hashlib
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
from lerobot.configs import NormalizationMode
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_pi0.configuration_pi0 import Pi0Config, Statistics

# openpi adds this to each standard deviation and to each range.
EPSILON = 1e-6


# Below this standard deviation or range (in the dataset's units) a dimension hardly moves, and noise in it
# would be blown up: it is divided by the floor instead.
NEARLY_CONSTANT, FLOOR = 1e-4, 1e-2


# What each mode normalizes by: by the second, or by the second minus the first.
NEEDED = {
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}


QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


class NormalizationStatistics(dict[str, dict[str, Any]]):
    """Statistics with epsilon and floor already applied: they are in the deviations and upper ends.

    So normalizing and unnormalizing are exact inverses of one another. `raw`: the dataset's own.
    LeRobot after 0.6.1 builds the processors with a copy of `dataset.meta.stats`, plain dicts in which the
    type is lost: `known` finds what a copy is of.
    """

    _known: ClassVar[WeakValueDictionary[bytes, "NormalizationStatistics"]] = WeakValueDictionary()

    def __init__(self, statistics: Statistics, raw: Statistics | None = None):
        super().__init__(statistics)
        self.raw: Statistics = raw or {}
        key = _digest(statistics)
        if raw and key != _digest(raw):
            self._known[key] = self

    @classmethod
    def known(cls, statistics: Statistics | None) -> "NormalizationStatistics | None":
        """These statistics, or those that they are a copy of, as long as some part of this process has them;
        None of all others, which are raw."""
        if isinstance(statistics, cls):
            return statistics
        return cls._known.get(_digest(statistics)) if statistics else None


def _digest(statistics: Statistics) -> bytes:
    """Of the values for state and action, in whatever they are held."""
    digest = hashlib.blake2b(digest_size=16)
    for key in (OBS_STATE, ACTION):
        for name, value in sorted(statistics.get(key, {}).items()):
            digest.update(f"{key}.{name}".encode() + np.asarray(value, np.float32).tobytes())
    return digest.digest()


def normalization_modes(config: Pi0Config) -> dict[str, NormalizationMode]:
    """How each feature is normalized."""
    features = {**(config.input_features or {}), **(config.output_features or {})}
    return {
        key: config.normalization_mapping.get(feature.type.value, NormalizationMode.IDENTITY)
        for key, feature in features.items()
    }


def affine(config: Pi0Config, statistics: Statistics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Gain and offset (dims,) of a feature's normalization: x · gain + offset."""
    mode = normalization_modes(config)[key]
    if mode is NormalizationMode.IDENTITY:
        feature = {**(config.input_features or {}), **(config.output_features or {})}[key]
        return np.ones(feature.shape[0]), np.zeros(feature.shape[0])
    low, high = (np.asarray(statistics[key][name], np.float64).ravel() for name in NEEDED[mode])
    if mode is NormalizationMode.MEAN_STD:
        return 1 / high, -low / high
    gain = 2 / (high - low)
    return gain, -low * gain - 1


def dimension_name(config: Pi0Config, key: str, dimension: int) -> str:
    """What a dimension is called, or its number."""
    names = {ACTION: config.action_feature_names, OBS_STATE: config.state_feature_names}.get(key)
    return names[dimension] if names else str(dimension)
