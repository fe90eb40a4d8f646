"""Released weights in the evaluation of a run, which tell a wrong evaluation from a wrong training.

`diagnose` looks for finished evaluations of imported weights with the settings of its run.
"""

from collections.abc import Iterator, Sequence

from pipeline import manifest
from pipeline.manifest import ManifestEntry
from pipeline.spec import ConfigError
from results import spec
from results.cells import format_value
from results.diagnosis import Answer, Cause, answer_question
from results.tables import OurCell, build_tables
from results.verdict import DEFAULT_MARGIN, NoVerdictError, compare_cell
from stages.commands.finished_results import PAPER_ARCHS, collect_finished
from stages.commands.reproduction import all_runs
from stages.commands.run_chain import Chain, collect_chain

# The reproduction that evaluates them.
RELEASED = "evaluate_released"

QUESTION = "do released weights reach their printed number in this evaluation"


def compare_released(chain: Chain, reference: Sequence[ManifestEntry]) -> Answer:
    """Compare released weights with their printed number, in the evaluation of a run.

    If they are too low as well, the evaluation is wrong; else the training is to be looked at.
    """
    weights = chain.find_weights()
    if weights is None:
        return Answer(QUESTION, unknown="the run evaluates no weights")
    arch = str(weights.config.get("arch", ""))
    if weights.stage == "pretrain" and arch not in PAPER_ARCHS:
        return Answer(QUESTION, unknown=f"no weights of {arch} are released")
    if chain.run.rows_path is None:
        return Answer(QUESTION, unknown="the run has no number")
    same = [chain.run] if _is_released(chain) else _find_same_evaluations(chain, reference)
    causes: list[Cause] = []
    seen = []
    for entry in same:
        for ours in _list_printed(entry):
            told, lower = _compare(ours)
            seen.append(f"{entry.name}, {ours.column}: {told}")
            if lower:
                causes.append(_accuse_evaluation(entry, seen[-1]))
    if seen:
        return answer_question(QUESTION, causes, "; ".join(seen))
    if same:
        names = ", ".join(entry.name for entry in same)
        return Answer(QUESTION, unknown=f"nothing is printed to compare {names} with")
    return Answer(QUESTION, unknown=_describe_commands(chain))


def _is_released(chain: Chain) -> bool:
    """Return whether the run evaluates imported weights, and not those of a pretraining of ours."""
    weights = chain.find_weights()
    return (
        weights is not None
        and weights.stage == "import"
        and weights.config.get("source", "mugs") != "ours"
    )


def _find_same_evaluations(chain: Chain, reference: Sequence[ManifestEntry]) -> list[ManifestEntry]:
    """Return the runs that evaluate released weights as a run does: data and settings are equal."""
    wanted = _describe_evaluation(chain)
    found = []
    for entry in (*manifest.list_done(chain.run.run_root), *reference):
        if entry.stage != chain.run.stage:
            continue
        other = collect_chain(entry)
        try:
            if _is_released(other) and _describe_evaluation(other) == wanted:
                found.append(entry)
        except ConfigError:
            continue  # recorded by code that had other settings
    return found


def _describe_evaluation(chain: Chain) -> tuple[object, object]:
    data = chain.find_data()
    return data and data.config.get("dataset"), chain.read_evaluation()


def _list_printed(entry: ManifestEntry) -> Iterator[OurCell]:
    """Yield the cells of a run that have a printed number, one for each metric."""
    seen = set()
    results = collect_finished(entry.run_root).results
    for table in build_tables(results, spec.table_names()):
        for ours in table.our_cells():
            rows = [result.row for result in ours.cell.results]
            if ours.paper is None or entry.run_id not in [row.run_id for row in rows]:
                continue
            # Figure 2 has the numbers of Table 1 once more.
            if rows[0].metric not in seen:
                seen.add(rows[0].metric)
                yield ours


def _compare(ours: OurCell) -> tuple[str, bool]:
    """Return both numbers with their verdict, and whether it is `lower`."""
    assert ours.paper is not None
    numbers = f"{ours.cell.text()}, printed {format_value(ours.paper)}"
    try:
        found = compare_cell(ours.cell, ours.paper, DEFAULT_MARGIN)
    except NoVerdictError as reason:
        return f"{numbers} (no verdict: {reason})", False
    return f"{numbers} ({found.describe()})", found.decide() == "lower"


def _accuse_evaluation(entry: ManifestEntry, evidence: str) -> Cause:
    return Cause(
        0.95,
        f"{entry.stage}: released weights are too low in this evaluation as well",
        evidence,
        "look for the cause in the evaluation, its images and its settings, not in the training",
    )


def _describe_commands(chain: Chain) -> str:
    """Say how to evaluate released weights like the run."""
    missing = f"no evaluation of released weights with these settings in {chain.run.run_root}"
    runs = {run.run_id: run for run in all_runs(RELEASED)}
    queue = [run for run in runs.values() if run.stage == chain.run.stage][:1]
    if not queue:
        return f"{missing}; make one with a run of the stage import in place of the pretraining"
    names = []
    while queue:
        run = queue.pop(0)
        # The data are those of the run.
        if run.stage != "convert":
            names.append(run.name)
            queue += [runs[need] for need in run.needs.values()]
    only = " ".join(f"--only {name}" for name in reversed(dict.fromkeys(names)))
    return (
        f"{missing}; make one there: run {RELEASED} {only} --set weights.file=FILE, and what else"
        f" its settings are in this run (the head of {RELEASED}.yaml has the architectures)"
    )
