"""Print the origin of a cell, for `--explain`; `tables.py` and `cells.py` compute the cell.

The origin is its rows, runs, weights, configuration, code and cost.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from operator import attrgetter
from shlex import quote
from typing import Any

from pipeline.text import format_count
from results.cells import format_difference, format_value
from results.collect import CollectedResults
from results.energy import format_energy
from results.environments import describe_environment, list_environment_differences
from results.runs import FinishedRun, flatten_config, iter_with_upstream
from results.spec import OptionError
from results.tables import OurCell, build_table
from results.variants import format_setting
from results.verdict import explain_verdict

# Gives the settings of a run.
Settings = Callable[[FinishedRun], Mapping[str, Any]]


def explain_cell(
    collection: CollectedResults,
    table: str,
    row: str,
    column: str,
    margin: float | None = None,
    co2: float | None = None,
    settings_of: Settings = attrgetter("config"),
) -> str:
    """Return the origin of one cell; with a margin, also the arithmetic of its verdict.

    `row` has words of its group and row (`mugs vit-s/16 3200`), `column` is a title or a key. `co2`
    are the grams of CO2 for each kWh. `settings_of` gives the settings of a run, by default under
    the names that its record has.

    Raises:
        OptionError: not exactly one cell has all the words; the message lists the cells there are.
        ValueError: there is no such table.
    """
    cells = list(build_table(table, collection.results).our_cells())
    in_column = [
        cell for cell in cells if column.lower() in (cell.key.lower(), cell.column.lower())
    ]
    if not in_column:
        known = ", ".join(sorted({cell.column for cell in cells})) or "none has a result of ours"
        raise OptionError(
            f"{table}: no cell of ours in a column {column!r} (columns with one: {known})"
        )
    # All words in any order, since nobody remembers how a row is spelled exactly.
    matching = _find_rows(row.lower().split(), in_column)
    if len(matching) != 1:
        shown = matching or in_column
        listed = "".join(f"\n  {_place(cell)}" for cell in shown)
        count = "several rows of ours have" if matching else "no row of ours with a result has"
        example = next(filter(None, (_find_words(cell, in_column) for cell in shown)), "")
        if example:
            listed += f"\ne.g. --explain {table} {quote(example)} {quote(column)}"
        raise OptionError(f"{table}, {column}: {count} the words {row!r}, of these:{listed}")
    lines = _explain(table, matching[0], collection, margin, co2, settings_of)
    return "\n".join(lines) + "\n"


def _find_rows(words: Sequence[str], cells: Sequence[OurCell]) -> list[OurCell]:
    """Return the cells whose row and group have all the words."""
    matching = [cell for cell in cells if all(word in _place(cell).lower() for word in words)]
    # "mugs vit-mini 24" also matches the rows "mugs vit-mini 24, w/o ..."; the row that is exactly
    # that is meant then.
    exact = [cell for cell in matching if _plain_row(cell) == " ".join(words)]
    return exact if len(exact) == 1 else matching


def _find_words(ours: OurCell, cells: Sequence[OurCell]) -> str:
    """Return few words that only the row of a cell has, its method first; "" if none do."""
    first, *others = [word.strip(",:").lower() for word in f"{ours.row} {ours.entry.group}".split()]
    for count in (1, 2, 3):
        for rest in combinations(others, count):
            if _find_rows((first, *rest), cells) == [ours]:
                return " ".join((first, *rest))
    return ""


def _place(ours: OurCell) -> str:
    return f"{ours.entry.group}: {ours.row}"


def _plain_row(ours: OurCell) -> str:
    return ours.row.lower().replace(",", "").removesuffix(" ours").removesuffix(" epochs")


def _explain(
    table: str,
    ours: OurCell,
    collection: CollectedResults,
    margin: float | None,
    co2: float | None,
    settings_of: Settings,
) -> Iterator[str]:
    cell = ours.cell
    line = f"{table}, {ours.row}, {ours.column}: {cell.text()}"
    if ours.paper is not None and ours.difference is not None:
        line += f" (paper {format_value(ours.paper)}, {format_difference(ours.difference)})"
    yield line
    yield f"setting: {cell.describe_setting() or 'the only one'}"
    for result in cell.results:
        yield f"  seed {result.row.seed}: {result.row.value:.6g} {result.row.unit}, {result.where}"
    # The results of a cell differ from the recipe in the same settings, or they would be two cells.
    for deviation in cell.results[0].differs:
        yield f"  differs from the released recipe: {deviation}"

    if margin is not None:
        yield from _explain_verdict(ours, margin)

    # Seeds share runs (the converted data set), which are shown once.
    shown: dict[str, FinishedRun] = {}
    for result in cell.results:
        if result.row.run_id not in collection.runs:
            yield f"\nrun {result.row.run_id}: no record of it"
        for run in iter_with_upstream(result.row.run_id, collection.runs):
            if run.run_id not in shown:
                shown[run.run_id] = run
                yield from _describe_run(run, collection.runs, co2)
                settings = flatten_config(settings_of(run))
                yield from (f"    {key}: {format_setting(v)}" for key, v in settings.items())
    if lines := list_environment_differences(shown.values()):
        yield "\nthe environments of these runs differ:"
        yield from (f"  {line}" for line in lines)


def _explain_verdict(ours: OurCell, margin: float) -> Iterator[str]:
    if ours.paper is None:
        yield "no verdict: the paper prints no number for this cell"
    else:
        yield from explain_verdict(ours.cell, ours.paper, margin)


def _describe_run(
    run: FinishedRun, runs: Mapping[str, FinishedRun], co2: float | None
) -> list[str]:
    versions = [f"{name} {version}" for name, version in sorted(run.versions.items())]
    # Of an evaluation, the weights file that it read.
    pretraining = runs.get(run.upstream.get("weights", ""))
    weights = pretraining and pretraining.outputs.get(str(run.config.get("weights")))
    return [
        f"\nrun {run.run_id}  {run.stage}  {run.name}",
        f"  folder: {run.folder}",
        *(
            f"  needs {role}: {needed} ({_describe_need(needed, runs)})"
            for role, needed in sorted(run.upstream.items())
        ),
        *([f"  checkpoint: {weights}"] if weights else []),
        *(f"  output {label}: {output}" for label, output in sorted(run.outputs.items())),
        f"  code: {describe_code(run)}",
        *(
            f"  code of attempt {each['attempt']}: {describe_commit(each)}, packages"
            f" {', '.join(f'{k} {v}' for k, v in sorted((each.get('versions') or {}).items()))}"
            for each in run.earlier
        ),
        f"  versions: {', '.join(versions)}",
        *(f"  environment: {line}" for line in describe_environment(run.environment)),
        f"  cost: {run.gpu_hours:g} GPU-hours, {run.seconds:.0f} s on {run.device},"
        f" {format_count(run.ranks, 'rank')}, {format_count(run.restarts, 'restart')}"
        f"{describe_energy(run, co2)}",
        f"  finished: {run.finished or 'unknown'}",
        *(f"  note: {note}" for note in run.info.get("notes") or []),
        "  config:",
    ]


def _describe_need(run_id: str, runs: Mapping[str, FinishedRun]) -> str:
    return f"{runs[run_id].stage} {runs[run_id].name}" if run_id in runs else "no record of it"


def describe_energy(run: FinishedRun, co2: float | None = None) -> str:
    """Return `, 1.2 kWh of its GPUs`, or nothing if their energy was not measured.

    With `co2`, grams for each kWh, also the kg of CO2: `, 1.2 kWh of its GPUs (0.46 kg CO2)`. Who
    asks for it is told if there is nothing to count it from.
    """
    energy = format_energy(run.energy, co2, " of its GPUs")
    if not energy and co2 is not None:
        energy = "whose energy no GPU counted" if run.gpus else "no GPUs whose energy would count"
    return f", {energy}" if energy else ""


def describe_code(run: FinishedRun) -> str:
    """Return the commit, and whether files differed from it."""
    return describe_commit({"git_sha": run.git_sha, "git_dirty": run.git_dirty})


def describe_commit(facts: Mapping[str, Any]) -> str:
    """Return the commit in provenance, whether files differed from it, and the snapshot's hash."""
    changes = {True: ", with uncommitted changes", False: "", None: ", unknown whether changed"}
    which = f" ({facts['git_changes']})" if facts.get("git_changes") else ""
    snapshot = f", snapshot {facts['snapshot']}" if facts.get("snapshot") else ""
    commit = facts.get("git_sha") or "unknown commit"
    return f"{commit}{changes[facts.get('git_dirty')]}{which}{snapshot}"
