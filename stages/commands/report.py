"""The command `report`: write the HTML page of a run root."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.files import check_overwrite, write_atomic
from results.report.graph import Node
from results.report.page import render_report
from stages.commands.finished_results import collect_finished, find_paper_differences
from stages.commands.reproduction import Selection

# In the head of every page that this command wrote, also of earlier versions.
MARK = ", reproduced: "


def write_report(
    selection: Selection, nodes: Sequence[Node], out: Path | None, *, force: bool = False
) -> tuple[Path, tuple[str, ...]]:
    """Write the page and return its path and a line for each refused result row.

    `nodes` are the runs to draw. The default for `out` is report.html in the run root.

    Raises:
        OverwriteError: there is a file that is no report of ours, and `force` is not given.
    """
    path = out or selection.root / "report.html"
    check_overwrite(path, MARK, force=force)
    collection = collect_finished(selection.root, selection.runs)
    differences = find_paper_differences(collection)
    text = render_report(collection, selection.root, nodes=nodes, paper_says=differences)
    return write_atomic(path, text), collection.problems
