"""Files and functions stay small."""

import ast
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parents[2]
FILES = [
    ROOT / "run_stage.py",
    *(
        p
        for d in ("mugs", "pipeline", "results", "slurm", "stages")
        for p in (ROOT / d).rglob("*.py")
    ),
]


def test_files() -> None:
    lengths = [n for n in (len(p.read_text().splitlines()) for p in FILES) if n > 5]
    assert median(lengths) <= 150 and quantiles(lengths, n=20)[-1] <= 400


def test_functions() -> None:
    lengths = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lengths[f"{path.relative_to(ROOT)}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert median(lengths.values()) <= 15 and quantiles(lengths.values(), n=20)[-1] <= 50
    assert max(lengths.values()) <= 80, max(lengths, key=lengths.get)
