"""What the command line shows: tables on a terminal, aligned plain lines when piped."""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slurm.status import format_duration

if TYPE_CHECKING:
    from pipeline.findings import Finding
    from pipeline.manifest import SplitRuns
    from pipeline.spec import StageRun
    from slurm.local.executor import Outcome
    from slurm.status import RunStatus
    from slurm.submission.submit import Submission

_STYLES = {
    "done": "green",
    "running": "cyan",
    "queued": "yellow",
    "failed": "bold red",
    "waiting": "dim",
}


def print_line(line: str = "") -> None:
    """One line on stdout."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def show_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table: drawn on a terminal, columns padded with spaces otherwise."""
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*header)
        for row in cells:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        Console().print(table)
        return
    lines = [list(header), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print_line(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def show_plan(
    runs: Sequence[StageRun], split: SplitRuns, root: Path, advice: Sequence[str]
) -> None:
    """Runs in order with what each needs, the total of what is left to do, and advice."""
    header = ("run", "stage", "state", "nodes", "GPUs", "hours", "GPU-hours", "run id")
    rows = []
    for run in runs:
        need, state = run.resources, "done" if run.run_id in split.done else "pending"
        cost = (need.nodes, need.gpus, f"{need.hours:g}", f"{need.gpu_hours:g}")
        rows.append((run.name, run.stage, state, *cost, run.run_id))
    show_table(header, rows)
    total = sum(run.resources.gpu_hours for run in split.pending)
    print_line(
        f"{len(split.done)} done, {len(split.pending)} pending, at most {total:g} GPU-hours, in {root}"
    )
    show_lines(advice)


def show_lines(lines: Sequence[str]) -> None:
    """Lines as they are."""
    for line in lines:
        print_line(line)


def show_submissions(submissions: Sequence[Submission]) -> None:
    """What was queued, what was so already, what is done."""
    rows = [(s.run.name, s.run.stage, s.action, s.job_id or "-", s.run.run_id) for s in submissions]
    show_table(("run", "stage", "action", "job", "run id"), rows)


def show_status(found: Sequence[RunStatus]) -> None:
    """State of every run, the logs of what failed, and a count."""
    rows = [(s.run.name, s.run.stage, s.state, s.job_id or "-", s.detail) for s in found]
    show_table(("run", "stage", "state", "job", "detail"), rows)
    _show_logs((s.run, s.log) for s in found if s.state == "failed")
    print_line(
        ", ".join(f"{count} {state}" for state, count in Counter(s.state for s in found).items())
    )


def _show_logs(logs: Iterable[tuple[StageRun, str | None]]) -> None:
    """Where to read on about what failed."""
    for run, log in logs:
        if log:
            print_line(f"{run.name} log: {log}")


def show_log(name: str, log: str | None, lines: int) -> None:
    """Where a run's log is, and its last lines."""
    print_line(f"==> {log or f'{name}: no log yet'}")
    if log and Path(log).is_file():
        with open(log, encoding="utf-8", errors="replace") as file:
            for line in deque(file, lines):
                print_line(line.rstrip("\n"))


def show_findings(findings: Sequence[Finding]) -> int:
    """Print the findings, each problem with its remedy, and a count; return 1 if there is a problem."""
    for finding in findings:
        print_line(f"{finding.state:<8}{finding.subject}: {finding.detail}")
        if finding.state == "wrong":
            print_line(f"        to do: {finding.remedy}")
    counts = Counter(finding.state for finding in findings)
    checked = f"{len(findings) - counts['skipped']} checked"
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    problems = counts["wrong"]
    print_line(f"{checked}{skipped}, {problems or 'no'} problem{'' if problems == 1 else 's'}")
    return 1 if problems else 0


def announce_data_checks(skip_data_checks: bool) -> None:
    """Say on stderr that files are being checked, since this can take minutes."""
    if not skip_data_checks:
        sys.stderr.write(
            "checking data sets, file lists and weights (--skip-data-checks skips this)\n"
        )


def announce_run(run: StageRun, ranks: int) -> None:
    """A line before a run starts here."""
    print_line(
        f"==> {run.name} ({run.stage}, {run.run_id}), {ranks} rank{'s' if ranks > 1 else ''}"
    )


def show_outcomes(outcomes: Sequence[Outcome]) -> int:
    """What became of every run of a local execution; the exit code that tells it: 0, 1 failed, 75 interrupted."""
    rows = [
        (o.run.name, o.run.stage, o.state, format_duration(o.seconds), o.detail) for o in outcomes
    ]
    show_table(("run", "stage", "outcome", "time", "detail"), rows)
    _show_logs((o.run, o.log) for o in outcomes)
    states = {outcome.state for outcome in outcomes}
    if "interrupted" in states:
        sys.stderr.write("interrupted, run again to resume\n")
        return 75
    return 1 if states & {"failed", "not run"} else 0
