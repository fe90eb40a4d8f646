"""From the files of a run root to results: every row read, checked, and told apart by what was run."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from results.checks import unknown_in
from results.runs import Run, chain
from results.schema import Result, ResultRow
from results.store import RowsError, read_results
from results.variants import NO_RECORD, Reference, deviations, variant


@dataclass(frozen=True)
class Collection:
    """Results of a run root. `problems`: what was refused; `unknown`: what no table knows; a line each, file first."""

    results: tuple[Result, ...]
    runs: Mapping[str, Run] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    references: tuple[Reference, ...] = ()

    def checked(self) -> "Collection":
        """Itself. Raises RowsError when anything was refused."""
        if self.problems:
            raise RowsError("\n".join(self.problems))
        return self


def collect(root: Path, runs: Sequence[Run], references: Iterable[Reference] = ()) -> Collection:
    """Every row of the given finished runs, in the order of their files."""
    results: list[Result] = []
    problems: list[str] = []
    known = {run.run_id: run for run in runs}
    recipes = tuple(references)
    for run in sorted(runs, key=lambda run: run.rows or ""):
        if run.rows:
            found, wrong = read_results(root / run.rows, run.rows, sha256=run.rows_sha256)
            results += [
                describe(result, known, recipes)
                for result in found
                if result.row.run_id == run.run_id
            ]
            problems += wrong + [
                f"{result.where}: row of run {result.row.run_id} in the file of run {run.run_id}"
                for result in found
                if result.row.run_id != run.run_id
            ]
    kept, conflicts = conflict_free(results)
    return Collection(kept, known, (*problems, *conflicts), unknown(kept), recipes)


def describe(
    result: Result, runs: Mapping[str, Run], references: Sequence[Reference] = ()
) -> Result:
    """The result with what its run and those it needs say of it."""
    row = result.row
    if row.run_id not in runs:
        return replace(result, differs=(NO_RECORD,))
    upstream = list(chain(row.run_id, runs))
    pretraining = next((run for run in upstream if run.stage == "pretrain"), None)
    imported = pretraining is None and any(run.stage == "import" for run in upstream)
    return replace(
        result,
        variant="" if pretraining is None else variant(pretraining.config, row.arch),
        differs=deviations(row, runs, references),
        imported=imported,
    )


def identity(result: Result) -> tuple[object, ...]:
    """What may be there once: everything but value, unit and run."""
    row = result.row
    of_row = (
        row.method,
        row.arch,
        row.epochs,
        row.stage,
        row.dataset,
        row.setting,
        row.metric,
        row.seed,
    )
    return (*of_row, result.variant, result.differs, result.imported)


def conflict_free(results: Sequence[Result]) -> tuple[tuple[Result, ...], tuple[str, ...]]:
    """Results whose identity no other claims, and a line per claim of several: never a silent pick."""
    claims: dict[tuple[object, ...], list[Result]] = defaultdict(list)
    for result in results:
        claims[identity(result)].append(result)
    kept = tuple(result for result in results if len(claims[identity(result)]) == 1)
    return kept, tuple(_conflict(rivals) for rivals in claims.values() if len(rivals) > 1)


def _conflict(rivals: Sequence[Result]) -> str:
    row = rivals[0].row
    claims = "; ".join(f"{r.where}: {r.row.value:g} of run {r.row.run_id}" for r in rivals)
    what = "the same row twice" if len({r.row for r in rivals}) == 1 else "rows that claim one cell"
    return f"{claims}: {what}, {words(row)}"


def words(row: ResultRow) -> str:
    """What a row is about, in words."""
    return (
        f"{row.metric} of {row.method} {row.arch}, {row.epochs} epochs, {row.stage} on {row.dataset}, "
        f"setting {row.setting!r}, seed {row.seed}"
    )


def unknown(results: Iterable[Result]) -> tuple[str, ...]:
    """A line per result that no table can have a place for."""
    found = ((result, unknown_in(result.row)) for result in results)
    return tuple(
        f"{result.where}: unknown {' and '.join(names)}" for result, names in found if names
    )
