"""Which run waits for which, as a tree and as a flowchart."""

import re

import pytest

from pipeline import config
from pipeline.graph import render_graph
from pipeline.plan import build_plan
from pipeline.spec import StageRun
from stages import STAGES


@pytest.fixture(scope="module", params=["mini", "paper"])
def runs(request: pytest.FixtureRequest) -> list[StageRun]:
    return build_plan(config.load_reproduction(request.param, STAGES))


def test_the_flowchart_has_every_run_and_every_need(runs: list[StageRun]) -> None:
    done = {runs[0].run_id}
    first, *lines = render_graph(runs, done, "mermaid")
    assert first == "flowchart LR"
    boxes = dict(re.findall(r'^ +(\w+)\["(.+?)<br/>', "\n".join(lines), re.MULTILINE))
    assert boxes == {run.run_id: run.name for run in runs}
    assert f'{runs[0].run_id}["{runs[0].name}<br/>{runs[0].stage}"]:::done' in lines[0]
    arrows = re.findall(r"^ +(\w+) (-\.?->) (\w+)$", "\n".join(lines), re.MULTILINE)
    expected = {
        (need, "-.->" if need in run.watched else "-->", run.run_id)
        for run in runs
        for need in run.needs.values()
    }
    assert len(arrows) == len(expected) and set(arrows) == expected


def test_the_tree_has_every_run_below_what_it_needs(runs: list[StageRun]) -> None:
    done = {runs[0].run_id}
    lines = render_graph(runs, done, "text")
    named = {run.name: run for run in runs}
    path: list[str] = []
    seen = []
    for line in lines:
        head = re.match(r"([│├└─ ]*)(\S+) \((\w+)(, done)?\)(?:, also needs (.+))?$", line)
        assert head, line
        indent, name, stage, state, others = head.groups()
        run = named[name]
        assert (stage, state is not None) == (run.stage, run.run_id in done)
        path = [*path[: len(indent) // 4], run.run_id]
        also = [named[other].run_id for other in (others or "").split(", ") if other]
        # All needs are above it or named, and its parent is one of them.
        assert set(run.needs.values()) <= {*path[:-1], *also}
        assert len(path) == 1 or path[-2] in run.needs.values()
        assert not set(also) & set(path)
        seen.append(name)
    assert sorted(seen) == sorted(named)


def test_a_need_outside_the_selection_is_left_out() -> None:
    every = build_plan(config.load_reproduction("mini", STAGES))
    two = [run for run in every if run.name in ("features", "knn")]
    assert render_graph(two, set(), "text") == ["features (features)", "└── knn (knn)"]
    (arrow,) = [line for line in render_graph(two, set(), "mermaid") if "-->" in line]
    assert arrow.split() == [two[0].run_id, "-->", two[1].run_id]
