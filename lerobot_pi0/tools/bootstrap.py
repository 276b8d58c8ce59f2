"""Confidence intervals over resampled episodes."""

import numpy as np

RESAMPLES = 2000
TINY = np.finfo(np.float64).tiny  # the ratio of two zeros is one


def ratio_interval(sums: np.ndarray) -> tuple[float, float | None, float | None]:
    """The ratio of two totals and its 95 % bootstrap interval, which is None for one episode.

    `sums` (episodes, 2) are numerator and denominator. Frames of an episode are correlated, so whole episodes
    are resampled.
    """
    ratio = float(_ratio(sums.sum(0)))
    if len(sums) < 2:
        return ratio, None, None
    drawn = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    low, high = np.quantile(_ratio(sums[drawn].sum(1)), [0.025, 0.975])
    return ratio, float(low), float(high)


def _ratio(totals: np.ndarray) -> np.ndarray:
    return (totals[..., 0] + TINY) / (totals[..., 1] + TINY)
