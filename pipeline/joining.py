"""The runs of several reproductions as one: each run once, under a name of its own.

Works on what YAML files say, before settings are checked.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Of runs that refer to each other, each to the next; far longer than any.
LONGEST_CHAIN = 200

Runs = Mapping[str, Any]
"""Runs by name; each is what the file says of it, which may be anything until it is checked."""


def join_runs(
    reproductions: Mapping[str, Runs],
) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    """Return all runs by name, and for each its reproduction and the name that it has there.

    `reproductions` are runs by the name or path of the file that has them. A run that several of
    them have is taken once. Where runs of one name differ, the name of the reproduction comes
    first: `NAME-run`.
    """
    signatures = {name: sign_runs(runs) for name, runs in reproductions.items()}
    alike: dict[str, set[str]] = {}
    for of_runs in signatures.values():
        for run, signature in of_runs.items():
            alike.setdefault(run, set()).add(signature)

    names: dict[tuple[str, str], str] = {}
    joined: dict[str, Any] = {}
    origins: dict[str, tuple[str, str]] = {}
    for reproduction, runs in reproductions.items():
        # A run may refer to one that the file has further down, so all are named first.
        renamed = {}
        for run, signature in signatures[reproduction].items():
            unique = run if len(alike[run]) == 1 else f"{Path(reproduction).stem}-{run}"
            renamed[run] = names.setdefault((run, signature), unique)
        for run, raw in runs.items():
            joined.setdefault(renamed[run], _rename_references(raw, renamed))
            origins.setdefault(renamed[run], (reproduction, run))
    return joined, origins


def sign_runs(runs: Runs) -> dict[str, str]:
    """Return a hash of each run with all that it needs or is like.

    Two runs with the same hash are the same run.
    """
    # Each run once: if each refers to two others, the number of ways doubles from run to run.
    known: dict[str, str] = {}

    def sign(name: Any, outer: tuple[str, ...]) -> Any:
        if not isinstance(name, str) or name not in runs:
            return name  # a recipe, or a mistake that is reported when the runs are put in order
        if name in outer or len(outer) > LONGEST_CHAIN:
            return name  # such a mistake too
        if name not in known:
            content = _map_references(runs[name], lambda other: sign(other, (*outer, name)))
            text = json.dumps(content, sort_keys=True, default=str)
            known[name] = hashlib.sha256(text.encode()).hexdigest()
        return known[name]

    return {name: sign(name, ()) for name in runs}


def _rename_references(raw: Any, names: Mapping[str, str]) -> Any:
    return _map_references(raw, lambda name: names.get(name, name))


def _map_references(raw: Any, change: Any) -> Any:
    """Return a run with every name of another run, in `needs` and `like`, changed."""
    if not isinstance(raw, dict):
        return raw
    changed = dict(raw)
    if isinstance(needs := raw.get("needs"), dict):
        changed["needs"] = {role: change(name) for role, name in needs.items()}
    if "like" in raw:
        like = raw["like"]
        changed["like"] = (
            [change(name) for name in like] if isinstance(like, list) else change(like)
        )
    return changed
