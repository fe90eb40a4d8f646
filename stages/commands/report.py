"""The command `report`: write the HTML page of a run root."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.files import check_overwrite, write_atomic
from results.report.graph import Node
from results.report.page import render_report
from results.verdict import DEFAULT_MARGIN, check_margin
from stages.commands.finished_results import collect_finished, find_paper_differences
from stages.commands.reproduction import Selection

# In the head of every page that this command wrote, also of earlier versions.
MARK = ", reproduced: "


def write_report(
    selection: Selection,
    nodes: Sequence[Node],
    out: Path | None,
    *,
    forecasts: Sequence[str] = (),
    margin: float | None = None,
    co2: float | None = None,
    force: bool = False,
) -> tuple[Path, tuple[str, ...]]:
    """Write the page and return its path and a line for each refused result row.

    `nodes` are the runs to draw, `forecasts` lines about runs that are not done. `margin` is that
    of the verdicts in tables, `co2` the grams of CO2 for each kWh. The default for `out` is
    report.html in the run root.

    Raises:
        OptionError: the margin is not a positive number of points.
        OverwriteError: there is a file that is no report of ours, and `force` is not given.
    """
    margin = DEFAULT_MARGIN if margin is None else margin
    check_margin(margin)
    path = out or selection.root / "report.html"
    check_overwrite(path, MARK, force=force)
    collection = collect_finished(selection.root, selection.runs)
    differences = find_paper_differences(collection)
    text = render_report(
        collection,
        selection.root,
        nodes=nodes,
        forecasts=forecasts,
        paper_says=differences,
        margin=margin,
        co2=co2,
    )
    # Names of files may hold bytes that are no text.
    return write_atomic(path, text.encode(errors="backslashreplace")), collection.problems
