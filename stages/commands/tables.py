"""What `tables` answers: tables, the origin of a cell, a comparison, or files."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.spec import StageRun
from results import compare, publish, render, spec
from results.collect import Collection
from results.explain import explain
from results.render import Format
from results.tables import build_all, left_over
from stages.commands.results import collected, rivals


@dataclass(frozen=True)
class Wanted:
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
        return self.tables or spec.names()


def answer(
    root: Path, runs: Sequence[StageRun] | None, wanted: Wanted, *, warn: Callable[[str], None]
) -> Iterable[str]:
    """Texts to print, about the given runs or all that are done. Raises RowsError where rows are refused."""
    collection = collected(root, runs).checked()
    if wanted.publish is not None:
        return map(str, publish.publish(collection, wanted.publish))
    if wanted.explain is not None:
        return [explain(collection, *wanted.explain).removesuffix("\n")]
    if wanted.against is not None:
        theirs = rivals(wanted.against, runs).checked()
        pairs = compare.compare(collection.results, theirs.results, wanted.names)
        return [render.laid_text(compare.laid(pairs), wanted.format)]
    return _tables(collection, wanted, warn)


def _tables(collection: Collection, wanted: Wanted, warn: Callable[[str], None]) -> Iterator[str]:
    built = build_all(collection.results, wanted.names)
    for line in left_over(collection, () if wanted.tables else built):
        warn(line)
    shown = [table for table in built if table.used or not wanted.filled]
    if not shown:
        warn("no table has a number of ours")
        return
    if wanted.out is None:
        yield "\n".join(render.to_text(table, wanted.format) for table in shown)
    else:
        yield from (f"{file}: {path}" for file, path in render.write_all(shown, wanted.out).items())
