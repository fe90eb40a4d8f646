"""The command `tables`: print tables, explain a cell, compare two run roots, or write files."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from results import compare, publish, render, spec
from results.collect import CollectedResults
from results.explain import explain_cell
from results.options import check_table_options
from results.render import Format
from results.tables import build_tables, describe_unplaced
from stages.commands.finished_results import collect_finished, load_comparison
from stages.commands.reproduction import Selection


@dataclass(frozen=True, kw_only=True)
class TablesRequest:
    """The options of the command, under their own names."""

    table: Sequence[str] = ()
    format: Format | None = None
    filled: bool = False
    out: Path | None = None
    explain: tuple[str, str, str] | None = None
    against: Path | None = None
    publish: Path | None = None

    def check(self) -> None:
        """Raise OptionError if two options exclude each other or a table does not exist."""
        check_table_options(**vars(self))

    @property
    def tables(self) -> Sequence[str]:
        """Names of the selected tables; all of them if none is selected."""
        return self.table or spec.table_names()

    @property
    def print_format(self) -> Format:
        """Format of what is printed."""
        return self.format or "md"


def run(
    selection: Selection, request: TablesRequest, *, warn: Callable[[str], None]
) -> Iterable[str]:
    """Return the texts to print.

    `warn` gets a line for each result that no table shows.

    Raises:
        RowsError: a result row is damaged, or two rows claim the same cell.
    """
    collection = collect_finished(selection.root, selection.runs).require_valid()
    if request.publish is not None:
        return map(str, publish.publish_results(collection, request.publish))
    if request.explain is not None:
        return [explain_cell(collection, *request.explain).removesuffix("\n")]
    if request.against is not None:
        other = load_comparison(request.against, selection.runs).require_valid()
        pairs = compare.compare_cells(collection.results, other.results, request.tables)
        return [render.render_formatted(compare.format_comparison(pairs), request.print_format)]
    return _print_tables(collection, request, warn)


def _print_tables(
    collection: CollectedResults, request: TablesRequest, warn: Callable[[str], None]
) -> Iterator[str]:
    tables = build_tables(collection.results, request.tables)
    # With a selection of tables, most results are rightly in none of them: only names that no table
    # knows are reported then.
    for line in describe_unplaced(collection, () if request.table else tables):
        warn(line)
    shown = [table for table in tables if table.used or not request.filled]
    if not shown:
        warn("no table has a result of ours")
    elif request.out is None:
        yield "\n".join(render.render_table(table, request.print_format) for table in shown)
    else:
        for file, path in render.write_tables(shown, request.out).items():
            yield f"{file}: {path}"
