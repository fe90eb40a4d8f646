"""Schedules of a value per step, in closed form (released code; paper, appendix)."""

import math


def warmup_cosine_schedule(
    step: int, warmup: int, total: int, *, start: float, peak: float, end: float
) -> float:
    """Return the value at `step`: linear warm-up from `start` to `peak`, then cosine towards `end`.

    The warm-up is linspace(start, peak, warmup), end point included, as released.
    """
    if step < warmup:
        # linspace over `warmup` points has warmup - 1 intervals; a single point is `start`.
        return start + (peak - start) * step / max(warmup - 1, 1)
    return cosine_schedule(peak, end, (step - warmup) / (total - warmup))


def cosine_schedule(start: float, end: float, progress: float) -> float:
    """Return the value between start (progress 0) and end (1) on half a cosine."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))
