"""Find out which tests reach which line: run the suite once under coverage, then what changes."""

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import coverage

ROOT = Path(__file__).resolve().parents[2]
MAP = ROOT / "build" / "mutants" / "reach.json"
PACKAGES = ("mugs", "pipeline", "results", "slurm", "stages")
SOURCES = [
    ROOT / "run_stage.py",
    *(path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))),
]
Lines = dict[str, dict[int, list[int]]]  # file -> line -> numbers of tests

CONFIG = """
[run]
parallel = true
data_file = {folder}/data
context = ${{MUTANTS_CONTEXT-}}
include = {include}
patch = _exit
disable_warnings = no-data-collected, module-not-measured, module-not-imported
"""


@contextmanager
def copied_tree() -> Iterator[Path]:
    """Copy all files that git does not ignore into a temporary repository; yield its folder.

    It is a repository because runs record the commit, and tests check that.
    """
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        (folder / ".venv").symlink_to(Path(sys.prefix))
        user = ["-c", "user.name=mutants", "-c", "user.email=mutants@localhost"]
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "Copy of the tree"]):
            subprocess.run(["git", *user, *command], cwd=folder, check=True)
        yield folder


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a test run; several at a time must not each use every core."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


class Reach:
    """The tests that reach each line, and their seconds."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.tests: list[str] = found["tests"]
        self.seconds: list[float] = found["seconds"]
        self.lines: Lines = {
            name: {int(line): tests for line, tests in lines.items()}
            for name, lines in found["lines"].items()
        }

    def of_lines(self, name: str, lines: Iterable[int]) -> set[int]:
        known = self.lines.get(name, {})
        return {test for line in lines for test in known.get(line, ())}

    def of_inner_lines(self, pattern: str = "", folder: str = ".") -> set[int]:
        """Return the tests that run a line inside a function; it fits the pattern.

        Of files in this folder or below.
        """
        return {
            test
            for name in self.lines
            if Path(folder) in Path(name).parents
            for line, text in inner_lines(name)
            if re.search(pattern, text)
            for test in self.lines[name].get(line, ())
        }

    def fastest_first(self, tests: Iterable[int], budget: float) -> tuple[list[str], float]:
        """Return the fastest tests whose seconds sum up to at most the budget, and that sum."""
        chosen, total = [], 0.0
        for test in sorted(tests, key=self.seconds.__getitem__):
            if chosen and total + self.seconds[test] > budget:
                break
            chosen.append(self.tests[test])
            total += self.seconds[test]
        return chosen, total


@functools.cache
def inner_lines(name: str) -> list[tuple[int, str]]:
    """Return number and text of the lines inside function bodies, which do not run at import."""
    text = (ROOT / name).read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    inside = {n for node in functions for n in range(node.body[0].lineno, node.end_lineno + 1)}
    return [(n, line) for n, line in enumerate(text.splitlines(), 1) if n in inside]


def collect(arguments: list[str]) -> dict[str, Any]:
    """Run tests under coverage and return what they reach."""
    with copied_tree() as copy:
        folder = copy / "build" / "reach"
        folder.mkdir(parents=True)
        include = [str(copy / "run_stage.py"), *(f"{copy / name}/*" for name in PACKAGES)]
        config = folder / "coveragerc"
        config.write_text(CONFIG.format(folder=folder, include=", ".join(include)))
        env = environment(
            COVERAGE_PROCESS_START=str(config),
            MUTANTS_FOLDER=str(folder),
            PYTHONPATH=os.pathsep.join([str(copy), str(copy / "tests" / "mutants")]),
        )
        command = [sys.executable, "-m", "pytest", "-q", "-p", "contexts", "--dist", "loadfile"]
        subprocess.run([*command, "-n", "2", *arguments], cwd=copy, env=env)
        return read_coverage(copy, folder)


def read_coverage(copy: Path, folder: Path) -> dict[str, Any]:
    """Merge the data of all processes; lines of a fixture count for each test that uses it."""
    tests: dict[str, dict[str, Any]] = {}
    for part in folder.glob("tests.*.json"):
        tests |= json.loads(part.read_text())
    users: dict[str, list[int]] = defaultdict(list)
    for number, (name, test) in enumerate(tests.items()):
        for context in [name, *test["fixtures"]]:
            users[context].append(number)
    lines: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for part in folder.glob("data.*"):
        data = coverage.CoverageData(str(part))
        data.read()
        for file in data.measured_files():
            for line, contexts in data.contexts_by_lineno(file).items():
                known = lines[str(Path(file).relative_to(copy))][line]
                known.update(test for context in contexts for test in users.get(context, ()))
    return {
        "tests": list(tests),
        "seconds": [test["seconds"] for test in tests.values()],
        "lines": {
            file: {line: sorted(found) for line, found in by_line.items() if found}
            for file, by_line in lines.items()
        },
    }


def load(select: str) -> Reach:
    """Read what the last call found, and run the test files that changed since under coverage.

    Lines of sources are followed to where they stand now. A change of what test files share is not
    noticed: remove the map then.
    """
    known = json.loads(MAP.read_text()) if MAP.exists() else defaultdict(dict, tests=[], seconds=[])
    paths = [*SOURCES, *sorted((ROOT / "tests").rglob("test_*.py"))]
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}
    changed = {name for name, text in texts.items() if text != known["texts"].get(name)}
    gone = {*changed, *(known["texts"].keys() - texts)}
    kept = {n for n, test in enumerate(known["tests"]) if test.partition("::")[0] not in gone}
    lines = {
        name: follow(known["lines"].get(name, {}), known["texts"].get(name, ""), text, kept)
        for name, text in texts.items()
        if not name.startswith("tests/")
    }
    known |= {"lines": lines, "texts": texts}
    if files := sorted(name for name in changed if name.startswith("tests")):
        add(known, collect(["-m", select, *files]))
    MAP.parent.mkdir(parents=True, exist_ok=True)
    MAP.write_text(json.dumps(known))
    return Reach(known)


def follow(known: dict[str, list[int]], old: str, new: str, kept: set[int]) -> dict[int, list[int]]:
    """Return the kept tests by line of the new text; a new line has those of what stood there."""
    found = {}
    matcher = SequenceMatcher(None, old.splitlines(), new.splitlines(), autojunk=False)
    for tag, first, end, now, now_end in matcher.get_opcodes():
        for line in range(now, now_end):
            before = [first + line - now] if tag == "equal" else range(first - 1, end)
            tests = {test for one in before for test in known.get(str(one + 1), ())}
            found[line + 1] = sorted(tests & kept)
    return found


def add(known: dict[str, Any], more: dict[str, Any]) -> None:
    """Add what further tests reach."""
    first = len(known["tests"])
    for part in ("tests", "seconds"):
        known[part] += more[part]
    for name, lines in more["lines"].items():
        for line, tests in lines.items():
            known["lines"][name].setdefault(line, []).extend(first + test for test in tests)
