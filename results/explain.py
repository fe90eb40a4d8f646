"""Where a number of a table comes from: rows, runs, checkpoint, configuration, code, cost, and what came before."""

from collections.abc import Iterator
from dataclasses import dataclass

from results.cells import Cell, fixed, signed
from results.collect import Collection
from results.runs import Run, chain, flat
from results.tables import Entry, Ours, build
from results.variants import short


class NoSuchCellError(ValueError):
    """No cell, or several, answer to a row and a column; the message lists what there is."""


@dataclass(frozen=True)
class Found:
    """A cell of ours with the line it is in."""

    line: str
    column: str
    cell: Cell
    paper: float | None


def explain(collection: Collection, table: str, row: str, column: str) -> str:
    """The origin of one cell. `row`: words of its line (`mugs vit-s/16 3200`); `column`: its title or key.

    Raises NoSuchCellError where not exactly one cell has all the words, ValueError for an unknown table.
    """
    cells = list(_cells(collection, table))
    words = row.lower().split()
    matching = [(key, found) for key, found in cells if column.lower() in (key.lower(), found.column.lower())]
    if not matching:
        known = ", ".join(sorted({found.column for _, found in cells})) or "none has a number of ours"
        raise NoSuchCellError(f"{table}: no cell of ours in a column {column!r} (columns with one: {known})")
    lines = [found for _, found in matching if all(word in found.line.lower() for word in words)]
    exact = [found for found in lines if _bare(found.line) == " ".join(words)]
    lines = exact if len(exact) == 1 else lines
    if len(lines) != 1:
        listed = "".join(f"\n  {found.line}" for found in lines or [found for _, found in matching])
        raise NoSuchCellError(f"{table}, {column}: {len(lines)} lines have the words {row!r}, of these:{listed}")
    return "\n".join(_text(table, lines[0], collection)) + "\n"


def _bare(line: str) -> str:
    return line.lower().replace(",", "").removesuffix(" ours").removesuffix(" epochs")


def _cells(collection: Collection, name: str) -> Iterator[tuple[str, Found]]:
    table = build(name, collection.results)
    for block in (table.printed, table.elsewhere):
        for entry in block.entries:
            for ours in entry.ours:
                for key, cell in ours.cells.items():
                    yield key, Found(line_words(entry, ours), block.columns[key], cell, entry.paper.get(key))


def line_words(entry: Entry, ours: Ours) -> str:
    """A line of ours in words: `Mugs ViT-S/16 3200 epochs, ours`."""
    epochs = f" {entry.epochs} epochs" if entry.epochs else ""
    return f"{entry.method} {entry.arch}{epochs}, {ours.label}"


def _text(table: str, found: Found, collection: Collection) -> Iterator[str]:
    cell = found.cell
    beside = "" if found.paper is None else f" (paper {fixed(found.paper)}, {signed(cell.value - found.paper)})"
    yield f"{table}, {found.line}, {found.column}: {cell.text()}{beside}"
    yield f"setting: {cell.setting}" if cell.setting else "setting: the only one"
    for result in cell.results:
        yield f"  seed {result.row.seed}: {result.row.value:.6g} {result.row.unit}, {result.where}"
    for line in cell.results[0].differs:
        yield f"  differs from the released recipe: {line}"
    told: set[str] = set()
    for result in cell.results:
        if result.row.run_id not in collection.runs:
            yield f"\nrun {result.row.run_id}: no record of it"
        for run in chain(result.row.run_id, collection.runs):
            if run.run_id not in told:
                told.add(run.run_id)
                yield from _run(run, collection)


def _run(run: Run, collection: Collection) -> Iterator[str]:
    yield f"\nrun {run.run_id}  {run.stage}  {run.name}"
    yield f"  folder: {run.folder}"
    for role, needed in sorted(run.upstream.items()):
        upstream = collection.runs.get(needed)
        yield f"  needs {role}: {needed} ({f'{upstream.stage} {upstream.name}' if upstream else 'no record of it'})"
    if path := checkpoint(run, collection):
        yield f"  checkpoint: {path}"
    for label, output in sorted(run.outputs.items()):
        yield f"  output {label}: {output}"
    yield f"  code: {code(run)}"
    yield f"  versions: {', '.join(f'{name} {version}' for name, version in sorted(run.versions.items()))}"
    yield f"  cost: {cost(run)}"
    yield f"  finished: {run.finished or 'unknown'}"
    yield "  config:"
    for key, value in flat(run.config).items():
        yield f"    {key}: {short(value)}"


def checkpoint(run: Run, collection: Collection) -> str | None:
    """The weights an evaluation read, below the run root."""
    upstream = collection.runs.get(run.upstream.get("weights", ""))
    return upstream.outputs.get(str(run.config.get("weights"))) if upstream else None


def code(run: Run) -> str:
    """Commit, and whether files differed from it."""
    dirty = {True: ", with uncommitted changes", False: "", None: ", unknown whether changed"}[run.git_dirty]
    return f"{run.git_sha or 'unknown commit'}{dirty}"


def cost(run: Run) -> str:
    """GPU-hours, time, ranks, restarts."""
    ranks = f"{run.ranks} rank{'s' if run.ranks != 1 else ''}"
    return f"{run.gpu_hours:g} GPU-hours, {run.seconds:.0f} s on {run.device}, {ranks}, {run.restarts} restarts"
