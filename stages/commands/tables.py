"""What `tables` answers: tables, the origin of a cell, a comparison, or files."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.spec import StageRun
from results import compare, publish, render, spec
from results.collect import CollectedResults
from results.explain import explain_cell
from results.render import Format
from results.tables import build_tables, describe_unplaced
from stages.commands.finished_results import collect_finished, load_comparison


@dataclass(frozen=True)
class TablesRequest:
    """Options of the command; at most one of the last four is given."""

    tables: Sequence[str] = ()
    format: Format = "md"
    filled: bool = False
    out: Path | None = None
    explain: tuple[str, str, str] | None = None
    against: Path | None = None
    publish: Path | None = None

    @property
    def names(self) -> Sequence[str]:
        """The chosen tables, all when none is."""
        return self.tables or spec.table_names()


def run(
    root: Path,
    runs: Sequence[StageRun] | None,
    wanted: TablesRequest,
    *,
    warn: Callable[[str], None],
) -> Iterable[str]:
    """Texts to print, about the given runs or all that are done. Raises RowsError where rows are refused."""
    collection = collect_finished(root, runs).require_valid()
    if wanted.publish is not None:
        return map(str, publish.publish_results(collection, wanted.publish))
    if wanted.explain is not None:
        return [explain_cell(collection, *wanted.explain).removesuffix("\n")]
    if wanted.against is not None:
        theirs = load_comparison(wanted.against, runs).require_valid()
        pairs = compare.compare_cells(collection.results, theirs.results, wanted.names)
        return [render.render_formatted(compare.format_comparison(pairs), wanted.format)]
    return _tables(collection, wanted, warn)


def _tables(
    collection: CollectedResults, wanted: TablesRequest, warn: Callable[[str], None]
) -> Iterator[str]:
    built = build_tables(collection.results, wanted.names)
    for line in describe_unplaced(collection, () if wanted.tables else built):
        warn(line)
    shown = [table for table in built if table.used or not wanted.filled]
    if not shown:
        warn("no table has a number of ours")
        return
    if wanted.out is None:
        yield "\n".join(render.render_table(table, wanted.format) for table in shown)
    else:
        yield from (
            f"{file}: {path}" for file, path in render.write_tables(shown, wanted.out).items()
        )
