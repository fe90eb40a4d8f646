"""Results that we stand behind, kept in the repository: rows, runs, and the tables made of them.

<folder>/rows.csv       every row
         runs.json      the runs behind them, without paths and machine names
         tables/        every table in every format
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.files import OverwriteError, check_overwrite, read_bounded, write_atomic
from results import render, spec
from results.collect import CollectedResults, find_standard_error, make_collection
from results.runs import FinishedRun, check_types
from results.store import COLUMNS, RowsError, read_results, write_rows
from results.tables import build_tables

ROWS_FILE = "rows.csv"
RUNS_FILE = "runs.json"
# How our file of runs begins.
RUNS_MARK = '{\n "results": {'
# Fields of a run that say where its files lie, or on which machines it ran.
LEFT_OUT = ("outputs", "runtime", "rows", "rows_sha256", "environment", "energy")


def publish_tables(
    collection: CollectedResults, folder: Path, *, force: bool = False
) -> list[Path]:
    """Write the folder and return its files.

    Raises:
        RowsError: a row was refused, or there are no results.
        OverwriteError: a file there is none of ours, and `force` is not given.
    """
    check_publishable(folder, force=force)
    files = write_published(collection, folder)
    # The tables are made of what was just written: a reader who does the same gets the same bytes.
    tables = build_tables(read_published(folder).results, spec.table_names())
    return [*files, *render.write_tables(tables, folder / "tables", force=force).values()]


def check_publishable(folder: Path, *, force: bool) -> None:
    """Check that a folder has no rows or runs, or those that were published into it.

    The folder of a run has a `rows.csv` too, which is lost to the run if it is written over.

    Raises:
        OverwriteError: it has others, and `force` is not given.
    """
    rows = folder / ROWS_FILE
    if rows.exists() and not (folder / RUNS_FILE).exists() and not force:
        raise OverwriteError(
            f"{rows}: nothing was published here, as there is no {RUNS_FILE}; it is not "
            "overwritten; publish into another folder, or use --force"
        )
    check_overwrite(rows, ",".join(COLUMNS), force=force)
    check_overwrite(folder / RUNS_FILE, RUNS_MARK, force=force)


def write_published(collection: CollectedResults, folder: Path) -> list[Path]:
    """Write rows and runs into a folder, without the tables, and return the two files.

    Raises:
        RowsError: a row was refused, or there are no results.
    """
    if not collection.require_valid().results:
        raise RowsError(f"{folder}: there are no results to publish")
    # Sorted, so that publishing again after another run changes only the lines of that run.
    rows = sorted(
        (result.row for result in collection.results),
        key=lambda row: (row.stage, row.run_id, row.metric, row.setting),
    )
    # What tells rows apart is stored, since the recipes that it was derived from may change later.
    facts = {
        result.row.run_id: {
            "variant": result.variant,
            "differs": list(result.differs),
            "imported": result.imported,
        }
        for result in collection.results
    }
    content = {"runs": describe_runs(collection.runs), "results": facts}
    # First, since it tells that the rows are ours to replace, also after an interruption.
    write_atomic(folder / RUNS_FILE, json.dumps(content, indent=1, sort_keys=True) + "\n")
    write_rows(folder / ROWS_FILE, rows)
    return [folder / ROWS_FILE, folder / RUNS_FILE]


def describe_runs(runs: Mapping[str, FinishedRun]) -> list[dict[str, Any]]:
    """Return runs by id as they are published: without settings that cannot change a result."""
    return [
        {name: value for name, value in asdict(run).items() if name not in LEFT_OUT}
        | {"config": run.science()}
        for _, run in sorted(runs.items())
    ]


def is_published(folder: Path) -> bool:
    """Return whether a folder holds published results."""
    return (folder / ROWS_FILE).is_file() and (folder / RUNS_FILE).is_file()


def _read_facts(record: dict[str, Any]) -> dict[str, Any]:
    """Return what tells the rows of a run apart.

    Raises:
        ValueError: it is not what `publish_tables` writes.
    """
    facts = {**record, "differs": tuple(record["differs"])}
    texts = (facts["variant"], *facts["differs"])
    fits = all(isinstance(text, str) for text in texts) and isinstance(facts["imported"], bool)
    if not fits or len(facts) != 3:
        raise ValueError(f"unexpected {record!r}")
    return facts


def read_published(folder: Path) -> CollectedResults:
    """Return the results of a published folder.

    Raises:
        RowsError: a file is damaged, or a row is refused.
    """
    results, problems = read_results(folder / ROWS_FILE, ROWS_FILE)
    path = folder / RUNS_FILE
    try:
        content = json.loads(read_bounded(path))
        runs = {record["run_id"]: FinishedRun(**record) for record in content["runs"]}
        for published in runs.values():
            check_types(published)
        facts = {run_id: _read_facts(record) for run_id, record in content["results"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RowsError(f"{path}: damaged, publish again: {error!r}") from None
    annotated = []
    for result in results:
        if result.row.run_id not in facts:
            raise RowsError(f"{path}: nothing about the run of {result.where}")
        known = facts[result.row.run_id]
        if run := runs.get(result.row.run_id):
            known["standard_error"] = find_standard_error(result.row, run)
        annotated.append(replace(result, **known))
    return make_collection(annotated, runs, problems).require_valid()
