"""What a check before a reproduction is run has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """`subject`: what was looked at, `detail`: what was found, `remedy`: what to do where that is wrong."""

    subject: str
    state: Literal["ok", "wrong", "skipped"]
    detail: str
    remedy: str = ""


def ok(subject: str, detail: str) -> Finding:
    """Nothing to do."""
    return Finding(subject, "ok", detail)


def wrong(subject: str, detail: object, remedy: str) -> Finding:
    """Something to do; of a detail with several lines the first is kept."""
    return Finding(subject, "wrong", (str(detail).splitlines() or [""])[0], remedy)


def skipped(subject: str, detail: str) -> Finding:
    """Not looked at, and why."""
    return Finding(subject, "skipped", detail)
