"""What is published is what its rows give: rendered again, every file is the same."""

from pathlib import Path
from typing import Any

import pytest

from results import spec
from results.collect import CollectedResults, collect_results
from results.publish import publish_tables, read_published
from results.render import write_tables
from results.runs import FinishedRun
from results.schema import ResultRow
from results.store import RowsError
from results.tables import build_tables

PUBLISHED = Path(__file__).resolve().parents[3] / "results/published"


@pytest.mark.parametrize(
    "folder", sorted(p.parent for p in PUBLISHED.glob("*/rows.csv")), ids=lambda path: path.name
)
def test_published_tables_are_those_of_the_published_rows(folder: Path, tmp_path: Path) -> None:
    collection = read_published(folder)
    assert collection.results and not collection.unknown
    written = write_tables(build_tables(collection.results, spec.table_names()), tmp_path)
    assert sorted(written) == sorted(path.name for path in (folder / "tables").iterdir())
    for name, path in written.items():
        kept = folder / "tables" / name
        assert path.read_bytes() == kept.read_bytes(), (
            f"{kept} is not what its rows give: publish again, and say why"
        )


def test_something_is_published() -> None:
    assert (PUBLISHED / "mini" / "rows.csv").is_file()


def test_publishing_keeps_results_and_leaves_out_the_machine(
    run_root: Any, row: ResultRow, pretraining: dict[str, Any], tmp_path: Path
) -> None:
    run_root.add("abc", "knn", [row])
    pretraining["mugs"]["loss_weights"] = [0.0, 1.0, 1.0]
    secret = {"data_dir": "/home/somebody/data"}
    runs = [
        FinishedRun("abc", "knn", "knn", {"weights": "pre"}, rows="knn/knn-abc/rows.csv"),
        FinishedRun(
            "pre",
            "pretrain",
            "p",
            config=pretraining | secret,
            runtime=frozenset({"data_dir", "threads"}),
        ),
    ]
    collection = collect_results(run_root.path, runs)
    files = publish_tables(collection, tmp_path / "kept")
    assert len(files) == 2 + 3 * len(spec.table_names())
    again = read_published(tmp_path / "kept")
    assert [(r.row, r.variant) for r in again.results] == [(row, "w/o instance supervision")]
    text = (tmp_path / "kept/runs.json").read_text()
    assert "somebody" not in text and "threads" not in text and "drop_path" in text
    before = {path: path.read_bytes() for path in files}
    assert {
        path: path.read_bytes() for path in publish_tables(collection, tmp_path / "kept")
    } == before
    (tmp_path / "kept/runs.json").write_text(text[:-9])
    with pytest.raises(RowsError, match=r"runs\.json: damaged, publish again"):
        read_published(tmp_path / "kept")


def test_what_cannot_be_published_is_told(run_root: Any, row: ResultRow, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results to publish"):
        publish_tables(CollectedResults(()), tmp_path)
    with pytest.raises(RowsError, match="line 3"):
        publish_tables(CollectedResults((), problems=("rows.csv, line 3: bad",)), tmp_path)
