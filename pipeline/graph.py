"""Which run waits for which: as a tree of text lines, and as a Mermaid flowchart."""

from collections.abc import Iterator, Sequence, Set
from typing import Literal

from pipeline.spec import StageRun

GraphFormat = Literal["text", "mermaid"]


def render_graph(runs: Sequence[StageRun], done: Set[str], form: GraphFormat) -> list[str]:
    """Return the lines of a graph of runs that are in order, each after those it needs.

    `done` are the ids of finished runs. Needs that are not among the runs are left out.
    """
    if form == "mermaid":
        return list(_mermaid_lines(runs, done))
    return list(_tree_lines(runs, done))


def _tree_lines(runs: Sequence[StageRun], done: Set[str]) -> Iterator[str]:
    """Yield the tree: a run stands below the last of the runs it needs, which names the others."""
    by_id = {run.run_id: run for run in runs}
    # Ids of the runs above a run, from the first; the longest such line decides where it stands.
    above: dict[str, list[str]] = {}
    below: dict[str, list[StageRun]] = {}
    for run in runs:
        lines = [[*above[need], need] for need in run.needs.values() if need in by_id]
        above[run.run_id] = max(lines, key=len, default=[])
        parent = above[run.run_id][-1] if lines else ""
        below.setdefault(parent, []).append(run)

    def describe(run: StageRun) -> str:
        # What stands above is needed as well, as those runs need it themselves.
        others = [
            by_id[need].name
            for need in run.needs.values()
            if need in by_id and need not in above[run.run_id]
        ]
        also = f", also needs {', '.join(others)}" if others else ""
        state = ", done" if run.run_id in done else ""
        return f"{run.name} ({run.stage}{state}){also}"

    def walk(parent: str, indent: str) -> Iterator[str]:
        children = below.get(parent, [])
        for run in children:
            last = run is children[-1]
            yield f"{indent}{'└── ' if last else '├── '}{describe(run)}"
            yield from walk(run.run_id, indent + ("    " if last else "│   "))

    for root in below.get("", []):
        yield describe(root)
        yield from walk(root.run_id, "")


def _mermaid_lines(runs: Sequence[StageRun], done: Set[str]) -> Iterator[str]:
    """Yield a flowchart; a dotted arrow leads to a run that watches another one while it runs."""
    ids = {run.run_id for run in runs}
    yield "flowchart LR"
    for run in runs:
        mark = ":::done" if run.run_id in done else ""
        yield f'    {run.run_id}["{run.name}<br/>{run.stage}"]{mark}'
    for run in runs:
        for need in dict.fromkeys(run.needs.values()):
            if need in ids:
                arrow = "-.->" if need in run.watched else "-->"
                yield f"    {need} {arrow} {run.run_id}"
    yield "    classDef done fill:#d3f0d6"
