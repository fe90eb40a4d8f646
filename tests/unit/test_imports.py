"""Which package may import which: every file is parsed, and any other edge fails."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"pipeline", "mugs", "results", "slurm", "stages", "run_stage"}
ALLOWED = {
    "mugs": set(),
    "pipeline": set(),
    "results": set(),
    "slurm": {"pipeline"},
    "stages": {"pipeline", "results"},
    "run_stage": {"pipeline", "slurm", "stages", "results"},
}
INSIDE_FUNCTIONS = {"stages": {"mugs"}}
FOREIGN_NEVER = {
    "mugs": {"submitit", "yaml"},
    "pipeline": {"torch", "submitit", "pandas"},
    "results": {"torch", "submitit"},
    "slurm": {"torch", "pandas"},
    "stages": {"submitit"},
    "run_stage": {"torch", "pandas"},
}
AT_TOP_NEVER = {
    "stages": {"torch", "numpy", "pandas"},
    "results": {"numpy", "matplotlib", "jinja2", "markupsafe", "sklearn", "PIL", "safetensors"},
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Top-level names that a file imports, and whether it does so inside a function or for types only."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name.split(".")[0], inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: relative import"
                yield (child.module or "").split(".")[0], inside
            else:
                typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                yield from visit(child, inside or function or typing_only)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def sources() -> list[Path]:
    """Every Python file of ours outside the tests."""
    found = [path for name in sorted(OURS) for path in (ROOT / name).rglob("*.py")]
    return [*found, ROOT / "run_stage.py"]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name, inside in imports(path):
        allowed = (
            ALLOWED[package]
            | {package}
            | (INSIDE_FUNCTIONS.get(package, set()) if inside else set())
        )
        assert name not in OURS or name in allowed, f"{path}: {package} may not import {name} here"
        assert name not in FOREIGN_NEVER[package], f"{path}: {package} may not import {name}"
        assert inside or name not in AT_TOP_NEVER.get(package, ()), (
            f"{path}: import {name} inside run()"
        )


@pytest.mark.parametrize(
    "module", ["pipeline.manifest", "pipeline.plan", "slurm.submit", "slurm.status", "stages"]
)
def test_light_modules_stay_light(module: str) -> None:
    code = f"import sys, {module}; sys.exit(' '.join({{'torch', 'pandas', 'numpy'}} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
