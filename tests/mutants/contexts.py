"""Pytest plugin: tell coverage which test is running, and note how long each passed test takes.

A module or session fixture gets a context of its own. Otherwise only the first test that asks for
it would seem to reach the lines that it runs.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

TESTS: dict[str, dict[str, Any]] = {}


def switch(context: str) -> str:
    """Change the context here and for processes started from now on; return the one before."""
    before = os.environ.get("MUTANTS_CONTEXT", "")
    os.environ["MUTANTS_CONTEXT"] = context
    running = coverage.Coverage.current()
    if running is not None:
        running.switch_context(context)
    return before


def fixture_context(fixture: pytest.FixtureDef[Any]) -> str:
    return f"fixture {fixture.baseid}::{fixture.argname}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    fixtures = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009 (private in pytest)
    shared = [
        fixture_context(definition)
        for definitions in fixtures.values()
        for definition in definitions
        if definition.scope != "function"
    ]
    switch(item.nodeid)
    start = time.perf_counter()
    result = yield
    TESTS[item.nodeid] = {
        "seconds": round(time.perf_counter() - start, 3),
        "fixtures": shared,
        "passed": getattr(item, "mutants_passed", False),
    }
    switch("")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    if report.when == "call":
        item.mutants_passed = report.passed  # type: ignore[attr-defined]
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
    folder = Path(os.environ["MUTANTS_FOLDER"])
    (folder / f"tests.{os.getpid()}.json").write_text(json.dumps(TESTS))
