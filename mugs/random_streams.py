"""Counter-based random numbers: every draw is a function of what it is for, never of who draws it."""

import math
from typing import Any

import torch
from numpy.random import Generator, Philox
from torch import Tensor

MASK = (1 << 64) - 1


def splitmix64(value: int) -> int:
    """splitmix64 of a Python integer."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def hashed_normal(key: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """N(0, 1) values of a shape, a function of the key alone (splitmix64, then Box-Muller)."""
    bits = hashed_bits(key, math.prod(shape), device)
    low = (bits & 0xFFFFFF).float().add_(0.5).div_(1 << 24)
    high = ((bits >> 24) & 0xFFFFFF).float().div_(1 << 24)
    return (torch.sqrt(-2 * torch.log(low)) * torch.cos(2 * math.pi * high)).view(shape)


def hashed_bits(key: int, count: int, device: torch.device) -> Tensor:
    """Uniform 64-bit integers (count,), a function of the key alone (splitmix64 of a counter)."""
    counter = torch.arange(count, dtype=torch.int64, device=device)
    return _mix_tensor(counter * _signed(0x9E3779B97F4A7C15) + _signed(key))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix_tensor(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shift(value, 31)


def make_generator(seed: int, epoch: int, sample: int, crop: int) -> Generator:
    """The generator of one crop of one sample in one epoch."""
    return Generator(Philox(key=[seed, (epoch << 40) | sample], counter=[0, 0, 0, crop]))


def switch_stream(rng: Generator, fresh: dict[str, Any], crop: int) -> None:
    """Make a sample's generator that of another of its crops, in a fifth of the time that a new one takes.

    `fresh`: the state it had before anything was drawn.
    """
    fresh["state"]["counter"][3] = crop
    rng.bit_generator.state = fresh


def draw_uniform(rng: Generator, low: float, high: float) -> float:
    """U(low, high), as `Generator.uniform` in a third of its time."""
    return low + (high - low) * rng.random()
