"""Random numbers as a function of a key."""

import torch

from lerobot_pi0.training.randomness import normal, sample_keys, uniform


def splitmix64(state: int) -> int:
    """The output of the authors' reference for a state, in whole numbers."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def finalise(number: int) -> int:
    return splitmix64(number - 0x9E3779B97F4A7C15)


def test_keys_are_those_of_splitmix64():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of seed 0, as published
    for seed, step, index, draw in ((0, 0, 0, 0), (1000, 7, 900_000_000_000, 1), (-3, 2**40, 5, 2)):
        sample = finalise(finalise(index + splitmix64(seed)) + splitmix64(step))
        found = sample_keys(seed, step, torch.tensor([index]), draws=3)[draw].item()
        assert found % 2**64 == finalise(sample + finalise(draw))


def test_a_sample_gets_the_same_numbers_in_any_batch():
    index = torch.tensor([7, 3, 900_000_000_000, 0])
    together = normal(sample_keys(1, 5, index, 3), (6, 4), 0)
    for row, one in enumerate(index):
        assert torch.equal(
            normal(sample_keys(1, 5, one[None], 3), (6, 4), 0), together[3 * row : 3 * row + 3]
        )


def test_seed_step_index_draw_and_stream_all_matter():
    index = torch.tensor([1])
    keys = [sample_keys(0, 0, index), sample_keys(1, 0, index), sample_keys(0, 1, index)]
    keys += [sample_keys(0, 0, index + 1), sample_keys(0, 0, index, 2)[1:], sample_keys(-3 % 2**64, 0, index)]
    numbers = [uniform(key, (), 0).item() for key in keys] + [uniform(keys[0], (), 1).item()]
    assert len(set(numbers)) == len(numbers)
    assert torch.equal(sample_keys(0, 0, index, 2)[:1], keys[0])


def test_numbers_are_uniform_and_normal():
    keys = sample_keys(1000, 3, torch.arange(500), 2)
    u, n = uniform(keys, (3, 10), 4), normal(keys, (7, 9), 5)
    assert u.shape == (1000, 3, 10)
    assert n.shape == (1000, 7, 9)
    assert 0 < u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    assert abs(u.mean() - 1 / 2) < 0.01
    assert abs(u.var() - 1 / 12) < 0.002
    for moment, expected, tolerance in ((1, 0, 0.02), (2, 1, 0.03), (3, 0, 0.08), (4, 3, 0.2)):
        assert abs((n**moment).mean() - expected) < tolerance
    # Neither neighbours within a sample nor neighbouring samples know of one another.
    for a, b in ((n[:, 0, 0], n[:, 0, 1]), (n[1:, 0, 0], n[:-1, 0, 0]), (n[:, 0, 0], n[:, 3, 5])):
        assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 0.1
