"""Verdicts: hand-computed cases, errors by simulation, and where tables print them."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from verdict_power import ACCURACIES, DIFFERENCES, OUTCOMES, SEEDS, simulate

from mugs.data.sources.expected import KNOWN
from pipeline.config import load_reproduction
from results.collect import CollectedResults, find_standard_error
from results.compare import compare_cells
from results.explain import explain_cell
from results.render import (
    CSV_COLUMNS,
    VERDICT_COLUMNS,
    Format,
    render_formatted,
    render_table,
    write_tables,
)
from results.runs import FinishedRun, run_from_entry
from results.schema import Result
from results.spec import OptionError
from results.tables import build_table
from results.verdict import Comparison, PairedComparison, binomial_error, compare_cell
from results.vocabulary import load_vocabulary
from stages import STAGES
from stages.commands.reproduction import all_runs, list_seeded_runs
from stages.commands.tables import TablesRequest, warn_of_missing_seeds, warn_without_verdicts

Make = Callable[..., list[Result]]
ROOT = Path(__file__).resolve().parents[3]


def compare(*values: float, paper: float = 75.6, images: int = 50_000, **changes: float) -> str:
    return Comparison(values=values, paper=paper, images=images, **changes).describe()


def test_the_error_of_an_accuracy_is_binomial() -> None:
    # sqrt(0.75 * 0.25 / 50,000) = 0.0019365; the two successes and failures change the 6th digit.
    assert binomial_error(75.0, 50_000) == pytest.approx(0.19365, abs=1e-5)
    # (98 + 2) / (100 + 4) = 0.96154; sqrt(0.96154 * 0.03846 / 100) = 0.019231.
    assert binomial_error(98.0, 100) == pytest.approx(1.9231, abs=1e-4)
    assert 0 < binomial_error(100.0, 100) == pytest.approx(binomial_error(0.0, 100))


def test_half_widths_by_hand() -> None:
    one = Comparison(values=(75.1,), paper=75.6, images=50_000)
    # Variances: 0.19339^2 + 0.19207^2 + 0.1^2 / 12 = 0.075126; 1.95996 * sqrt(0.075126) = 0.53721.
    assert one.half_width(0.975) == pytest.approx(0.5372, abs=1e-4)
    assert one.half_width(0.95) == pytest.approx(1.64485 * math.sqrt(0.075126), abs=1e-4)
    # Spread 1 over three seeds: t = 4.30265 with two degrees; 4.30265 * sqrt(4 / 3 + 0.1^2 / 12).
    wide = Comparison(values=(74.0, 75.0, 76.0), paper=75.6, images=50_000)
    assert wide.half_width(0.975) == pytest.approx(4.9698, abs=1e-3)
    # No spread: the images remain, 1.95996 * sqrt(0.19339^2 / 3 + 0.19207^2 + 0.1^2 / 12).
    narrow = Comparison(values=(75.1, 75.1, 75.1), paper=75.6, images=50_000)
    assert narrow.half_width(0.975) == pytest.approx(0.4391, abs=1e-4)


@pytest.mark.parametrize(
    ("values", "changes", "verdict"),
    [
        ((75.6,), {}, "reproduced"),
        # 0.1 + 0.451 is not below 0.5, and 0.1 is not above 0.537. Eight seeds: t = 1.89458,
        # 0.1 + 1.89458 * sqrt(0.19232^2 * 9 / 8 + 0.1^2 / 12) = 0.490 < 0.5.
        ((75.5,), {}, "undecided: 7 more seeds would decide"),
        ((75.5,), {"margin": 1.0}, "reproduced"),
        ((74.6,), {}, "lower by 1.0 ± 0.5"),
        ((76.6,), {}, "higher by 1.0 ± 0.5"),
        # A difference that is there, and that is shown to be too small to matter.
        ((75.0,), {"margin": 1.5}, "reproduced"),
        # Eight seeds: t = 2.36462, 2.36462 * sqrt(0.19339^2 * 9 / 8 + 0.1^2 / 12) = 0.4898 < 0.5.
        ((75.1,), {}, "undecided: 7 more seeds would decide"),
        ((75.1, 75.1, 75.1), {}, "lower by 0.5 ± 0.4"),
        # The spread is 0.1: 2.91999 * sqrt(0.1^2 * 4 / 3 + 0.1^2 / 12) = 0.347 < 0.5.
        ((75.5, 75.6, 75.7), {}, "reproduced"),
        # It is 0.18: 0.613 with three seeds, 2.35336 * sqrt(0.18^2 * 5 / 4 + ...) = 0.478 with 4.
        ((75.42, 75.6, 75.78), {}, "undecided: 1 more seed would decide"),
        ((74.0, 75.0, 76.0), {}, "undecided: 20 more seeds would not decide"),
        ((75.6,), {"images": 3_030}, "undecided: 20 more seeds would not decide"),
    ],
)
def test_verdicts_by_hand(
    values: tuple[float, ...], changes: dict[str, float], verdict: str
) -> None:
    assert compare(*values, **changes) == verdict  # type: ignore[arg-type]


def test_so_many_more_seeds_do_decide() -> None:
    start = Comparison(values=(75.1,), paper=75.6, images=50_000)
    missing = start.count_missing_seeds()
    assert missing == 7
    error = start.our_error
    # Eight values of the assumed mean and spread: +-a has the spread a * sqrt(8 / 7).
    step = error * math.sqrt(7 / 8)
    values = tuple(75.1 + step * sign for sign in (-1, 1) * 4)
    assert replace(start, values=values).decide() == "lower"
    assert replace(start, values=values[:6]).decide() == "undecided"


# Fewer draws than the documentation's 10,000, which `test_documented_power_in_full` repeats.
DRAWS = 1_000
# Three standard errors of a share of 5%, and of any share, in so many draws, in percent.
CHANCE_OF_5 = 3 * math.sqrt(5 * 95 / DRAWS)
CHANCE = 3 * math.sqrt(50 * 50 / DRAWS)


def documented_power() -> dict[tuple[int, int, float], dict[str, float]]:
    """Return the power table of the documentation."""
    text = (ROOT / "docs/verdicts.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| ([\d,]+) \| (\d) \| ([\d.]+) \|(.+)\|$", text, re.MULTILINE)
    return {
        (int(images.replace(",", "")), int(seeds), float(difference)): dict(
            zip(OUTCOMES, map(float, shares.split("|")), strict=True)
        )
        for images, seeds, difference, shares in lines
    }


@pytest.mark.parametrize("images", ACCURACIES)
@pytest.mark.parametrize("seeds", SEEDS)
def test_errors_of_the_first_kind_and_the_documented_power(images: int, seeds: int) -> None:
    power = documented_power()
    for difference in DIFFERENCES:
        shares = simulate(difference, images, seeds, draws=DRAWS)
        if difference >= 0.5:
            assert shares["reproduced"] <= 5 + CHANCE_OF_5, (difference, shares)
        if difference == 0:
            assert shares["lower"] + shares["higher"] <= 5 + CHANCE_OF_5, shares
        else:
            assert shares["higher"] <= 2.5 + CHANCE_OF_5, (difference, shares)
        assert shares == pytest.approx(power[images, seeds, difference], abs=CHANCE), difference


@pytest.mark.long
def test_documented_power_in_full() -> None:
    power = documented_power()
    assert list(power) == [(i, s, d) for i in ACCURACIES for s in SEEDS for d in DIFFERENCES]
    for (images, seeds, difference), documented in power.items():
        # Another version of NumPy may draw other numbers.
        shares = simulate(difference, images, seeds)
        assert shares == pytest.approx(documented, abs=2), (images, seeds, difference)
        if difference >= 0.5:
            assert shares["reproduced"] <= 5, (images, seeds, difference)


def test_spread_over_seeds_does_not_pass_for_a_difference() -> None:
    """Three runs of a training whose seeds scatter by more than the images do."""
    same = simulate(0.0, 50_000, 3, seed_spread=0.4, draws=DRAWS)
    assert same["lower"] + same["higher"] <= 5 + CHANCE_OF_5, same
    different = simulate(0.5, 50_000, 3, seed_spread=0.4, draws=DRAWS)
    assert different["reproduced"] <= 5 + CHANCE_OF_5, different


def test_counts_are_those_that_conversion_checks() -> None:
    known = {name: expected.images["val"] for name, expected in KNOWN.items() if expected.images}
    counts = load_vocabulary().evaluation_images
    # An image of COCO has many objects, so nothing of it is a share of images.
    del known["coco2017"]
    # Every fifth digit of 1,797, and the count that mini.yaml gives to its conversion.
    digits = len(range(0, 1797, 5))
    mini = load_reproduction("mini", STAGES).runs["photo_patches"].config
    known |= {"sklearn_digits": digits, "sklearn_photo_patches": mini.num_val_images}  # type: ignore[attr-defined]
    assert counts == known


def render(results: list[Result], name: str, fmt: Format, margin: float | None) -> str:
    return render_table(build_table(name, results), fmt, margin)


def test_tables_print_verdicts_only_if_asked(results: Make) -> None:
    rows = results({"value": 74.0})
    plain = render(rows, "table1", "md", None)
    text = render(rows, "table1", "md", 0.5)
    added = [line for line in text.splitlines() if line not in plain.splitlines()]
    (verdict,) = [line for line in added if line.startswith("| *verdict*")]
    assert "*lower by 1.6 ± 0.5*" in verdict
    assert "two one-sided tests at 95%" in text and "binomial" in text
    assert "verdict" not in plain
    assert "lower by 1.6 $\\pm$ 0.5" in render(rows, "table1", "latex", 0.5)
    assert "reproduced" in render(results({"value": 75.6}), "table1", "md", 0.5)


def test_a_table_without_a_verdict_has_no_note_of_the_method(results: Make) -> None:
    unprinted = results({"arch": "vit_mini", "epochs": 24, "dataset": "sklearn_digits"})
    assert render(unprinted, "table1", "md", 0.5) == render(unprinted, "table1", "md", None)


def test_why_there_is_no_verdict_is_said_once(results: Make) -> None:
    facts = {"arch": "vit_mini", "epochs": 24, "dataset": "sklearn_digits"}
    unprinted = results(facts, {**facts, "stage": "linear", "setting": "best epoch"})
    said: list[str] = []
    warn_without_verdicts(
        [build_table(name, unprinted) for name in ("table1", "table2")], said.append
    )
    assert said == [
        "0 verdicts: none of our 2 cells has a printed number; --against compares with other runs"
    ]
    warn_without_verdicts([build_table("table1", [*unprinted, *results({})])], said.append)
    warn_without_verdicts([build_table("table1", [])], said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("done", "line"),
    [
        ((0,), "1 of 3 seeds done; not done: seeds 1, 2 (see status)"),
        ((0, 2), "2 of 3 seeds done; not done: seed 1 (see status)"),
        ((0, 1, 2), ""),
    ],
)
def test_seeds_that_are_not_done_are_named(done: Sequence[int], line: str) -> None:
    runs = all_runs("mini", seeds=["0", "1", "2"])
    kept = [run.run_id for number in done for run in all_runs("mini", seeds=[str(number)])]
    collection = CollectedResults((), dict.fromkeys(kept, FinishedRun("", "", "")))
    said: list[str] = []
    warn_of_missing_seeds(runs, collection, said.append)
    # Of a seed without its last run, a table has some numbers.
    assert said == ([line] if line else [])
    last = [run for seed, run in list_seeded_runs(runs) if seed == 0][-1]
    without = {run_id: run for run_id, run in collection.runs.items() if run_id != last.run_id}
    warn_of_missing_seeds(runs, CollectedResults((), without), said.append, "there: ")
    assert said[-1].startswith(f"there: {len(done) - 1} of 3 seeds done; not done: seed")


def test_without_seeds_none_is_missing() -> None:
    said: list[str] = []
    warn_of_missing_seeds(all_runs("mini"), CollectedResults(()), said.append)
    warn_of_missing_seeds(all_runs("mini", seeds=["3"]), CollectedResults(()), said.append)
    assert said == []


def test_the_csv_has_one_more_column(results: Make, tmp_path: Path) -> None:
    rows = results({"value": 74.0})
    plain = render(rows, "table1", "csv", None).splitlines()
    lines = render(rows, "table1", "csv", 0.5).splitlines()
    assert plain[0] == ",".join(CSV_COLUMNS)
    assert lines[0] == ",".join([plain[0], *VERDICT_COLUMNS])
    cut = [line.rsplit(",", len(VERDICT_COLUMNS)) for line in lines]
    assert [line[0] for line in cut] == plain
    # Only the cell of ours has a verdict.
    assert [line[1:] for line in cut if line[1]] == [
        VERDICT_COLUMNS,
        ["lower by 1.6 ± 0.5", "1", "", ""],
    ]
    # Either may replace the other.
    table = build_table("table1", rows)
    for margin in (None, 0.5, None):
        write_tables([table], tmp_path, margin=margin)
        assert (tmp_path / "table1.csv").read_text(encoding="utf-8").splitlines() == (
            plain if margin is None else lines
        )


def test_what_was_selected_is_beside_what_was_fixed(results: Make) -> None:
    fixed = "cls, k=20, T=0.07"
    rows = results(
        {"value": 75.6, "setting": "cls, k=10, T=0.07"},
        {"value": 75.2, "setting": fixed},
        {"value": 75.0, "setting": "cls, k=20, T=0.05"},
    )
    note = (
        "the best of 3 settings on the evaluated images, as in the paper; fixed in advance:"
        f" {fixed}, 75.2; gain by selection: 0.4"
    )
    for fmt in ("md", "latex"):
        assert note in render(rows, "table1", fmt, 0.5)
        assert "gain by selection" not in render(rows, "table1", fmt, None)
    assert render(rows, "table1", "csv", 0.5).count(f'reproduced,3,"{fixed}",75.2') == 1
    collection = CollectedResults(tuple(rows))
    where = ("table1", "mugs vit-s/16 3200", "k-nn")
    assert f"  selection: {note}" in explain_cell(collection, *where, margin=0.5).splitlines()
    # Of penalties, none is.
    probes = [
        {
            "value": value,
            "stage": "logistic",
            "epochs": 800,
            "setting": f"1% of labels, lambda={value}",
        }
        for value in (60.0, 61.0)
    ]
    text = render(results(*probes), "table3", "md", 0.5)
    assert "the best of 2 settings on the evaluated images, as in the paper; none was fixed" in text


def test_without_a_known_error_there_is_no_verdict(results: Make) -> None:
    boxes = {"stage": "coco_detection", "dataset": "coco2017", "metric": "box AP", "unit": "AP"}
    text = render(results({**boxes, "value": 49.0, "setting": ""}), "table6", "md", 0.5)
    assert "*no verdict: box AP needs results per image*" in text
    # A run that knows it; ours and the paper's are taken to have the same.
    (result,) = results({**boxes, "value": 49.0, "setting": ""})
    text = render([replace(result, standard_error=0.4)], "table6", "md", 0.5)
    # 1.95996 * sqrt(2 * 0.4^2 + 0.1^2 / 12) = 1.11.
    assert re.search(r"\*(higher|lower) by \d\.\d ± 1\.1\*|\*undecided", text)
    comparison = Comparison(values=(49.0,), paper=50.2, error=0.4)
    assert comparison.describe() == "lower by 1.2 ± 1.1"
    assert "  sampling error by bootstrap: 0.400 for a run of ours, 0.400 for the paper's" in (
        comparison.explain()
    )


@pytest.mark.parametrize(
    ("errors", "found"),
    [
        ({"n=7": {"J&F": 1.5}}, 1.5),
        ({"n=7": {"J": 1.5}}, None),
        ({"n=20": {"J&F": 1.5}}, None),
        ({"n=7": {"J&F": "much"}}, None),
        ({"n=7": {"J&F": -1}}, None),
        ("none", None),
        (None, None),
    ],
)
def test_the_error_that_a_run_recorded(results: Make, errors: object, found: float | None) -> None:
    (result,) = results({"setting": "n=7", "metric": "J&F"})
    run = run_from_entry(
        {"run_id": "x", "stage": "s", "name": "n", "info": {"standard_errors": errors}}
    )
    assert find_standard_error(result.row, run) == found


def test_explain_shows_the_arithmetic(results: Make) -> None:
    collection = CollectedResults(tuple(results({"value": 75.1})))
    where = ("table1", "mugs vit-s/16 3200", "k-nn")
    text = explain_cell(collection, *where, margin=0.5)
    for line in (
        "verdict: undecided: 7 more seeds would decide",
        "  difference: 75.100 - 75.6 = -0.500",
        "  sampling error of 50,000 images: 0.193 for a run of ours, 0.192 for the paper's",
        "  rounding of the printed number: 0.029",
        "  spread over seeds: unknown, there is one seed",
        "  reproduced if 0.500 + 0.451 is below the margin of 0.5: not below",
        "  different if 0.500 is above 0.537: not above",
    ):
        assert line in text.splitlines(), (line, text)
    assert "verdict" not in explain_cell(collection, *where)
    seeds = CollectedResults(
        tuple(results({"value": 75.5}, {"value": 75.7, "seed": 1, "run_id": "two"}))
    )
    assert "  spread over seeds: 0.141 (n=2)" in explain_cell(seeds, *where, margin=0.5)


def mini_seeds(results: Make, *values: float) -> list[Result]:
    """Return the k-NN of mini with a seed for each value."""
    facts = {"arch": "vit_mini", "epochs": 24, "dataset": "sklearn_digits"}
    return results(
        *(
            {**facts, "value": value, "seed": seed, "run_id": f"run{seed}"}
            for seed, value in enumerate(values)
        )
    )


# k-NN of mini after 10 epochs with the seeds 0, 1 and 2.
MINI = (41.1111, 33.8889, 32.7778)


def compare_mini(results: Make, here: Sequence[float], margin: float = 0.5) -> str:
    """Return the verdict on k-NN numbers against those of mini."""
    compared = compare_cells(
        mini_seeds(results, *here), mini_seeds(results, *MINI), ["table1"], margin
    )
    (row,) = compared.parts[0].rows
    assert compared.parts[0].header[-1] == "Verdict"
    assert f"within {margin:g} points" in render_formatted(compared, "md")
    return row.cells[-1].text


def test_repetitions_of_three_seeds_are_decided_by_their_differences(results: Make) -> None:
    """On another kind of machine a run has the same id, and may have another number."""
    assert compare_mini(results, [value - 3 for value in MINI]) == "lower by 3.0 ± 0.3"
    assert compare_mini(results, [value + 3 for value in MINI]) == "higher by 3.0 ± 0.3"
    assert compare_mini(results, [value - 3 for value in MINI], margin=4.0) == "reproduced"


def test_the_same_seeds_are_compared_seed_by_seed(results: Make) -> None:
    # Differences of -1, 0 and 1: their spread is 1, of steps of 100 / 360 it is 0.1134;
    # t of 95% with two degrees is 2.91999: 2.91999 * sqrt((1 + 0.01286) / 3) = 1.697.
    moved = [MINI[0] - 1, MINI[1], MINI[2] + 1]
    assert compare_mini(results, moved, margin=1.72) == "reproduced"
    assert compare_mini(results, moved, margin=1.68).startswith("undecided: 1 more seed")
    comparison = PairedComparison(values=(1.0, 2.0, 3.0), others=(2.0, 2.0, 2.0), paper=2.0)
    # Numbers that are no count of images are told to one decimal.
    expected = 2.91999 * math.sqrt((1 + 2 * 0.1**2 / 12) / 3)
    assert comparison.half_width(0.95) == pytest.approx(expected, abs=1e-4)


def test_with_other_seeds_the_images_count(results: Make) -> None:
    # One run against three: 360 images decide nothing within half a point.
    assert compare_mini(results, MINI[:1]).startswith("undecided")
    assert compare_mini(results, [MINI[0] - 20]).startswith("lower by 14.8 ± 6.")


@pytest.mark.parametrize(
    ("values", "margin", "verdict"),
    [
        (MINI, 0.5, "reproduced (same run)"),
        (MINI[:1], 50.0, "reproduced (same run)"),
        # Too few images to say so, but there is nothing to decide.
        (MINI[:1], 0.5, "same run, equal"),
    ],
)
def test_a_run_against_itself_is_told_from_another(
    results: Make, values: Sequence[float], margin: float, verdict: str
) -> None:
    side = mini_seeds(results, *values)
    compared = compare_cells(side, side, ["table1"], margin)
    assert compared.parts[0].rows[0].cells[-1].text == verdict
    assert "says nothing of another run or seed" in compared.notes[-1]


def test_a_run_that_was_changed_is_told_from_one_that_was_repeated(results: Make) -> None:
    def record(seconds: float, finished: str = "2026-01-01T00:00:00+0000") -> Any:
        facts = {"stage": "knn", "name": "knn", "run_id": "run0", "provenance": {}}
        return {"run0": run_from_entry({**facts, "seconds": seconds, "finished": finished})}

    sides = mini_seeds(results, MINI[0]), mini_seeds(results, MINI[0] + 20)
    for runs, changed in (
        ((record(1.5), record(1.5)), True),
        ((record(1.5), record(1.6)), False),
        ((record(1.5, ""), record(1.5, "")), False),
        ((record(1.5), {}), False),
    ):
        compared = compare_cells(*sides, ["table1"], 0.5, runs)
        verdict = compared.parts[0].rows[0].cells[-1].text
        assert verdict.startswith("lower by 20.0")
        assert verdict.endswith("(same run: one side was changed)") == changed
        assert compared.notes[0] == "1 cells: 0 equal, 1 different, 0 in one only."


def test_pairs_that_scatter_seldom_pass_for_equal_or_different() -> None:
    """Three repeated runs whose numbers scatter by as much as those of other seeds."""
    random = np.random.default_rng(0)
    counts = {0.0: 0, 0.5: 0}
    for difference in counts:
        for there in random.normal(60, 0.3, (DRAWS, 3)):
            here = random.normal(60 - difference, 0.3, 3)
            outcome = PairedComparison(
                values=tuple(here), others=tuple(there), paper=float(there.mean()), images=50_000
            ).decide()
            # Wrong at a difference of the margin: that they are equal; at 0: that they are not.
            wrong = ("reproduced",) if difference else ("lower", "higher")
            counts[difference] += outcome in wrong
    assert max(counts.values()) <= DRAWS * (5 + CHANCE_OF_5) / 100, counts


def test_a_cell_on_one_side_has_no_verdict(results: Make) -> None:
    compared = compare_cells(mini_seeds(results, 98.0), [], ["table1"], 2.0)
    assert compared.parts[0].rows[0].cells[-1].text == "--"
    plain = compare_cells(mini_seeds(results, 98.0), [], ["table1"])
    assert "Verdict" not in plain.parts[0].header and len(plain.notes) == 1


def test_unknown_images_are_named(results: Make) -> None:
    (cell,) = (
        ours.cell for ours in build_table("table1", results({"dataset": "mine"})).our_cells()
    )
    with pytest.raises(ValueError, match="number of images of mine unknown"):
        compare_cell(cell, 75.6, 0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"margin": 0.5}, "--margin needs --verdicts"),
        ({"verdicts": True, "margin": 0.0}, "--margin 0: expected points between 0 and 100"),
        ({"verdicts": True, "margin": math.nan}, "--margin nan: expected points"),
        ({"co2": 1.0, "format": "csv"}, "--co2 cannot be combined with --format csv"),
        ({"co2": 1.0, "against": Path("x")}, "--co2 cannot be combined with --against"),
        ({"verdicts": True, "publish": Path("x")}, "--verdicts cannot be combined with --publish"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=re.escape(words)):
        TablesRequest(**options).check()  # type: ignore[arg-type]


def test_the_default_margin_is_half_a_point() -> None:
    assert TablesRequest(verdicts=True).verdict_margin == 0.5
    assert TablesRequest(verdicts=True, margin=1.0).verdict_margin == 1.0
    assert TablesRequest().verdict_margin is None
