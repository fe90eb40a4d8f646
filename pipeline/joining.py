"""The runs of several reproductions as one: each run once, under a name of its own.

Works on what YAML files say, before settings are checked.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    signatures = {
        name: {run: sign_run(run, runs) for run in runs} for name, runs in reproductions.items()
    }
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


def sign_run(name: str, runs: Runs, outer: tuple[str, ...] = ()) -> str:
    """Return a hash of a run with all that it needs or is like; `outer` are the runs that led here.

    Two runs with the same hash are the same run.
    """
    if name not in runs or name in outer:
        # A recipe, or a mistake that is reported when the runs are put in order.
        return name
    raw = runs[name]

    def sign(other: Any) -> Any:
        return sign_run(other, runs, (*outer, name)) if isinstance(other, str) else other

    text = json.dumps(_map_references(raw, sign), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


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
