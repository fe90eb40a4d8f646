"""One number, one row."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ResultRow:
    """A result in long format; `setting` tells rows of one metric apart (k and T, best or last epoch)."""

    run_id: str
    method: str
    arch: str
    epochs: int
    stage: str
    dataset: str
    setting: str
    metric: str
    value: float
    unit: str
    seed: int
