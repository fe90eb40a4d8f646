"""Declarations of the tables (`specs/*.yaml`) and the lines the paper prints (`paper/*.csv`)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from results import resources
from results.cells import setting_matches
from results.schema import Result

NOT_TABLES = ("vocabulary",)
OURS_TOO = ("DINO", "iBOT")
PATTERNS = ("with_settings", "without_settings", "also_report")


@dataclass(frozen=True)
class Column:
    """Which results a column takes.

    A result must match every pattern of `with_settings` and none of `without_settings`. `also_report`
    names settings that a footnote reports besides the best one. `title_unmatched` is the title of the
    column in the part for results without a counterpart in the paper, where a row may be any data set.
    """

    key: str
    title: str
    stage: str
    dataset: str
    metric: str
    with_settings: tuple[str, ...] = ()
    without_settings: tuple[str, ...] = ()
    also_report: tuple[str, ...] = ()
    title_unmatched: str = ""

    @property
    def kind(self) -> tuple[object, ...]:
        """What it measures, whatever the data set."""
        return self.stage, self.metric, self.with_settings, self.without_settings

    def takes(self, result: Result) -> bool:
        """Whether a result is of this kind; its data set may be another."""
        row = result.row
        return (
            (row.stage, row.metric) == (self.stage, self.metric)
            and all(setting_matches(row.setting, pattern) for pattern in self.with_settings)
            and not any(setting_matches(row.setting, pattern) for pattern in self.without_settings)
        )


@dataclass(frozen=True)
class PaperRow:
    """A line of a printed table; `pretrain_epochs` is None where no run of ours can fill it."""

    group: str
    method: str
    arch: str
    params_m: str
    epochs: str
    pretrain_epochs: int | None
    variant: str
    values: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TableSpec:
    """A table: its columns, the rows that the paper prints, and notes.

    The other fields are patterns that say which results without a counterpart in the paper are shown
    too: those of `datasets` but not of `except_datasets`, the same for `archs`, and of the method's
    `variants` (`*` for any).
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    paper: tuple[PaperRow, ...]
    notes: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ("*",)
    except_datasets: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    archs: tuple[str, ...] = ("*",)
    except_archs: tuple[str, ...] = ()

    def shows(self, result: Result) -> bool:
        """Whether a result without a counterpart has a place here, going by data set, architecture and variant."""
        row = result.row
        variants = result.variant.split(", ") if result.variant else []
        return (
            _matches(row.dataset, self.datasets)
            and not _matches(row.dataset, self.except_datasets)
            and _matches(row.arch, self.archs)
            and not _matches(row.arch, self.except_archs)
            and all(_matches(name, self.variants) for name in variants)
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def table_names() -> list[str]:
    """Tables there are specs for: table1 ... table10, figure2."""
    found = [name for name in resources.list_names("specs", ".yaml") if name not in NOT_TABLES]
    return sorted(
        found, key=lambda name: (not name.startswith("table"), int(re.sub(r"\D", "", name)), name)
    )


@cache
def load_table_spec(name: str) -> TableSpec:
    """One table's spec. Raises ValueError for a table that does not exist."""
    if name not in table_names():
        raise ValueError(f"unknown table {name!r} (valid: {', '.join(table_names())})")
    content = resources.read_yaml("specs", f"{name}.yaml")
    columns = tuple(_column(column) for column in content.pop("columns"))
    paper = _paper(content.pop("paper"), content.pop("effective_epochs", 1))
    lists = {key: tuple(value) for key, value in content.items() if key != "title"}
    return TableSpec(name, content["title"], columns, paper, **lists)


def _column(given: dict[str, Any]) -> Column:
    content = dict(given)
    patterns: Any = {key: tuple(content.pop(key, ())) for key in PATTERNS}
    return Column(**content, **patterns)


def _paper(file: str, effective_epochs: int) -> tuple[PaperRow, ...]:
    """Lines by group, otherwise in the order of the file; a line of it is a cell."""
    lines: dict[tuple[str, ...], PaperRow] = {}
    for cell in resources.read_csv("paper", file):
        key = tuple(
            cell[name] for name in ("group", "method", "arch", "params_m", "epochs", "variant")
        )
        if key not in lines:
            group, method, arch, params_m, epochs, variant = key
            ours = _pretrain_epochs(cell, effective_epochs)
            lines[key] = PaperRow(group, method, arch, params_m, epochs, ours, variant)
        if cell["value"]:
            lines[key].values[cell["column"]] = float(cell["value"])
        if cell["note"]:
            lines[key].notes[cell["column"]] = cell["note"]
    groups = list(dict.fromkeys(line.group for line in lines.values()))
    return tuple(sorted(lines.values(), key=lambda line: groups.index(line.group)))


def _pretrain_epochs(cell: dict[str, str], effective_epochs: int) -> int | None:
    if cell["pretrain_epochs"]:
        return int(cell["pretrain_epochs"])
    comparable = cell["method"] in OURS_TOO and cell["epochs"]
    return int(cell["epochs"]) // effective_epochs if comparable else None
