"""A limit on the GPU-hours of a reproduction."""

from collections.abc import Sequence

from pipeline.spec import ConfigError
from pipeline.text import format_amount
from slurm.status import RunStatus

_WARN_AT = 0.8


def count_spent(statuses: Sequence[RunStatus]) -> float:
    """Return the GPU-hours of all attempts so far, however they ended."""
    return sum(status.cost.gpu_hours for status in statuses)


def check_budget(statuses: Sequence[RunStatus], budget: float) -> list[str]:
    """Return a warning if the runs may take more than 80% of a budget, in GPU-hours.

    Counted are all attempts so far, and the hours that the resources of the runs that are not done
    ask for.

    Raises:
        ConfigError: they may take more than the budget.
    """
    spent = count_spent(statuses)
    ahead = sum(s.run.resources.gpu_hours for s in statuses if s.state != "done")
    total = f"{format_amount(spent)} GPU-hours are spent and {format_amount(ahead)} are ahead"
    if spent + ahead > budget:
        raise ConfigError(
            f"--budget {budget:g}: {total}; select fewer runs with --only, or raise the budget"
        )
    if spent + ahead > _WARN_AT * budget:
        return [f"note: {total}, {(spent + ahead) / budget:.0%} of the budget of {budget:g}"]
    return []


def describe_overrun(statuses: Sequence[RunStatus], budget: float | None) -> str:
    """Return that a budget is spent, so that nothing may be submitted again; "" if it is not."""
    if budget is None or (spent := count_spent(statuses)) < budget:
        return ""
    amount = format_amount(spent)
    return f"the budget of {budget:g} GPU-hours is spent ({amount}); submit with a larger one"
