"""Per-iteration schedules in closed form (released code; recipe of the paper's appendix)."""

import math


def warmup_cosine_schedule(
    step: int, warmup: int, total: int, *, start: float, peak: float, end: float
) -> float:
    """linspace(start, peak) over `warmup` steps, end point included, then cosine from the peak towards `end`."""
    if step < warmup:
        return start + (peak - start) * step / max(warmup - 1, 1)
    return cosine_schedule(peak, end, (step - warmup) / (total - warmup))


def cosine_schedule(start: float, end: float, progress: float) -> float:
    """From start (progress 0) to end (1) along half a cosine."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))
