"""Random numbers on any device: hashes of a counter, under the keys of `mugs.random_streams`.

Apart from that module, which the loader's workers import: they do without torch.
"""

import math

import torch
from torch import Tensor

from mugs.random_streams import GAMMA, MULTIPLIER_1, MULTIPLIER_2


def box_muller(u: Tensor, v: Tensor) -> Tensor:
    """Return N(0, 1) values sqrt(-2 ln u) cos(2 pi v), for draws u and v from U(0, 1)."""
    return torch.sqrt(-2 * torch.log(u)) * torch.cos(2 * math.pi * v)


def hashed_bits(key: int, count: int, device: torch.device) -> Tensor:
    """Return uniform 64-bit integers (count,), a function of the key: splitmix64 of a counter."""
    counter = torch.arange(count, dtype=torch.int64, device=device)
    value = counter * _as_signed(GAMMA) + _as_signed(key)
    value = (value ^ _shift_right(value, 30)) * _as_signed(MULTIPLIER_1)
    value = (value ^ _shift_right(value, 27)) * _as_signed(MULTIPLIER_2)
    return value ^ _shift_right(value, 31)


def _as_signed(value: int) -> int:
    # torch has no arithmetic on unsigned 64-bit integers; signed ones wrap around to the same bits.
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(value: Tensor, bits: int) -> Tensor:
    # torch shifts the sign bit in; the mask clears it, as the hash is defined on unsigned integers.
    return (value >> bits) & ((1 << (64 - bits)) - 1)
