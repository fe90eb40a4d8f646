"""Pytest plugin: tell coverage which test is running, and note how long each passed test takes.

A module or session fixture gets a context of its own. Otherwise only the first test that asks for
it would seem to reach the lines that it runs.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

SECONDS: dict[str, float] = defaultdict(float)
SHARED: dict[str, list[str]] = {}  # passed test -> contexts of its module and session fixtures


def switch(context: str) -> str:
    """Change the context here and for processes started from now on; return the one before."""
    before = os.environ.get("MUTANTS_CONTEXT", "")
    os.environ["MUTANTS_CONTEXT"] = context
    if (running := coverage.Coverage.current()) is not None:
        running.switch_context(context)
    return before


def fixture_context(fixture: pytest.FixtureDef[Any]) -> str:
    return f"fixture {fixture.baseid}::{fixture.argname}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    switch(item.nodeid)
    result = yield
    switch("")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    # The set-up counts too: a test that is started alone makes its fixtures itself.
    SECONDS[item.nodeid] += call.duration
    if report.when == "call" and report.passed:
        fixtures = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009 (private in pytest)
        SHARED[item.nodeid] = [
            fixture_context(definition)
            for definitions in fixtures.values()
            for definition in definitions
            if definition.scope != "function"
        ]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[Any]:
    if fixturedef.scope == "function":
        return (yield)
    before = switch(fixture_context(fixturedef))
    try:
        return (yield)
    finally:
        switch(before)


def pytest_sessionfinish() -> None:
    tests = {
        name: {"seconds": round(SECONDS[name], 3), "fixtures": shared}
        for name, shared in SHARED.items()
    }
    (Path(os.environ["MUTANTS_FOLDER"]) / f"tests.{os.getpid()}.json").write_text(json.dumps(tests))
