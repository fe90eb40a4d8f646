"""The row in which a result is stored: one number, one row."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ResultRow:
    """A result; the fields are the columns of the CSV files, in this order."""

    run_id: str  # of the evaluation
    method: (
        str  # "mugs", "dino"; with "(initialisation)" or "(scratch)" for a network not pretrained
    )
    arch: str
    epochs: int  # of the pretraining, real ones
    stage: str  # the kind of evaluation
    dataset: str
    # What tells rows of one metric apart, in parts: "cls, k=20, T=0.07", "best epoch".
    setting: str
    metric: str
    value: float
    unit: str
    # Rows that differ in seed only become one cell: their mean and standard deviation.
    seed: int


@dataclass(frozen=True)
class Result:
    """A row, where it was read, and what the row does not say about its pretraining."""

    row: ResultRow
    # File and line, for messages.
    where: str = "a row"
    # The name of an experiment of its own: "w/o instance supervision". Empty for the main one.
    variant: str = ""
    # Settings in which the same experiment deviates from the released recipe.
    differs: tuple[str, ...] = ()
    # The weights were imported instead of pretrained here.
    imported: bool = False
    # Sampling error that the run estimated from its results per image or video.
    standard_error: float | None = None
    # Its run, or one that it needs, went on with other code or packages after an interruption.
    mixed_code: bool = False
