"""Every table compiles as LaTeX, with rows of all kinds in it."""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from results.render import render_table
from results.schema import Result
from results.spec import table_names
from results.tables import build_tables

DOCUMENT = r"""\documentclass{article}
\usepackage[utf8]{inputenc}
\usepackage[T1]{fontenc}
\usepackage[a4paper,margin=15mm]{geometry}
\usepackage{booktabs,caption}
\begin{document}
%s
\end{document}
"""


@pytest.mark.slow
def test_the_tables_compile(results: Callable[..., list[Result]], tmp_path: Path) -> None:
    compiler = shutil.which("pdflatex")
    if compiler is None:
        pytest.skip(
            "no pdflatex on PATH "
            "(Debian: apt-get install texlive-latex-base texlive-latex-recommended)"
        )
    (main,) = results({})
    rows = [
        main,
        *results(
            *(
                {"seed": s, "run_id": f"r_{s}", "stage": "linear", "value": 78.0 + s}
                for s in range(3)
            )
        ),
        replace(
            main,
            row=replace(main.row, run_id="b"),
            differs=("pretrain.a_b={5%} #1 (recipe: ~^$&\\)",),
        ),
        *results({"dataset": "odd_<photos>&%"}, {"dataset": "sklearn_digits", "arch": "vit_mini"}),
    ]
    text = DOCUMENT % "\n".join(
        render_table(table, "latex") for table in build_tables(rows, table_names())
    )
    (tmp_path / "tables.tex").write_text(text, encoding="utf-8")
    command = [compiler, "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120
    )
    assert done.returncode == 0, done.stdout[-3000:]
    overfull = [line for line in done.stdout.splitlines() if line.startswith("Overfull \\hbox")]
    assert not overfull, overfull
    assert (tmp_path / "tables.pdf").stat().st_size > 10_000
