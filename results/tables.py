"""The paper's tables with our results: pure functions of results, specs and the paper's numbers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from results.cells import Cell, choose_best_cell
from results.collect import CollectedResults, describe_row
from results.margins import Margin, compute_margins
from results.runs import group_by
from results.schema import Result
from results.spec import Column, PaperRow, TableSpec, load_table_spec
from results.vocabulary import load_vocabulary

UNMATCHED_TITLE = "Ours, without a counterpart in the paper"

# Imported or ours, and the settings of the pretraining that differ from the recipe.
PretrainingKey = tuple[bool, tuple[str, ...]]

_without_variant = attrgetter("row.method", "row.arch", "row.epochs", "row.dataset", "imported")
_unmatched_key = attrgetter("row.dataset", "row.arch", "row.method", "row.epochs", "variant")


@dataclass(frozen=True)
class OurRow:
    """A row of our results: what tells it from our other rows, and its cells by column."""

    label: str
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Entry:
    """A row that the paper prints with our rows below it, or our rows alone."""

    # Labels as they are shown.
    group: str
    method: str
    arch: str
    epochs: str
    ours: tuple[OurRow, ...]
    # The paper's numbers and our notes about them, by column.
    paper: dict[str, float]
    notes: dict[str, str]
    # Whether a row of ours is shown even if it has no result yet.
    comparable: bool
    # Whether the paper has this row.
    printed: bool = True

    @property
    def slots(self) -> set[str]:
        """Columns in which the paper prints a number, or about which there is a note."""
        return self.paper.keys() | self.notes.keys()

    def words(self) -> str:
        """Return the row in words, as footnotes name it."""
        epochs = f", {self.epochs} epochs" if self.epochs else ""
        return f"{self.method} {self.arch}{epochs}"


@dataclass(frozen=True)
class OurCell:
    """A cell of ours and its place; `column` is the title of its column, `key` its name."""

    entry: Entry
    ours: OurRow
    key: str
    column: str
    cell: Cell

    @property
    def row(self) -> str:
        """Its row in words: `Mugs ViT-S/16, 3200 epochs, ours`."""
        return f"{self.entry.words()}, {self.ours.label}"

    @property
    def paper(self) -> float | None:
        """The printed number it is compared with."""
        return self.entry.paper.get(self.key)

    @property
    def difference(self) -> float | None:
        """Our value minus the paper's."""
        return None if self.paper is None else self.cell.value - self.paper


@dataclass(frozen=True)
class Block:
    """Entries under common columns (key -> title)."""

    title: str
    columns: dict[str, str]
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Table:
    """A table of the paper with our results."""

    name: str
    title: str
    # The rows of the paper, and our results without a counterpart in it.
    printed: Block
    unmatched: Block
    # Leads over other methods that the text prints.
    margins: tuple[Margin, ...]
    notes: tuple[str, ...]
    # Every result that the table shows; what is in no table is reported.
    used: frozenset[Result]

    def our_cells(self) -> Iterator[OurCell]:
        """Return every cell of ours, those in rows of the paper first."""
        for block in (self.printed, self.unmatched):
            for entry in block.entries:
                for ours in entry.ours:
                    for key, cell in ours.cells.items():
                        yield OurCell(entry, ours, key, block.columns[key], cell)

    def count_comparisons(self) -> int:
        """Return how many cells of ours have a printed number, with which verdicts compare them."""
        return sum(ours.paper is not None for ours in self.our_cells())


def build_table(name: str, results: Iterable[Result]) -> Table:
    """Return a table filled with results.

    Raises:
        ValueError: there is no such table.
        RowsError: two results claim the same cell.
    """
    spec = load_table_spec(name)
    wanted = [result for result in results if any(column.takes(result) for column in spec.columns)]
    printed, used = _fill_printed(spec, wanted)
    # Where a row of the paper has several rows of ours, leads are those of the first one.
    means = {
        (index, key): cell.value
        for index, entry in enumerate(printed.entries)
        for ours in entry.ours[:1]
        for key, cell in ours.cells.items()
    }
    # A result stands once in a table: what filled a row of the paper is not repeated below.
    rest = [result for result in wanted if result not in used]
    unmatched, shown = _collect_unmatched(spec, rest)
    return Table(
        name=name,
        title=spec.title,
        printed=printed,
        unmatched=unmatched,
        margins=tuple(compute_margins(name, spec.paper, means)),
        notes=spec.notes,
        used=frozenset(used | shown),
    )


def _fill_printed(spec: TableSpec, results: Sequence[Result]) -> tuple[Block, set[Result]]:
    """Return the paper's rows with ours, and the results shown."""
    vocabulary = load_vocabulary()
    by_pretraining: dict[tuple[object, ...], list[Result]] = group_by(
        results,
        lambda result: (
            vocabulary.method_title(result.row.method),
            result.row.arch,
            result.row.epochs,
            result.variant,
        ),
    )
    entries = []
    used: set[Result] = set()
    for paper in spec.paper:
        key = (base_method(paper.method), paper.arch, paper.pretrain_epochs, paper.variant)
        mine = by_pretraining.get(key, [])
        by_column = {
            column: [r for r in mine if column.takes(r) and r.row.dataset == column.dataset]
            for column in spec.columns
        }
        used |= {result for found in by_column.values() for result in found}
        ours = build_our_rows(by_column)
        entries.append(
            Entry(
                group=paper.group,
                method=paper.method,
                arch=vocabulary.arch_title(paper.arch),
                epochs=paper.epochs,
                ours=ours,
                paper=paper.values,
                notes=paper.notes,
                # Other methods get a row of ours only if we have run them, and so does a
                # pretraining of MGC that no recipe of ours is.
                comparable=bool(ours) or _is_own(paper),
            )
        )
    columns = {column.key: column.title for column in spec.columns}
    return Block(spec.title, columns, tuple(entries)), used


def base_method(method: str) -> str:
    """Return `Mugs` for `Mugs w/o IDS`, `iBOT` for `iBOT (re-run)`."""
    return method.split(" w/o ")[0].removesuffix(" (re-run)")


def _is_own(paper: PaperRow) -> bool:
    method = base_method(paper.method)
    return method == "Mugs" or (method == "MGC" and paper.pretrain_epochs is not None)


def build_our_rows(by_column: dict[Column, list[Result]]) -> tuple[OurRow, ...]:
    """Return a row per pretraining, and more where one was evaluated with several settings.

    Our own pretraining comes before imported weights, fewer differing settings before more. Nothing
    is left out.
    """
    keys = {_pretraining_key(result) for found in by_column.values() for result in found}
    rows = []
    for key in sorted(keys, key=lambda key: (key[0], len(key[1]), key[1])):
        cells = {
            column.key: _alternative_cells(found, key, column)
            for column, found in by_column.items()
        }
        # Row `rank` has the alternative number `rank` of each column, as far as it has so many.
        for rank in range(max(map(len, cells.values()))):
            here = {name: found[rank] for name, found in cells.items() if rank < len(found)}
            rows.append(OurRow(_label(key, rank), here))
    return tuple(rows)


def _pretraining_key(result: Result) -> PretrainingKey:
    """Return what tells pretrainings apart: imported or ours, and the settings that differ.

    Differing settings of the evaluation itself begin with its stage and are left out.
    """
    evaluation = f"{result.row.stage}."
    return result.imported, tuple(x for x in result.differs if not x.startswith(evaluation))


def _alternative_cells(
    results: Sequence[Result], pretraining: PretrainingKey, column: Column
) -> list[Cell]:
    """Return one cell per set of differing settings of a pretraining, the smallest set first."""
    mine = [result for result in results if _pretraining_key(result) == pretraining]
    groups: dict[tuple[str, ...], list[Result]] = group_by(mine, attrgetter("differs"))
    return [
        choose_best_cell(groups[differs], column.also_report, column.fixed_setting)
        for differs in sorted(groups, key=lambda differs: (len(differs), differs))
    ]


def _label(key: PretrainingKey, rank: int) -> str:
    imported, differs = key
    parts = ["imported weights"] if imported else []
    if len(differs) == 1:
        parts.append(differs[0].split(" (recipe")[0])
    elif differs:
        parts.append(f"{len(differs)} settings differ")
    if rank:
        number = f" {rank}" if rank > 1 else ""
        parts.append(f"other evaluation settings{number}")
    return f"ours ({', '.join(parts)})" if parts else "ours"


def _collect_unmatched(spec: TableSpec, results: Sequence[Result]) -> tuple[Block, set[Result]]:
    """Return our rows without a counterpart in the paper, by data set, and the results shown."""
    # Columns that differ in the data set only are one column here, since a row names its data set.
    columns = [
        column
        for index, column in enumerate(spec.columns)
        if column.kind not in [earlier.kind for earlier in spec.columns[:index]]
    ]

    shown = [result for result in results if spec.shows(result)]
    if spec.variants and "*" not in spec.variants:
        # A table about variants shows the main experiment only beside a variant of it.
        varied = {_without_variant(result) for result in shown if result.variant}
        shown = [result for result in shown if _without_variant(result) in varied]

    entries = []
    for _, group in groupby(sorted(shown, key=_unmatched_key), _unmatched_key):
        mine = list(group)
        by_column = {column: [r for r in mine if column.takes(r)] for column in columns}
        entries.append(_unmatched_entry(mine[0], build_our_rows(by_column)))
    titles = {column.key: column.title_unmatched or column.title for column in columns}
    return Block(UNMATCHED_TITLE, titles, tuple(entries)), set(shown)


def _unmatched_entry(result: Result, ours: tuple[OurRow, ...]) -> Entry:
    row = result.row
    vocabulary = load_vocabulary()
    group = vocabulary.dataset_title(row.dataset)
    if not vocabulary.knows_dataset(row.dataset):
        group = f"{row.dataset} (unknown data set)"
    elif row.dataset.startswith("sklearn_"):
        group += ": compares with nothing in the paper"
    method = vocabulary.method_title(row.method)
    # Not pretrained: the epochs in such a row are those of the pretraining it is compared with.
    untrained = row.method.endswith(("(initialisation)", "(scratch)"))
    return Entry(
        group=group,
        method=f"{method} {result.variant}" if result.variant else method,
        arch=vocabulary.arch_title(row.arch),
        epochs="0" if untrained else str(row.epochs),
        ours=ours,
        paper={},
        notes={},
        comparable=True,
        printed=False,
    )


def build_tables(results: Sequence[Result], names: Iterable[str]) -> list[Table]:
    """Return several tables."""
    return [build_table(name, results) for name in names]


def describe_unplaced(collection: CollectedResults, tables: Iterable[Table]) -> list[str]:
    """Return a line for each unknown name, and for each result missing in the tables."""
    lines = [f"in no table of the paper: {line}" for line in collection.unknown]
    told = {line.partition(": unknown")[0] for line in collection.unknown}
    shown = list(tables)
    columns = [column for table in shown for column in load_table_spec(table.name).columns]
    for result in find_unplaced(shown, collection.results):
        # Losses and the like are results that no table has a column for; they are not missed.
        if result.where not in told and any(column.takes(result) for column in columns):
            words = describe_row(result.row) + (f" ({result.variant})" if result.variant else "")
            lines.append(f"in no table of the paper: {result.where}: {words}")
    return lines


def find_unplaced(tables: Iterable[Table], results: Iterable[Result]) -> list[Result]:
    """Return the results that none of the tables shows."""
    used = frozenset[Result]().union(*(table.used for table in tables))
    return [result for result in results if result not in used]
