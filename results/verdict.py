"""Whether a result of ours reproduces the printed accuracy, or differs from it, or is undecided.

Equivalence is shown by two one-sided tests (Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987), a
difference by an interval that does not hold zero. docs/verdicts.md has the method and its power.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from statistics import NormalDist, fmean
from typing import Literal

from results.cells import Cell, format_value
from results.spec import OptionError
from results.vocabulary import load_vocabulary

# In points of percent.
DEFAULT_MARGIN = 0.5

# Quantiles of 95%: a one-sided test has all 5% on its side, an interval half of it on each.
ONE_SIDED = 0.95
TWO_SIDED = 0.975

# Nobody pretrains more often than that to decide about one number.
MOST_MORE_SEEDS = 20

# The paper prints one decimal, so its number is off by up to 0.05: variance of that error.
ROUNDING_VARIANCE = 0.1**2 / 12

Outcome = Literal["reproduced", "lower", "higher", "undecided"]


class NoVerdictError(ValueError):
    """The sampling error of a number is not known."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Our numbers, one per seed, and the printed one; all in percent.

    The sampling error of both follows from the number of `images`, or is `error`, which our runs
    estimated.
    """

    values: tuple[float, ...]
    paper: float
    images: int = 0
    error: float | None = None
    margin: float = DEFAULT_MARGIN

    @cached_property
    def mean(self) -> float:
        """Our mean over seeds."""
        return fmean(self.values)

    @property
    def difference(self) -> float:
        """Our mean minus the printed value."""
        return self.mean - self.paper

    @cached_property
    def our_error(self) -> float:
        """Standard error of one run of ours, from its images."""
        return binomial_error(self.mean, self.images) if self.error is None else self.error

    @cached_property
    def paper_error(self) -> float:
        """Standard error of the printed value, from its images."""
        return binomial_error(self.paper, self.images) if self.error is None else self.error

    @cached_property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for a single one."""
        if len(self.values) == 1:
            return None
        # statistics.stdev is exact and takes 20 times as long, which simulations would feel.
        squares = math.fsum((value - self.mean) ** 2 for value in self.values)
        return math.sqrt(squares / (len(self.values) - 1))

    def half_width(self, probability: float, more_seeds: int = 0) -> float:
        """Return the half-width of the interval around the difference.

        With several seeds, this is the wider of two intervals: from the images alone, and from the
        spread over seeds, which the paper's run is assumed to share. With `more_seeds`, mean and
        spread are assumed to stay; the spread of a single seed is assumed to be that of its images.
        """
        seeds = len(self.values) + more_seeds
        images = self.our_error**2 / seeds + self.paper_error**2 + ROUNDING_VARIANCE
        width = normal_quantile(probability) * math.sqrt(images)
        if seeds == 1:
            return width
        spread = self.our_error if self.spread is None else self.spread
        runs = spread**2 * (1 / seeds + 1) + ROUNDING_VARIANCE
        return max(width, student_quantile(probability, seeds - 1) * math.sqrt(runs))

    def decide(self, more_seeds: int = 0) -> Outcome:
        """Return the outcome, or what it would be with more seeds of the same mean and spread."""
        # Both one-sided tests reject if the interval of 90% lies within the margin.
        if abs(self.difference) + self.half_width(ONE_SIDED, more_seeds) < self.margin:
            return "reproduced"
        if abs(self.difference) > self.half_width(TWO_SIDED, more_seeds):
            return "lower" if self.difference < 0 else "higher"
        return "undecided"

    def count_missing_seeds(self) -> int | None:
        """Return how many more seeds would decide; None if MOST_MORE_SEEDS would not.

        The error of the paper's run stays, however many seeds of ours there are.
        """
        numbers = range(1, MOST_MORE_SEEDS + 1)
        return next((number for number in numbers if self.decide(number) != "undecided"), None)

    def describe(self) -> str:
        """Return the verdict in words, as tables print it."""
        outcome = self.decide()
        if outcome == "reproduced":
            return outcome
        if outcome != "undecided":
            size = format_value(abs(self.difference))
            return f"{outcome} by {size} ± {format_value(self.half_width(TWO_SIDED))}"
        missing = self.count_missing_seeds()
        if missing is None:
            return f"undecided: {MOST_MORE_SEEDS} more seeds would not decide"
        return f"undecided: {missing} more seed{'s' if missing > 1 else ''} would decide"

    def explain(self) -> Iterator[str]:
        """Yield the arithmetic of the verdict, line by line."""
        difference = abs(self.difference)
        equivalence = self.half_width(ONE_SIDED)
        interval = self.half_width(TWO_SIDED)
        yield f"verdict: {self.describe()}"
        yield (
            f"  difference: {self.mean:.3f} - {format_value(self.paper)} = {self.difference:+.3f}"
        )
        source = f"of {self.images:,} images" if self.error is None else "by bootstrap"
        yield (
            f"  sampling error {source}: {self.our_error:.3f} for a run of ours,"
            f" {self.paper_error:.3f} for the paper's"
        )
        yield f"  rounding of the printed number: {math.sqrt(ROUNDING_VARIANCE):.3f}"
        if self.spread is None:
            yield "  spread over seeds: unknown, there is one seed"
        else:
            yield f"  spread over seeds: {self.spread:.3f} (n={len(self.values)})"
        within = "below" if difference + equivalence < self.margin else "not below"
        yield (
            f"  reproduced if {difference:.3f} + {equivalence:.3f} is below the margin of"
            f" {self.margin:g}: {within}"
        )
        outside = "above" if difference > interval else "not above"
        yield f"  different if {difference:.3f} is above {interval:.3f}: {outside}"


@dataclass(frozen=True, kw_only=True)
class PairedComparison(Comparison):
    """Our numbers and those of another run root with the same seeds, in the order of the seeds.

    Both are of the same images, and the question is whether they differ on these. So there is no
    sampling error, and what counts is how the difference scatters over seeds. `paper` is the mean
    of the others.
    """

    others: tuple[float, ...]

    @cached_property
    def spread(self) -> float:
        """Standard deviation over seeds of the difference."""
        pairs = zip(self.values, self.others, strict=True)
        squares = math.fsum((here - there - self.difference) ** 2 for here, there in pairs)
        return math.sqrt(squares / (len(self.values) - 1))

    def half_width(self, probability: float, more_seeds: int = 0) -> float:
        """Return the half-width of the interval around the difference, by Student's t."""
        seeds = len(self.values) + more_seeds
        # Each number is a count of images, or is told to one decimal. Differences that happen to be
        # equal scatter at least by that rounding.
        step = 100 / self.images if self.images else 0.1
        variance = self.spread**2 + 2 * step**2 / 12
        return student_quantile(probability, seeds - 1) * math.sqrt(variance / seeds)


def check_margin(margin: float) -> None:
    """Raise OptionError if a margin is not a positive number of points."""
    if not 0 < margin < 100:
        raise OptionError(f"--margin {margin:g}: expected points between 0 and 100, such as 0.5")


def compare_cell(cell: Cell, paper: float, margin: float) -> Comparison:
    """Return a cell of ours compared with the printed number.

    Raises:
        NoVerdictError: its sampling error is not known: it is no share of images and the run has
            none, or the number of images is not known.
    """
    row = cell.results[0].row
    values = tuple(result.row.value for result in cell.results)
    vocabulary = load_vocabulary()
    if row.metric not in vocabulary.image_shares:
        errors = [result.standard_error for result in cell.results]
        known = [error for error in errors if error is not None]
        if len(known) < len(errors):
            raise NoVerdictError(f"{row.metric} needs results per image")
        error = math.sqrt(fmean(value**2 for value in known))
        return Comparison(values=values, paper=paper, error=error, margin=margin)
    if row.dataset not in vocabulary.evaluation_images:
        raise NoVerdictError(f"number of images of {row.dataset} unknown")
    return Comparison(
        values=values,
        paper=paper,
        images=vocabulary.evaluation_images[row.dataset],
        margin=margin,
    )


def describe_verdict(cell: Cell, paper: float, margin: float) -> str:
    """Return the verdict on a cell in words, or why there is none."""
    try:
        return compare_cell(cell, paper, margin).describe()
    except NoVerdictError as reason:
        return f"no verdict: {reason}"


def describe_comparison(here: Cell, there: Cell, margin: float) -> str:
    """Return whether a cell reproduces that of another run root, in words.

    With the same seeds, two or more, they are compared seed by seed. Else the other's mean counts
    as one run.
    """
    seeds = [[result.row.seed for result in cell.results] for cell in (here, there)]
    if len(seeds[0]) < 2 or seeds[0] != seeds[1]:
        return describe_verdict(here, there.value, margin)
    row = here.results[0].row
    vocabulary = load_vocabulary()
    counted = row.metric in vocabulary.image_shares
    return PairedComparison(
        values=tuple(result.row.value for result in here.results),
        others=tuple(result.row.value for result in there.results),
        paper=there.value,
        images=vocabulary.evaluation_images.get(row.dataset, 0) if counted else 0,
        margin=margin,
    ).describe()


def explain_verdict(cell: Cell, paper: float, margin: float) -> Iterator[str]:
    """Yield the arithmetic of the verdict on a cell, or why there is none."""
    try:
        yield from compare_cell(cell, paper, margin).explain()
        if selection := describe_selection(cell):
            yield f"  selection: {selection}"
    except NoVerdictError as reason:
        yield f"no verdict: {reason}"


def describe_selection(cell: Cell) -> str:
    """Return that a cell was selected on the evaluated images, and by how much; "" if it was not.

    The paper's numbers were selected the same way, so the verdict compares like with like.
    """
    if cell.choices == 1:
        return ""
    chosen = f"the best of {cell.choices} settings on the evaluated images, as in the paper"
    if cell.fixed is None:
        return f"{chosen}; none was fixed in advance"
    setting, value = cell.fixed
    gain = format_value(cell.value - value)
    fixed = f"{cell.describe_setting(setting)}, {format_value(value)}"
    return f"{chosen}; fixed in advance: {fixed}; gain by selection: {gain}"


def describe_method(margin: float) -> tuple[str, str]:
    """Return the two lines that stand beside a table with verdicts."""
    return (
        _describe_tests(margin),
        "Errors: binomial, or by bootstrap over our images or videos, of ours and of the paper's"
        " value on as many, as if independent;"
        " with several seeds also their spread. A best setting is compared as the paper chose it;"
        " notes have the one fixed in advance.",
    )


def describe_comparison_method(margin: float) -> tuple[str, str]:
    """Return the two lines that stand beside two run roots compared with verdicts."""
    return (
        _describe_tests(margin),
        "With the same seeds on both sides, two or more, by the spread of their differences, on"
        " these images. Else errors are binomial, or by bootstrap over images or videos, of both"
        " sides, as if independent; a mean over seeds there counts as one run.",
    )


def _describe_tests(margin: float) -> str:
    return (
        f"Reproduced: within {margin:g} points by two one-sided tests at 95%. Lower or higher by"
        " D ± W: the difference is D; its interval of 95%, D - W to D + W, does not contain zero."
    )


def binomial_error(accuracy: float, images: int) -> float:
    """Return the standard error of an accuracy, both in percent.

    Two successes and two failures are added (Agresti and Coull, 1998): an accuracy of 100% of a few
    images is not certain.
    """
    share = (accuracy / 100 * images + 2) / (images + 4)
    return 100 * math.sqrt(share * (1 - share) / images)


@cache
def normal_quantile(probability: float) -> float:
    """Return the quantile of the normal distribution."""
    return NormalDist().inv_cdf(probability)


@cache
def student_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t with so many degrees of freedom."""
    # Imported here: tables without verdicts need no scipy and are there at once.
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))
