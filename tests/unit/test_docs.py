"""The documents agree with the code: every row, setting, test, path, link and target they name."""

import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from pydantic import TypeAdapter
from step_cases import SWITCHES

from pipeline.settings import setting_fields
from stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mugs", "pipeline", "results", "slurm", "stages")
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/*.md", "slurm/README.md") for path in ROOT.glob(pattern)
)
ROWS = [f"M{number}" for number in range(1, 41)] + [f"E{number}" for number in range(1, 29)]
# Of DINO's oddities, those that make a difference here.
ROWS += [f"D{number}" for number in (1, 2, 3, 5, 6, 11, 13, 16)]
# The same for iBOT.
ROWS += [f"I{number}" for number in (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16, 17, 18)]
# Likewise MGC's.
ROWS += [f"G{number}" for number in (1, 2, 5, 6, 8, 12, 14, 15, 16)]


@dataclass(frozen=True)
class Switch:
    """A setting of a stage that chooses between the behaviors of a row."""

    stage: str
    setting: str
    values: tuple[Any, ...]
    default: tuple[Any, ...]  # empty where the row names none


@cache
def deviations() -> dict[str, str]:
    """Row -> its text in docs/deviations.md."""
    text = (ROOT / "docs/deviations.md").read_text(encoding="utf-8")
    parts = re.split(r"^### ([MEDIG]\d+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_benchmark_says_what_its_baseline_is() -> None:
    usage = (ROOT / "docs/usage.md").read_text(encoding="utf-8")
    table = usage[usage.index("| benchmark | baseline |") :]
    named = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^  \|(.+?)\|", table, re.M))))
    files = {path.stem.removeprefix("bench_") for path in ROOT.glob("tests/benchmarks/bench_*.py")}
    assert files - {"gpu"} <= named


def entry(row: str, label: str) -> str:
    """What a row says under a label, on one line; empty where it has no such label."""
    found = re.search(
        rf"^- {label}: (.*?)(?=^- |^#|\Z)", deviations()[row], re.DOTALL | re.MULTILINE
    )
    return " ".join(found[1].split()) if found else ""


def named_tests(row: str) -> list[str]:
    return re.findall(r"`(test_\w+)`", entry(row, "Test"))


def switches() -> dict[str, Switch]:
    found = {}
    for row in ROWS:
        if words := entry(row, "Switch"):
            name, *values = re.findall(r"`([^`]+)`", words)
            default = re.findall(r"`([^`]+)` \(default\)", words)
            stage, _, setting = name.partition(".")
            found[row] = Switch(
                stage,
                setting,
                tuple(yaml.safe_load(value) for value in values),
                tuple(yaml.safe_load(value) for value in default),
            )
    return found


def test_every_row_is_there_and_says_what_it_must() -> None:
    assert list(deviations()) == ROWS
    for row in ROWS:
        assert re.search(r"^\*\*.+\.\*\*$", deviations()[row], re.MULTILINE), f"{row} has no title"
        assert entry(row, "Release"), row
        assert entry(row, "Here"), row
        assert named_tests(row), row


def test_every_row_that_is_cited_exists() -> None:
    files = [ROOT / "run_stage.py", *DOCUMENTS]
    for package in (*PACKAGES, "tests"):
        files += [p for p in (ROOT / package).rglob("*") if p.suffix in (".py", ".yaml")]
    for path in files:
        # In quotes, "I64" is a type of numbers.
        cited = re.findall(r"(?<!\")\b[MEDIG]\d{1,2}\b", path.read_text(encoding="utf-8"))
        assert set(cited) <= set(ROWS), path


@pytest.mark.parametrize("row", switches())
def test_a_switch_is_a_setting_with_these_values(row: str) -> None:
    switch = switches()[row]
    *outer, name = switch.setting.split(".")
    config: Any = STAGES[switch.stage].config
    for part in outer:
        config = setting_fields(config)[part].nested
    adapter: TypeAdapter[Any] = TypeAdapter(get_type_hints(config, include_extras=True)[name])
    values = [adapter.validate_python(value) for value in switch.values]
    if switch.default:
        default = next(field.default for field in fields(config) if field.name == name)
        assert [adapter.validate_python(value) for value in switch.default] == [default]
    if "test_each_switch" in named_tests(row):
        assert set(values) <= set(SWITCHES[name])


def test_every_test_that_is_named_exists() -> None:
    text = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    existing = set(re.findall(r"^def (test_\w+)\(", text, re.MULTILINE))
    for row in ROWS:
        assert set(named_tests(row)) <= existing, row


def test_every_statement_about_security_names_a_test_that_exists() -> None:
    """`test_name`, or `test_beginning_...` of at least one; what begins in bold is a statement."""
    text = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    tests = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    for name, more in re.findall(r"`(test_\w+?)(_?\.\.\.)?`", text):
        rest = r"\w+" if more else ""
        assert re.search(rf"^def {name}{rest}\(", tests, re.MULTILINE), name
    model = text.partition("## Who is trusted")[2].partition("\n## ")[0]
    for statement in re.findall(r"^\*\*.+?(?=\n\n|\Z)", model, re.MULTILINE | re.DOTALL):
        assert "test_" in statement, statement


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_exist(document: Path) -> None:
    """Every path below one of our folders; `*` and `{a,b}` do not stand for a single file."""
    text = document.read_text(encoding="utf-8")
    folders = "|".join((*PACKAGES, "tests", "docs", r"\.ci", r"\.github"))
    for path in re.findall(rf"(?<![\w/.<])((?:{folders})/[\w./*-]*)", text):
        assert list(ROOT.glob(path.rstrip("./"))), f"{document.name}: {path}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_in_the_files_they_are_said_to_be_in(document: Path) -> None:
    """`name` in `path`, and `package.module.name`."""
    text = " ".join(document.read_text(encoding="utf-8").split())
    for name, path in re.findall(r"`([\w.]+?)(?:\(\))?` in `([\w./-]+\.(?:py|yaml))`", text):
        code = (ROOT / path).read_text(encoding="utf-8")
        assert all(re.search(rf"\b{part}\b", code) for part in name.split(".")), f"{name} in {path}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), f"{document.name}: {target}"
        if anchor:
            assert anchor in anchors(linked), f"{document.name}: {target}"


def anchors(document: Path) -> set[str]:
    """Anchors of the headings, as GitHub and GitLab derive them."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_make_targets_exist() -> None:
    targets = set(
        re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    for document in DOCUMENTS:
        named = re.findall(r"\bmake ([a-z][\w-]*)`", document.read_text(encoding="utf-8"))
        assert set(named) <= targets, document


def test_lowest_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert project["dependencies"] == [line.replace("==", ">=") for line in pinned]


def test_generated_pages_are_current() -> None:
    command = [sys.executable, "docs/generate.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
