"""Leads that the paper's text prints ("+0.4"), beside what its own tables and our results give."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from results import resources
from results.spec import PaperRow


@dataclass(frozen=True)
class Margin:
    """A lead in points; a claim about several pairs of rows is about the smallest lead."""

    claim: str  # where the text says it, and what
    column: str
    printed: float | None  # None if the text gives no number
    computed: float  # from the paper's own table
    # Our cell minus the other method's printed one; None without a result of ours.
    ours: float | None
    note: str

    @property
    def consistent(self) -> bool:
        """Whether the text agrees with the table, at the one decimal that both print."""
        return self.printed is None or round(self.computed, 1) == self.printed


def compute_margins(
    table: str, rows: Sequence[PaperRow], ours: Mapping[tuple[int, str], float]
) -> list[Margin]:
    """Return the leads that the text prints about a table.

    `ours` has the mean of our cell by the index of its row and the column.
    """
    found: dict[tuple[str, str], Margin] = {}
    for record in resources.read_csv("paper", "margins.csv"):
        if record["table"] == table:
            margin = _compute_margin(record, rows, ours)
            # "The least lead over iBOT" has a record for each pair of rows that it is about.
            key = (margin.claim, margin.column)
            found[key] = _smaller(found.get(key, margin), margin)
    return list(found.values())


def _compute_margin(
    record: Mapping[str, str], rows: Sequence[PaperRow], ours: Mapping[tuple[int, str], float]
) -> Margin:
    column = record["column"]
    index = _find_row(rows, record, record["group"], record["method"])
    other = _find_row(rows, record, record["over_group"], record["over_method"])
    over = rows[other].values[column]
    mine = ours.get((index, column))
    return Margin(
        claim=record["claim"],
        column=column,
        printed=float(record["printed"]) if record["printed"] else None,
        computed=rows[index].values[column] - over,
        ours=None if mine is None else mine - over,
        note=record["note"],
    )


def _find_row(rows: Sequence[PaperRow], record: Mapping[str, str], group: str, method: str) -> int:
    """Return the index of the one row of a group, method and architecture.

    Only if several rows fit, the epochs must be those of the record, too.
    """
    key = (group, method, record["arch"])
    found = [i for i, row in enumerate(rows) if (row.group, row.method, row.arch) == key]
    if len(found) != 1:
        found = [i for i in found if rows[i].epochs == record["epochs"]]
    if len(found) != 1:
        raise ValueError(
            f"margins.csv: {record['claim']!r}: {len(found)} rows are {method} in {group!r},"
            " expected one"
        )
    return found[0]


def _smaller(first: Margin, second: Margin) -> Margin:
    ours = None if first.ours is None or second.ours is None else min(first.ours, second.ours)
    return replace(first, computed=min(first.computed, second.computed), ours=ours)
