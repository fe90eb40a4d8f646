"""Declarations of the tables (`specs/*.yaml`) and the lines the paper prints (`paper/*.csv`)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from results import resources
from results.cells import has
from results.schema import Result

NOT_TABLES = ("vocabulary",)
OURS_TOO = ("DINO", "iBOT")
PATTERNS = {"with": "parts", "without": "without", "beside": "beside"}


@dataclass(frozen=True)
class Column:
    """Which results a column takes; `parts` and `without` are patterns for parts of the setting.

    `elsewhere` is its title where data sets are lines; `beside` names settings to tell of besides the best.
    """

    key: str
    title: str
    stage: str
    dataset: str
    metric: str
    parts: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    elsewhere: str = ""

    @property
    def kind(self) -> tuple[object, ...]:
        """What it measures, whatever the data set."""
        return self.stage, self.metric, self.parts, self.without

    def takes(self, result: Result) -> bool:
        """Whether a result is of this kind; its data set may be another."""
        row = result.row
        return (
            (row.stage, row.metric) == (self.stage, self.metric)
            and all(has(row.setting, pattern) for pattern in self.parts)
            and not any(has(row.setting, pattern) for pattern in self.without)
        )


@dataclass(frozen=True)
class PaperLine:
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
class Spec:
    """A table. `others` and `not_others`: patterns of data sets whose results it shows without a printed counterpart.

    `vary`: patterns of the variants that it is about (`*`: it shows any). `archs` and `not_archs` limit those too.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    paper: tuple[PaperLine, ...]
    notes: tuple[str, ...] = ()
    others: tuple[str, ...] = ("*",)
    not_others: tuple[str, ...] = ()
    vary: tuple[str, ...] = ()
    archs: tuple[str, ...] = ("*",)
    not_archs: tuple[str, ...] = ()

    def shows(self, result: Result) -> bool:
        """Whether a result without a counterpart has a place here, going by data set, architecture and variant."""
        row = result.row
        variants = result.variant.split(", ") if result.variant else []
        return (
            _matches(row.dataset, self.others)
            and not _matches(row.dataset, self.not_others)
            and _matches(row.arch, self.archs)
            and not _matches(row.arch, self.not_archs)
            and all(_matches(name, self.vary) for name in variants)
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def names() -> list[str]:
    """Tables there are specs for: table1 ... table10, figure2."""
    found = [name for name in resources.names("specs", ".yaml") if name not in NOT_TABLES]
    return sorted(
        found, key=lambda name: (not name.startswith("table"), int(re.sub(r"\D", "", name)), name)
    )


@cache
def load(name: str) -> Spec:
    """One table's spec. Raises ValueError for a table that does not exist."""
    if name not in names():
        raise ValueError(f"unknown table {name!r} (valid: {', '.join(names())})")
    content = resources.read_yaml("specs", f"{name}.yaml")
    columns = tuple(_column(column) for column in content.pop("columns"))
    paper = _paper(content.pop("paper"), content.pop("effective_epochs", 1))
    lists = {key: tuple(value) for key, value in content.items() if key != "title"}
    return Spec(name, content["title"], columns, paper, **lists)


def _column(given: dict[str, Any]) -> Column:
    content = dict(given)
    patterns: Any = {field: tuple(content.pop(key, ())) for key, field in PATTERNS.items()}
    return Column(**content, **patterns)


def _paper(file: str, effective_epochs: int) -> tuple[PaperLine, ...]:
    """Lines by group, otherwise in the order of the file; a line of it is a cell."""
    lines: dict[tuple[str, ...], PaperLine] = {}
    for cell in resources.read_csv("paper", file):
        key = tuple(
            cell[name] for name in ("group", "method", "arch", "params_m", "epochs", "variant")
        )
        if key not in lines:
            group, method, arch, params_m, epochs, variant = key
            ours = _pretrain_epochs(cell, effective_epochs)
            lines[key] = PaperLine(group, method, arch, params_m, epochs, ours, variant)
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
