"""Where a number of a table comes from: rows, runs, checkpoint, configuration, code, cost, and what came before."""

from collections.abc import Iterator

from results.cells import format_difference, format_value
from results.collect import CollectedResults
from results.runs import FinishedRun, flatten_config, iter_with_upstream
from results.tables import OurCell, build_table
from results.variants import format_setting


class NoSuchCellError(ValueError):
    """No cell, or several, answer to a row and a column; the message lists what there is."""


def explain_cell(collection: CollectedResults, table: str, row: str, column: str) -> str:
    """The origin of one cell. `row`: words of its group and line (`mugs vit-s/16 3200`); `column`: its title or key.

    Raises NoSuchCellError where not exactly one cell has all the words, ValueError for an unknown table.
    """
    cells = list(build_table(table, collection.results).our_cells())
    words = row.lower().split()
    matching = [own for own in cells if column.lower() in (own.key.lower(), own.column.lower())]
    if not matching:
        known = ", ".join(sorted({own.column for own in cells})) or "none has a number of ours"
        raise NoSuchCellError(
            f"{table}: no cell of ours in a column {column!r} (columns with one: {known})"
        )
    lines = [own for own in matching if all(word in _place(own).lower() for word in words)]
    exact = [own for own in lines if _bare(own.line) == " ".join(words)]
    lines = exact if len(exact) == 1 else lines
    if len(lines) != 1:
        listed = "".join(f"\n  {_place(own)}" for own in lines or matching)
        raise NoSuchCellError(
            f"{table}, {column}: {len(lines)} lines have the words {row!r}, of these:{listed}"
        )
    return "\n".join(_text(table, lines[0], collection)) + "\n"


def _place(own: OurCell) -> str:
    return f"{own.entry.group}: {own.line}"


def _bare(line: str) -> str:
    return line.lower().replace(",", "").removesuffix(" ours").removesuffix(" epochs")


def _text(table: str, own: OurCell, collection: CollectedResults) -> Iterator[str]:
    cell, paper, difference = own.cell, own.paper, own.difference
    beside = (
        ""
        if paper is None or difference is None
        else f" (paper {format_value(paper)}, {format_difference(difference)})"
    )
    yield f"{table}, {own.line}, {own.column}: {cell.text()}{beside}"
    yield f"setting: {cell.setting}" if cell.setting else "setting: the only one"
    for result in cell.results:
        yield f"  seed {result.row.seed}: {result.row.value:.6g} {result.row.unit}, {result.where}"
    for line in cell.results[0].differs:
        yield f"  differs from the released recipe: {line}"
    told: set[str] = set()
    for result in cell.results:
        if result.row.run_id not in collection.runs:
            yield f"\nrun {result.row.run_id}: no record of it"
        for run in iter_with_upstream(result.row.run_id, collection.runs):
            if run.run_id not in told:
                told.add(run.run_id)
                yield from _run(run, collection)


def _run(run: FinishedRun, collection: CollectedResults) -> Iterator[str]:
    yield f"\nrun {run.run_id}  {run.stage}  {run.name}"
    yield f"  folder: {run.folder}"
    for role, needed in sorted(run.upstream.items()):
        upstream = collection.runs.get(needed)
        yield f"  needs {role}: {needed} ({f'{upstream.stage} {upstream.name}' if upstream else 'no record of it'})"
    if path := find_weights_path(run, collection):
        yield f"  checkpoint: {path}"
    for label, output in sorted(run.outputs.items()):
        yield f"  output {label}: {output}"
    yield f"  code: {describe_code(run)}"
    yield f"  versions: {', '.join(f'{name} {version}' for name, version in sorted(run.versions.items()))}"
    yield f"  cost: {describe_cost(run)}"
    yield f"  finished: {run.finished or 'unknown'}"
    yield "  config:"
    for key, value in flatten_config(run.config).items():
        yield f"    {key}: {format_setting(value)}"


def find_weights_path(run: FinishedRun, collection: CollectedResults) -> str | None:
    """The weights an evaluation read, below the run root."""
    upstream = collection.runs.get(run.upstream.get("weights", ""))
    return upstream.outputs.get(str(run.config.get("weights"))) if upstream else None


def describe_code(run: FinishedRun) -> str:
    """Commit, and whether files differed from it."""
    dirty = {True: ", with uncommitted changes", False: "", None: ", unknown whether changed"}[
        run.git_dirty
    ]
    return f"{run.git_sha or 'unknown commit'}{dirty}"


def describe_cost(run: FinishedRun) -> str:
    """GPU-hours, time, ranks, restarts."""
    ranks = f"{run.ranks} rank{'s' if run.ranks != 1 else ''}"
    return f"{run.gpu_hours:g} GPU-hours, {run.seconds:.0f} s on {run.device}, {ranks}, {run.restarts} restarts"
