"""The paper's tables, ours beside the paper's: pure functions of results, specs and the paper's numbers."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from results.cells import Cell, choose_best_cell
from results.collect import CollectedResults, describe_row
from results.margins import Margin, compute_margins
from results.schema import Result
from results.spec import Column, PaperRow, TableSpec, load_table_spec
from results.vocabulary import load_vocabulary


@dataclass(frozen=True)
class OurRow:
    """A line of ours: what sets it apart from other lines of ours, and its cells by column."""

    label: str
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Entry:
    """A printed line with ours below it, or a line of ours alone (not `printed`).

    `comparable`: whether a line of ours is shown even without a number.
    """

    group: str
    method: str
    arch: str
    epochs: str
    ours: tuple[OurRow, ...]
    paper: dict[str, float]
    notes: dict[str, str]
    comparable: bool
    printed: bool = True

    @property
    def slots(self) -> set[str]:
        """Columns in which the paper prints a number, or something there is a note about."""
        return self.paper.keys() | self.notes.keys()

    def words(self) -> str:
        """The line in words, as footnotes name it."""
        epochs = f", {self.epochs} epochs" if self.epochs else ""
        return f"{self.method} {self.arch}{epochs}"


@dataclass(frozen=True)
class OurCell:
    """A cell of ours and where it stands; `column` is the title of the column, `key` its name."""

    entry: Entry
    ours: OurRow
    key: str
    column: str
    cell: Cell

    @property
    def line(self) -> str:
        """Its line in words: `Mugs ViT-S/16, 3200 epochs, ours`."""
        return f"{self.entry.words()}, {self.ours.label}"

    @property
    def paper(self) -> float | None:
        """The printed number it is compared with."""
        return self.entry.paper.get(self.key)

    @property
    def difference(self) -> float | None:
        """Ours less the paper's."""
        return None if self.paper is None else self.cell.value - self.paper


@dataclass(frozen=True)
class Block:
    """Entries under common columns (key -> title)."""

    title: str
    columns: dict[str, str]
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Table:
    """The printed table with ours, what ours has that the paper has not, the leads, and general notes."""

    name: str
    title: str
    printed: Block
    unmatched: Block
    margins: tuple[Margin, ...]
    notes: tuple[str, ...]
    used: frozenset[Result]

    def our_cells(self) -> Iterator[OurCell]:
        """Every cell of ours, those on lines of the paper first."""
        for block in (self.printed, self.unmatched):
            for entry in block.entries:
                for ours in entry.ours:
                    for key, cell in ours.cells.items():
                        yield OurCell(entry, ours, key, block.columns[key], cell)


def build_table(name: str, results: Iterable[Result]) -> Table:
    """A table of results. Raises ValueError for an unknown table, RowsError where two results claim one cell."""
    spec = load_table_spec(name)
    wanted = [result for result in results if any(column.takes(result) for column in spec.columns)]
    printed, means, used = _printed(spec, wanted)
    unmatched, shown = _unmatched(spec, [result for result in wanted if result not in used])
    found = compute_margins(name, spec.paper, means)
    return Table(
        name, spec.title, printed, unmatched, tuple(found), spec.notes, frozenset(used | shown)
    )


def _printed(
    spec: TableSpec, results: Sequence[Result]
) -> tuple[Block, dict[tuple[int, str], float], set[Result]]:
    """The paper's lines with ours, the means of the first line of ours of each, and the results these took."""
    entries, used = [], set()
    means: dict[tuple[int, str], float] = {}
    by_line: dict[tuple[object, ...], list[Result]] = defaultdict(list)
    for result in results:
        row = result.row
        by_line[
            load_vocabulary().method_title(row.method), row.arch, row.epochs, result.variant
        ].append(result)
    for index, line in enumerate(spec.paper):
        mine = by_line[base_method(line.method), line.arch, line.pretrain_epochs, line.variant]
        by_column = {
            c: [r for r in mine if c.takes(r) and r.row.dataset == c.dataset] for c in spec.columns
        }
        used |= {result for found in by_column.values() for result in found}
        ours = build_our_rows(by_column)
        if ours:
            means |= {(index, key): cell.value for key, cell in ours[0].cells.items()}
        entries.append(_entry(line, ours))
    columns = {column.key: column.title for column in spec.columns}
    return Block(spec.title, columns, tuple(entries)), means, used


def base_method(method: str) -> str:
    """`Mugs` for `Mugs w/o IDS`, `iBOT` for `iBOT (re-run)`."""
    return method.split(" w/o ")[0].removesuffix(" (re-run)")


def _entry(line: PaperRow, ours: tuple[OurRow, ...]) -> Entry:
    arch = load_vocabulary().arch_title(line.arch)
    comparable = bool(ours) or base_method(line.method) == "Mugs"
    return Entry(
        line.group, line.method, arch, line.epochs, ours, line.values, line.notes, comparable
    )


def build_our_rows(by_column: dict[Column, list[Result]]) -> tuple[OurRow, ...]:
    """Lines of ours: one per pretraining, and further ones where an evaluation was done with several settings.

    Our own pretraining comes before imported weights, fewer differing settings before more; nothing is left out.
    """
    keys = {_pretraining(result) for found in by_column.values() for result in found}
    lines = []
    for key in sorted(keys, key=lambda key: (key[0], len(key[1]), key[1])):
        cells: dict[str, list[Cell]] = {}
        for column, found in by_column.items():
            cells[column.key] = _alternatives([r for r in found if _pretraining(r) == key], column)
        for rank in range(max(map(len, cells.values()))):
            here = {key: found[rank] for key, found in cells.items() if rank < len(found)}
            lines.append(OurRow(_label(key, rank), here))
    return tuple(lines)


def _pretraining(result: Result) -> tuple[bool, tuple[str, ...]]:
    return result.imported, tuple(
        line for line in result.differs if not line.startswith(f"{result.row.stage}.")
    )


def _alternatives(results: Sequence[Result], column: Column) -> list[Cell]:
    """One cell per set of differing settings, the smallest set first."""
    groups: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.differs].append(result)
    cells = (
        choose_best_cell(groups[key], column.also_report)
        for key in sorted(groups, key=lambda key: (len(key), key))
    )
    return [cell for cell in cells if cell is not None]


def _label(key: tuple[bool, tuple[str, ...]], rank: int) -> str:
    imported, differs = key
    parts = ["imported weights"] if imported else []
    if differs:
        parts.append(
            differs[0].split(" (recipe")[0]
            if len(differs) == 1
            else f"{len(differs)} settings differ"
        )
    if rank:
        parts.append(
            "other evaluation settings" if rank == 1 else f"other evaluation settings {rank}"
        )
    return f"ours ({', '.join(parts)})" if parts else "ours"


def _unmatched(spec: TableSpec, results: Sequence[Result]) -> tuple[Block, set[Result]]:
    """Lines of ours that have no counterpart in the paper, by data set, and the results these took."""
    kinds: dict[tuple[object, ...], Column] = {}
    for column in spec.columns:
        kinds.setdefault(column.kind, column)
    columns = list(kinds.values())
    shown = [result for result in results if spec.shows(result)]
    if spec.variants and "*" not in spec.variants:
        varied = {_same_but_variant(result) for result in shown if result.variant}
        shown = [result for result in shown if _same_but_variant(result) in varied]
    entries = []
    for key in sorted({_line_key(result) for result in shown}):
        mine = [result for result in shown if _line_key(result) == key]
        ours = build_our_rows({column: [r for r in mine if column.takes(r)] for column in columns})
        entries.append(_own_entry(mine[0], ours))
    titles = {column.key: column.title_unmatched or column.title for column in columns}
    return Block("Ours, without a counterpart in the paper", titles, tuple(entries)), set(shown)


def _same_but_variant(result: Result) -> tuple[object, ...]:
    row = result.row
    return row.method, row.arch, row.epochs, row.dataset, result.imported


def _line_key(result: Result) -> tuple[str, str, str, int, str]:
    row = result.row
    return row.dataset, row.arch, row.method, row.epochs, result.variant


def _own_entry(result: Result, ours: tuple[OurRow, ...]) -> Entry:
    row, known = result.row, load_vocabulary()
    group = known.dataset_title(row.dataset)
    if not known.knows_dataset(row.dataset):
        group = f"{row.dataset} (unknown data set)"
    elif row.dataset.startswith("sklearn_"):
        group += ": compares with nothing in the paper"
    method = known.method_title(row.method) + (f" {result.variant}" if result.variant else "")
    epochs = 0 if row.method.endswith(("(initialisation)", "(scratch)")) else row.epochs
    return Entry(
        group, method, known.arch_title(row.arch), str(epochs), ours, {}, {}, True, printed=False
    )


def build_tables(results: Sequence[Result], names: Iterable[str]) -> list[Table]:
    """Several tables."""
    return [build_table(name, results) for name in names]


def describe_unplaced(collection: CollectedResults, tables: Iterable[Table]) -> list[str]:
    """A line for each name that no table knows, and each result of a column's kind that none of the tables shows."""
    lines = [f"in no table of the paper: {line}" for line in collection.unknown]
    told = {line.partition(": unknown")[0] for line in collection.unknown}
    shown = list(tables)
    columns = [column for table in shown for column in load_table_spec(table.name).columns]
    for result in find_unplaced(shown, collection.results):
        if result.where not in told and any(column.takes(result) for column in columns):
            kind = f" ({result.variant})" if result.variant else ""
            lines.append(
                f"in no table of the paper: {result.where}: {describe_row(result.row)}{kind}"
            )
    return lines


def find_unplaced(tables: Iterable[Table], results: Iterable[Result]) -> list[Result]:
    """Results that none of the tables shows."""
    used = frozenset[Result]().union(*(table.used for table in tables))
    return [result for result in results if result not in used]
