"""What the checks before a run have found."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    Attributes:
        subject: what was checked.
        detail: what was found.
        remedy: what to do about it, if it is wrong.
    """

    subject: str
    state: Literal["ok", "wrong", "skipped"]
    detail: str
    remedy: str = ""


def ok(subject: str, detail: str) -> Finding:
    """Return a finding with nothing to do."""
    return Finding(subject, "ok", detail)


def wrong(subject: str, detail: object, remedy: str) -> Finding:
    """Return a finding with something to do; only the first line of `detail` is kept."""
    return Finding(subject, "wrong", (str(detail).splitlines() or [""])[0], remedy)


def skipped(subject: str, detail: str) -> Finding:
    """Return what was not checked, and why."""
    return Finding(subject, "skipped", detail)
