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


@dataclass(frozen=True)
class Result:
    """A row, where it was read, and what of its pretraining a row does not say.

    `variant` names an experiment of its own ("w/o instance supervision"), `differs` the settings in which the same
    experiment deviates from the released recipe; both are empty for the recipe itself. `imported` marks weights that
    were imported, not pretrained here.
    """

    row: ResultRow
    where: str = "a row"
    variant: str = ""
    differs: tuple[str, ...] = ()
    imported: bool = False
