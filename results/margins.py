"""Leads that the paper's text prints ("+0.4"), beside what its own tables give and what ours gives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from results import resources
from results.spec import PaperRow


@dataclass(frozen=True)
class Margin:
    """A lead in points. `computed` is from the paper's table, `ours` from our cell over the other's printed one.

    A claim about several pairs is about the least of them.
    """

    claim: str
    column: str
    printed: float | None
    computed: float
    ours: float | None
    note: str

    @property
    def consistent(self) -> bool:
        """Whether the text agrees with the table, at the one decimal both print."""
        return self.printed is None or round(self.computed, 1) == self.printed


def compute_margins(
    table: str, lines: Sequence[PaperRow], ours: Mapping[tuple[int, str], float]
) -> list[Margin]:
    """The leads printed about a table; `ours` has the mean of our cell by index of its line, and column."""
    found: dict[tuple[str, str], Margin] = {}
    for record in resources.read_csv("paper", "margins.csv"):
        if record["table"] == table:
            gap = _gap(record, lines, ours)
            other = found.get((gap.claim, gap.column))
            found[gap.claim, gap.column] = gap if other is None else _least(other, gap)
    return list(found.values())


def _gap(
    record: Mapping[str, str], lines: Sequence[PaperRow], ours: Mapping[tuple[int, str], float]
) -> Margin:
    column = record["column"]
    index = _find(lines, record, record["group"], record["method"])
    over = lines[_find(lines, record, record["over_group"], record["over_method"])].values[column]
    mine = ours.get((index, column))
    return Margin(
        claim=record["claim"],
        column=column,
        printed=float(record["printed"]) if record["printed"] else None,
        computed=lines[index].values[column] - over,
        ours=None if mine is None else mine - over,
        note=record["note"],
    )


def _find(lines: Sequence[PaperRow], record: Mapping[str, str], group: str, method: str) -> int:
    """Index of the one line of a group, method and architecture, and of the same epochs where there are several."""
    key = (group, method, record["arch"])
    found = [i for i, line in enumerate(lines) if (line.group, line.method, line.arch) == key]
    found = found if len(found) == 1 else [i for i in found if lines[i].epochs == record["epochs"]]
    if len(found) != 1:
        raise ValueError(
            f"margins.csv: {record['claim']!r}: {len(found)} lines are {method} in {group!r}, expected one"
        )
    return found[0]


def _least(first: Margin, second: Margin) -> Margin:
    ours = None if first.ours is None or second.ours is None else min(first.ours, second.ours)
    return replace(first, computed=min(first.computed, second.computed), ours=ours)
