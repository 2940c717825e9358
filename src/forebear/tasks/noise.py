"""Gaussian noise that belongs to an example and a noise level, whatever the batch.

Losses before and after a change of the model can be compared only at the same noise. A generator
that is seeded for each batch ties noise to the place in the batch; here every number is a hash of
its coordinates, so batch size, order and subset make no difference.
"""

import math
import struct

import torch
from torch import Tensor

# splitmix64 (Steele, Lea & Flood, 2014); torch has no unsigned 64-bit arithmetic, and products of
# signed numbers wrap around in the same way.
STEP = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
FIRST = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
SECOND = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def gaussian(
    keys: Tensor, shape: tuple[int, ...], *coordinates: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal numbers `[b, *shape]`.

    Args:
        keys: integers `[b]`, one for each example.
        shape: of an example.
        coordinates: what else the noise belongs to: a seed, a level, the number of a draw.
        dtype: of the result; the numbers are the same up to rounding.
    """
    state = _state(keys, coordinates)
    size = math.prod(shape)
    half = -(-size // 2)
    counters = torch.arange(1, half + 1, device=keys.device) * STEP
    first = mixed(state[:, None] + counters)  # [b, half]
    second = mixed(first ^ SECOND)
    # Box and Muller: two uniform numbers of 53 bits make two normal ones.
    radius = torch.sqrt(-2.0 * torch.log(_uniform(first)))
    angle = (2.0 * math.pi) * _uniform(second)
    both = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], 1)
    return both[:, :size].reshape(len(keys), *shape).to(dtype)


def uniform(keys: Tensor, *coordinates: float) -> Tensor:
    """Numbers above 0 and up to 1, `[b]`, in double precision; see `gaussian`."""
    return _uniform(mixed(_state(keys, coordinates) ^ FIRST))


def moments(keys: Tensor, seed: int | Tensor, epoch: int | Tensor) -> Tensor:
    """Integers that belong to a visit of an example in training, of the shape of `keys`.

    Args:
        keys: of the examples.
        seed: of the training; of each, in a shape that broadcasts.
        epoch: number of the visit; of each, in a shape that broadcasts.
    """
    return mixed(mixed(mixed(keys.to(torch.int64)) ^ seed) ^ epoch)


def mixed(state: Tensor) -> Tensor:
    """The finalizer of splitmix64: every bit of the result depends on every bit of `state`."""
    state = (state ^ _shifted(state, 30)) * FIRST
    state = (state ^ _shifted(state, 27)) * SECOND
    return state ^ _shifted(state, 31)


def _state(keys: Tensor, coordinates: tuple[float, ...]) -> Tensor:
    state = keys.to(torch.int64)
    for coordinate in coordinates:
        state = mixed(state ^ _bits(coordinate))
    return state


def _shifted(state: Tensor, by: int) -> Tensor:
    """A right shift that moves zeros in."""
    return (state >> by) & ((1 << (64 - by)) - 1)


def _uniform(state: Tensor) -> Tensor:
    """Numbers above 0 and up to 1, from the upper 53 bits."""
    return (_shifted(state, 11) + 1).double() * 2.0**-53


def _bits(coordinate: float) -> int:
    """A number as 64 signed bits; whole numbers of either type are the same."""
    return int(struct.unpack("<q", struct.pack("<d", float(coordinate)))[0])
