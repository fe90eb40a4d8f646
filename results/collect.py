"""From the files of a run root to results: every row read, checked, and told apart by what was run."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from results.checks import find_unknown_names
from results.runs import FinishedRun, iter_with_upstream
from results.schema import Result, ResultRow
from results.store import RowsError, read_results
from results.variants import NO_RECORD, ReferenceReproduction, describe_variant, find_deviations


@dataclass(frozen=True)
class CollectedResults:
    """Results of a run root. `problems`: what was refused; `unknown`: what no table knows; a line each, file first."""

    results: tuple[Result, ...]
    runs: Mapping[str, FinishedRun] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    references: tuple[ReferenceReproduction, ...] = ()

    def require_valid(self) -> "CollectedResults":
        """Itself. Raises RowsError when anything was refused."""
        if self.problems:
            raise RowsError("\n".join(self.problems))
        return self


def collect_results(
    root: Path, runs: Sequence[FinishedRun], references: Iterable[ReferenceReproduction] = ()
) -> CollectedResults:
    """Every row of the given finished runs, in the order of their files."""
    results: list[Result] = []
    problems: list[str] = []
    known = {run.run_id: run for run in runs}
    recipes = tuple(references)
    for run in sorted(runs, key=lambda run: run.rows or ""):
        if run.rows:
            found, wrong = read_results(root / run.rows, run.rows, sha256=run.rows_sha256)
            results += [
                annotate_result(result, known, recipes)
                for result in found
                if result.row.run_id == run.run_id
            ]
            problems += wrong + [
                f"{result.where}: row of run {result.row.run_id} in the file of run {run.run_id}"
                for result in found
                if result.row.run_id != run.run_id
            ]
    kept, conflicts = separate_conflicts(results)
    return CollectedResults(
        kept, known, (*problems, *conflicts), describe_unknown_names(kept), recipes
    )


def annotate_result(
    result: Result,
    runs: Mapping[str, FinishedRun],
    references: Sequence[ReferenceReproduction] = (),
) -> Result:
    """The result with what its run and those it needs say of it."""
    row = result.row
    if row.run_id not in runs:
        return replace(result, differs=(NO_RECORD,))
    upstream = list(iter_with_upstream(row.run_id, runs))
    pretraining = next((run for run in upstream if run.stage == "pretrain"), None)
    imported = pretraining is None and any(run.stage == "import" for run in upstream)
    return replace(
        result,
        variant="" if pretraining is None else describe_variant(pretraining.config, row.arch),
        differs=find_deviations(row, runs, references),
        imported=imported,
    )


def result_key(result: Result) -> tuple[object, ...]:
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


def separate_conflicts(results: Sequence[Result]) -> tuple[tuple[Result, ...], tuple[str, ...]]:
    """Results whose identity no other claims, and a line per claim of several: never a silent pick."""
    claims: dict[tuple[object, ...], list[Result]] = defaultdict(list)
    for result in results:
        claims[result_key(result)].append(result)
    kept = tuple(result for result in results if len(claims[result_key(result)]) == 1)
    return kept, tuple(_conflict(rivals) for rivals in claims.values() if len(rivals) > 1)


def _conflict(rivals: Sequence[Result]) -> str:
    row = rivals[0].row
    claims = "; ".join(f"{r.where}: {r.row.value:g} of run {r.row.run_id}" for r in rivals)
    what = "the same row twice" if len({r.row for r in rivals}) == 1 else "rows that claim one cell"
    return f"{claims}: {what}, {describe_row(row)}"


def describe_row(row: ResultRow) -> str:
    """What a row is about, in words."""
    return (
        f"{row.metric} of {row.method} {row.arch}, {row.epochs} epochs, {row.stage} on {row.dataset}, "
        f"setting {row.setting!r}, seed {row.seed}"
    )


def describe_unknown_names(results: Iterable[Result]) -> tuple[str, ...]:
    """A line per result that no table can have a place for."""
    found = ((result, find_unknown_names(result.row)) for result in results)
    return tuple(
        f"{result.where}: unknown {' and '.join(names)}" for result, names in found if names
    )
