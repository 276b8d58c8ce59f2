"""Random numbers as a function of a key, computed where the key lies; and numbers as a function of a name.

Nothing has to be saved for a resumed run to draw what an uninterrupted one draws, a sample gets the same
numbers in whatever batch and on whatever process it is, and the host never waits. Counters go through
splitmix64's finaliser (Steele, Lea and Flood, 2014, "Fast Splittable Pseudorandom Number
Generators").
"""

import hashlib
import math

import torch
from torch import Tensor

GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number, which torch can add


def sample_keys(seed: int, step: int, index: Tensor, draws: int = 1) -> Tensor:
    """Keys (batch · draws,), those of a sample in a row, of samples with these indices (batch,) at a step."""
    keys = _mix(_mix(index.long() + _mix_int(seed)) + _mix_int(step))
    draw = torch.arange(draws, device=index.device)
    return _mix(keys[:, None] + _mix(draw)).flatten()


def uniform(keys: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
    """Numbers in (0, 1), float32 (n, *shape), for keys (n,). Streams of a key are independent."""
    count = math.prod(shape)
    counter = torch.arange(1, count + 1, device=keys.device)
    bits = _mix(_mix(keys + _mix_int(stream))[:, None] + _mix(counter))
    # The upper 23 bits, in the middle of their interval: neither 0 nor 1.
    return (((bits >> 41) & 0x7FFFFF).float() * 2**-23 + 2**-24).view(-1, *shape)


def normal(keys: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
    """Standard normal numbers, float32 (n, *shape), for keys (n,) (Box and Muller, 1958)."""
    count = math.prod(shape)
    radius, angle = uniform(keys, (2, (count + 1) // 2), stream).unbind(1)
    radius = (-2 * radius.log()).sqrt()
    pairs = torch.cat((radius * (2 * math.pi * angle).cos(), radius * (2 * math.pi * angle).sin()), 1)
    return pairs[:, :count].reshape(-1, *shape)


def bytes_of(name: str, count: int) -> Tensor:
    """Evenly spread bytes that belong to a name: uint8 (count,). By SHAKE-256, which no library changes."""
    drawn = hashlib.shake_256(f"golden actions 1: {name}".encode()).digest(count)
    return torch.frombuffer(bytearray(drawn), dtype=torch.uint8)


def normal_of(name: str, count: int) -> Tensor:
    """Numbers that belong to a name, nearly normally distributed: float32 (count,)."""
    drawn = bytes_of(name, 12 * count).view(count, 12).float()
    return (drawn.sum(1) - 12 * 127.5) / math.sqrt(12 * (256**2 - 1) / 12)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser; 64-bit products wrap around, shifts fill with zeros."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _mix_int(x: int) -> int:
    """The same of a number on the host, as a signed 64-bit one."""
    mask = 0xFFFFFFFFFFFFFFFF
    x = (x + GOLDEN) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x ^= x >> 31
    return x - (1 << 64) if x >> 63 else x
