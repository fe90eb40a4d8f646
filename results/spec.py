"""Specs of the tables (`specs/*.yaml`) and the rows that the paper prints (`paper/*.csv`)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from results import resources
from results.cells import setting_matches
from results.schema import Result


class OptionError(ValueError):
    """Options exclude each other, or one names a table, cell or class that does not exist."""


# Other methods that we pretrain too, so that their printed rows can be filled.
OURS_TOO = ("DINO", "iBOT")

# Columns of the paper's CSV files that tell rows apart, in the order of the fields of `PaperRow`.
ROW_NAMES = ("group", "method", "arch", "params_m", "epochs", "variant")


@dataclass(frozen=True)
class Column:
    """Which results a column takes."""

    key: str
    title: str
    stage: str
    dataset: str
    metric: str
    # Parts of a result's setting must match every pattern of the first and none of the second.
    with_settings: tuple[str, ...] = ()
    without_settings: tuple[str, ...] = ()
    # Settings that a footnote reports besides the best one.
    also_report: tuple[str, ...] = ()
    # The setting fixed in advance, with which verdicts compare the best one; all patterns match it.
    fixed_setting: tuple[str, ...] = ()
    # The title in the part for results without a counterpart in the paper, where each row names its
    # data set: "Fine-tuning" there, "CIFAR-10" here.
    title_unmatched: str = ""

    @property
    def kind(self) -> tuple[object, ...]:
        """What the column measures, on any data set."""
        return self.stage, self.metric, self.with_settings, self.without_settings

    def takes(self, result: Result) -> bool:
        """Return whether a result is of this kind; its data set may be another one."""
        row = result.row
        return (
            (row.stage, row.metric) == (self.stage, self.metric)
            and all(setting_matches(row.setting, pattern) for pattern in self.with_settings)
            and not any(setting_matches(row.setting, pattern) for pattern in self.without_settings)
        )


@dataclass(frozen=True)
class PaperRow:
    """A row of a printed table."""

    group: str
    method: str
    arch: str
    params_m: str  # millions of parameters
    epochs: str  # as the paper prints them
    variant: str
    # Real epochs of the pretraining that fills the row; None if no run of ours can.
    pretrain_epochs: int | None
    values: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TableSpec:
    """A table: columns, the rows that the paper prints, notes, and which other results it shows."""

    name: str
    title: str
    columns: tuple[Column, ...]
    paper: tuple[PaperRow, ...]
    notes: tuple[str, ...] = ()
    # Patterns: results without a counterpart in the paper are shown if their data set, architecture
    # and variant match. `variants` is empty for tables about the main experiment only.
    datasets: tuple[str, ...] = ("*",)
    except_datasets: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    archs: tuple[str, ...] = ("*",)
    except_archs: tuple[str, ...] = ()

    def shows(self, result: Result) -> bool:
        """Return whether a result without a counterpart in the paper has a place in this table."""
        row = result.row
        variants = result.variant.split(", ") if result.variant else []
        return (
            _matches(row.dataset, self.datasets)
            and not _matches(row.dataset, self.except_datasets)
            and _matches(row.arch, self.archs)
            and not _matches(row.arch, self.except_archs)
            # Experiments of the user's own are in parentheses and stand beside the main one.
            and all(name.startswith("(") or _matches(name, self.variants) for name in variants)
        )


_SPEC_ADAPTER = TypeAdapter(TableSpec)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def table_names() -> list[str]:
    """Return the names of the tables that have a spec: table1 ... table10, figure2, mgc_..."""
    names = resources.list_names("specs", ".yaml")
    return sorted((name for name in names if name != "vocabulary"), key=_table_order)


def _table_order(name: str) -> tuple[int, int, str]:
    """Return what sorts tables: by number, those of the paper, its figures, the others by name."""
    kinds = ("table", "figure")
    kind = next((i for i, start in enumerate(kinds) if name.startswith(start)), len(kinds))
    return kind, int(re.sub(r"\D", "", name) or 0), name


@cache
def load_table_spec(name: str) -> TableSpec:
    """Return the spec of a table.

    Raises:
        ValueError: there is no such table.
    """
    if name not in table_names():
        raise ValueError(f"unknown table {name!r} (valid: {', '.join(table_names())})")
    content = resources.read_yaml("specs", f"{name}.yaml")
    paper = _read_paper_rows(content["paper"], content.pop("effective_epochs", 1))
    # Also makes tuples of lists: a column is a key of dicts and must be hashable.
    return _SPEC_ADAPTER.validate_python(content | {"name": name, "paper": paper})


def _read_paper_rows(file: str, effective_epochs: int) -> tuple[PaperRow, ...]:
    """Return the rows of a paper table by group, otherwise in the order of the file.

    A line of the file is one cell, so that a note can stand beside the number it is about.
    """
    rows: dict[tuple[str, ...], PaperRow] = {}
    for cell in resources.read_csv("paper", file):
        names: Any = {name: cell[name] for name in ROW_NAMES}
        ours = _pretrain_epochs(cell, effective_epochs)
        row = rows.setdefault(tuple(names.values()), PaperRow(**names, pretrain_epochs=ours))
        if cell["value"]:
            row.values[cell["column"]] = float(cell["value"])
        if cell["note"]:
            row.notes[cell["column"]] = cell["note"]
    groups = list(dict.fromkeys(row.group for row in rows.values()))
    return tuple(sorted(rows.values(), key=lambda row: groups.index(row.group)))


def _pretrain_epochs(cell: dict[str, str], effective_epochs: int) -> int | None:
    """Return the real epochs of the pretraining that can fill a row of the paper.

    The paper counts effective epochs in some tables: with multi-crop a real epoch counts as
    `effective_epochs` of them.
    """
    if cell["pretrain_epochs"]:
        return int(cell["pretrain_epochs"])
    comparable = cell["method"] in OURS_TOO and cell["epochs"]
    return int(cell["epochs"]) // effective_epochs if comparable else None
