"""Results we stand behind, kept in the repository: rows, what was run, and the tables made of them.

<folder>/rows.csv       every row
         runs.json      the runs behind them, without paths and names of machines; what tells their rows apart
         tables/        every table in every format
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.files import write_atomic
from results import render, spec
from results.collect import CollectedResults, describe_unknown_names, separate_conflicts
from results.runs import FinishedRun
from results.schema import Result
from results.store import RowsError, read_results, write_rows
from results.tables import build_tables

LEFT_OUT = ("outputs", "runtime", "rows", "rows_sha256")


def publish_results(collection: CollectedResults, folder: Path) -> list[Path]:
    """Write the folder; returns its files. Raises RowsError when anything was refused, or without results."""
    if not collection.require_valid().results:
        raise RowsError(f"{folder}: there are no results to publish")
    rows = sorted(
        (r.row for r in collection.results),
        key=lambda row: (row.stage, row.run_id, row.metric, row.setting),
    )
    write_rows(folder / "rows.csv", rows)
    apart = {
        r.row.run_id: {"variant": r.variant, "differs": list(r.differs), "imported": r.imported}
        for r in collection.results
    }
    runs = [_public(run) for _, run in sorted(collection.runs.items())]
    content = {"runs": runs, "results": dict(sorted(apart.items()))}
    write_atomic(folder / "runs.json", json.dumps(content, indent=1, sort_keys=True) + "\n")
    tables = render.write_tables(
        build_tables(read_published(folder).results, spec.table_names()), folder / "tables"
    )
    return [folder / "rows.csv", folder / "runs.json", *tables.values()]


def _public(run: FinishedRun) -> dict[str, Any]:
    """A run's record without its files, and without settings that change no number (paths among them)."""
    record = {key: value for key, value in asdict(run).items() if key not in LEFT_OUT}
    return {**record, "config": run.science()}


def is_published(folder: Path) -> bool:
    """Whether it is such a folder."""
    return (folder / "rows.csv").is_file() and (folder / "runs.json").is_file()


def read_published(folder: Path) -> CollectedResults:
    """A published folder. Raises RowsError naming what is wrong with it."""
    results, problems = read_results(folder / "rows.csv", "rows.csv")
    try:
        content = json.loads((folder / "runs.json").read_text(encoding="utf-8"))
        runs = {record["run_id"]: FinishedRun(**record) for record in content["runs"]}
        facts = content["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise RowsError(f"{folder / 'runs.json'}: damaged, publish again: {error!r}") from None
    missing = [r.where for r in results if r.row.run_id not in facts]
    if missing:
        raise RowsError(f"{folder / 'runs.json'}: nothing about the run of {missing[0]}")
    described = [_described(result, facts[result.row.run_id]) for result in results]
    kept, conflicts = separate_conflicts(described)
    return CollectedResults(
        kept, runs, (*problems, *conflicts), describe_unknown_names(kept)
    ).require_valid()


def _described(result: Result, facts: dict[str, Any]) -> Result:
    return replace(result, **facts | {"differs": tuple(facts["differs"])})
