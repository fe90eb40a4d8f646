"""From the files of a run root to results: every row is read, checked and joined with its run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path

from results.runs import FinishedRun, group_by, iter_with_upstream
from results.schema import Result, ResultRow
from results.store import COLUMNS, RowsError, find_unknown_names, read_results
from results.variants import (
    NO_RECORD,
    ReferenceReproduction,
    describe_variant,
    distinguish_unlike,
    find_deviations,
)


@dataclass(frozen=True)
class CollectedResults:
    """Results of a run root with the runs behind them.

    `problems` are the rows that were refused, `unknown` the rows with a name that no table knows: a
    line each, which begins with the file.
    """

    results: tuple[Result, ...]
    runs: Mapping[str, FinishedRun] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def require_valid(self) -> "CollectedResults":
        """Return itself.

        Raises:
            RowsError: a row was refused. A table without it could show another number unnoticed.
        """
        if self.problems:
            raise RowsError("\n".join(self.problems))
        return self


def collect_results(
    root: Path, runs: Sequence[FinishedRun], references: Sequence[ReferenceReproduction] = ()
) -> CollectedResults:
    """Return every row of the given finished runs, in the order of their files."""
    results: list[Result] = []
    problems: list[str] = []
    known = {run.run_id: run for run in runs}
    # By file, so that messages and footnotes have the same order on every machine.
    for run in sorted(runs, key=lambda run: run.rows or ""):
        if not run.rows:
            continue
        found, refused = read_results(root / run.rows, run.rows, sha256=run.rows_sha256)
        problems += refused
        for result in found:
            # A row with another id was copied here by hand, and would be counted twice.
            if result.row.run_id == run.run_id:
                results.append(annotate_result(result, known, references))
            else:
                problems.append(
                    f"{result.where}: row of run {result.row.run_id} "
                    f"in the file of run {run.run_id}"
                )
    return make_collection(results, known, problems)


def make_collection(
    results: Sequence[Result], runs: Mapping[str, FinishedRun], problems: Sequence[str]
) -> CollectedResults:
    """Return the results without those that conflict, which join the problems."""
    kept, conflicts = separate_conflicts(distinguish_unlike(results, runs))
    unknown = tuple(
        f"{result.where}: unknown {' and '.join(names)}"
        for result in kept
        if (names := find_unknown_names(result.row))
    )
    return CollectedResults(kept, runs, (*problems, *conflicts), unknown)


def annotate_result(
    result: Result,
    runs: Mapping[str, FinishedRun],
    references: Sequence[ReferenceReproduction] = (),
) -> Result:
    """Return the result with the variant and the deviations of its run and the runs it needs."""
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
        standard_error=find_standard_error(row, runs[row.run_id]),
        mixed_code=any(run.earlier for run in upstream),
    )


def find_standard_error(row: ResultRow, run: FinishedRun) -> float | None:
    """Return the sampling error that a run recorded for a row; None if it recorded none."""
    errors = run.info.get("standard_errors")
    found = errors.get(row.setting) if isinstance(errors, Mapping) else None
    value = found.get(row.metric) if isinstance(found, Mapping) else None
    valid = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    return float(value) if valid else None  # type: ignore[arg-type]


# What only one result may have: everything but value, unit and run. `variant` and `differs` are
# part of it: an ablation does not compete with the main experiment.
_result_key = attrgetter(
    *(f"row.{name}" for name in COLUMNS if name not in ("value", "unit", "run_id")),
    "variant",
    "differs",
    "imported",
)


def separate_conflicts(results: Sequence[Result]) -> tuple[tuple[Result, ...], tuple[str, ...]]:
    """Return the results whose key is unique, and a line for each key that several have.

    None of the several is kept: picking one silently would hide a mistake.
    """
    groups = group_by(results, _result_key).values()
    kept = tuple(same[0] for same in groups if len(same) == 1)
    return kept, tuple(_describe_conflict(same) for same in groups if len(same) > 1)


def _describe_conflict(same: Sequence[Result]) -> str:
    places = "; ".join(f"{r.where}: {r.row.value:g} of run {r.row.run_id}" for r in same)
    repeated = len({result.row for result in same}) == 1
    what = "the same row twice" if repeated else "rows that claim the same cell"
    return f"{places}: {what}, {describe_row(same[0].row)}"


def describe_row(row: ResultRow) -> str:
    """Return what a row is about, in words."""
    return (
        f"{row.metric} of {row.method} {row.arch}, {row.epochs} epochs, {row.stage} on"
        f" {row.dataset}, setting {row.setting!r}, seed {row.seed}"
    )
