"""The report: complete in itself, every link resolves, readable;
in a real browser where there is one.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.files import OverwriteError, write_atomic
from results import resources, spec
from results.collect import CollectedResults, collect_results
from results.publish import publish_tables, read_published
from results.render import write_tables
from results.report.costs import format_run_time, sum_costs_by_stage, sum_unfinished
from results.report.graph import Node, lay_out_graph
from results.report.page import count_filled_cells, link_run_ids, render_report
from results.runs import FinishedRun
from results.schema import Result, ResultRow
from results.store import COLUMNS, RowsError
from results.tables import build_table, build_tables

PROBE = Path(__file__).with_name("report_probe.js")
FRAME = """<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,">
<iframe src="report.html" style="width: %dpx; height: 900px; border: 0"></iframe>
<pre id="probe"></pre>
<script>addEventListener("message", (event) => {
  document.getElementById("probe").textContent = event.data;
});</script>
"""
SAYS = {"pre": ["mugs.relation_depth=1, the paper says 2"]}
NODES = [
    Node("data", "convert", "imagenet"),
    Node("pre", "pretrain", "pretrain", needs=("data",)),
    Node("abc", "knn", "knn", needs=("data", "pre")),
    Node("lin", "linear", "linear <b>", "failed", "ValueError: no", ("data", "pre")),
    Node("fin", "finetune", "finetune", "queued", "pending: Priority", ("pre",)),
    Node(
        "det",
        "coco_detection",
        "a_name_that_is_much_too_long_for_its_box",
        "waiting",
        "needs finetune",
        ("fin",),
    ),
]


class Page(HTMLParser):
    """Ids, links, sources of images, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"]] if found.get("id") else []
        self.links += [found["href"]] if found.get("href") else []
        self.sources += [found[key] for key in ("src", "srcset") if found.get(key)]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def collection(run_root: Any, row: ResultRow, pretraining: dict[str, Any]) -> CollectedResults:
    """A k-NN of a pretraining with curves, a refused row, an unknown name, and a picture."""
    rows = [
        row,
        replace(row, dataset="my_photos"),
        replace(row, setting="other", value=float("nan")),
    ]
    rows += [replace(row, arch="vit_mini", epochs=24, dataset="sklearn_digits", value=60.0)]
    path = run_root.add("abc", "knn", rows)
    Image.new("RGB", (300, 200), "teal").save(path.parent / "figure.png")
    metrics = run_root.path / "pretrain/pretrain-pre/metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    lines = [
        {"step": s, "epoch": 0, "loss": 9 - s, "lr": 0.1, "images_per_second": 3.0}
        for s in range(3)
    ]
    metrics.write_text("\n".join(map(json.dumps, lines)))
    facts: dict[str, Any] = {
        "git_sha": "c0ffee",
        "seconds": 4000.0,
        "gpu_hours": 8.5,
        "restarts": 2,
    }
    runs = [
        FinishedRun("data", "convert", "imagenet", config={"dataset": "<script>alert(1)</script>"}),
        FinishedRun("pre", "pretrain", "pretrain", {"data": "data"}, pretraining, **facts),
        FinishedRun(
            "abc",
            "knn",
            "knn",
            {"data": "data", "weights": "pre"},
            rows="knn/knn-abc/rows.csv",
            outputs={"pictures": "knn/knn-abc/figure.png"},
            info={
                "captions": {"pictures": "All teal."},
                "colours": {"pictures": {"teal <i>": "#008080"}},
            },
        ),
    ]
    return collect_results(run_root.path, runs)


@pytest.fixture
def page(collection: CollectedResults, run_root: Any) -> str:
    """The report of it."""
    return render_report(collection, run_root.path, nodes=NODES, paper_says=SAYS)


def test_it_is_complete_in_itself_and_every_link_resolves(page: str) -> None:
    found = Page(page)
    assert len(found.ids) == len(set(found.ids))
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert all(link.startswith("#") or link == "data:," for link in found.links)
    assert found.sources and all(source.startswith("data:image/") for source in found.sources)
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert len(page.encode()) < 10_000_000


def test_it_says_what_there_is(page: str) -> None:
    text = " ".join(Page(page).text.split())
    for words in (
        "1 refused: rows that are damaged",
        "knn/knn-abc/rows.csv, line 4: value nan",
        "line 3: unknown data set 'my_photos'",
        "Mugs ViT-S/16, 3200 epochs",
        "mugs.relation_depth=1, the paper says 2",
        "scikit-learn digits (mini): compares with nothing in the paper",
        "1 h 06 min",
        "knn (knn) Run abc. All teal. teal <i> figure",
        "linear <b>",
        "ValueError: no",
        "Table 10: fine-tuning ViT-L/16",
    ):
        assert words in text, words
    assert "<script>alert" not in page


def test_the_same_page_each_time(page: str, collection: CollectedResults, run_root: Any) -> None:
    assert render_report(collection, run_root.path, nodes=NODES, paper_says=SAYS) == page


def test_an_empty_run_root_has_a_report_too(tmp_path: Path) -> None:
    text = " ".join(Page(render_report(CollectedResults(()), tmp_path)).text.split())
    assert "No run with results is finished yet" in text and "There are no runs." in text


def test_filled_cells_are_counted(
    collection: CollectedResults, results: Callable[..., list[Result]]
) -> None:
    assert count_filled_cells(build_table("table1", collection.results)) == (1, 10, 2)
    assert count_filled_cells(build_table("table5", ())) == (0, 2, 0)
    ade = {"stage": "ade20k_segmentation", "dataset": "ade20k", "metric": "mIoU"}
    heads = results({**ade, "setting": "upernet"}, {**ade, "setting": "linear"})
    assert count_filled_cells(build_table("table6", heads)) == (
        1,
        3,
        1,
    )  # the paper has no number for the linear head


def test_each_run_is_right_of_those_it_needs() -> None:
    drawn = lay_out_graph(NODES)
    x = {box.node.run_id: box.x for box in drawn.boxes}
    assert x["data"] < x["pre"] < x["abc"] == x["lin"] == x["fin"] < x["det"]
    assert len({(box.x, box.y) for box in drawn.boxes}) == len(NODES)
    assert len(drawn.curves) == 7
    assert lay_out_graph([]).boxes == ()


def test_costs_by_stage_and_what_earlier_attempts_took(tmp_path: Path) -> None:
    run = FinishedRun(
        "pre",
        "pretrain",
        "p",
        seconds=500.0,
        gpu_hours=1.0,
        restarts=1,
        finished="2026-01-01T00:05:00+0000",
    )
    folder = tmp_path / run.folder / "attempts"
    folder.mkdir(parents=True)
    (folder / "0001.json").write_text('{"time": 1.0}')
    (folder / "0002.json").write_text('{"time": 1767225600.0}')  # five minutes before the end
    costs = sum_costs_by_stage([run, FinishedRun("k", "knn", "k", seconds=10.0)], tmp_path)
    assert [(c.stage, c.runs, c.seconds, c.earlier) for c in costs] == [
        ("pretrain", 1, 500.0, 200.0),
        ("knn", 1, 10.0, 0.0),
        ("all stages", 2, 510.0, 200.0),
    ]
    assert [format_run_time(s) for s in (41.6, 185, 7800)] == ["42 s", "3 min 05 s", "2 h 10 min"]


def test_attempts_of_runs_that_are_not_done_cost_too(tmp_path: Path) -> None:
    nodes = [
        Node("a", "pretrain", "a", "failed", seconds=100.0, gpu_hours=2.0),
        Node("b", "knn", "b", "running", seconds=20.0, gpu_hours=0.5),
        Node("c", "knn", "c", "waiting"),
        Node("d", "knn", "d", "done", seconds=1000.0, gpu_hours=9.0),
    ]
    cost = sum_unfinished(nodes)
    assert (cost.runs, cost.seconds, cost.gpu_hours) == (2, 120.0, 2.5)
    text = render_report(CollectedResults(()), tmp_path, nodes=nodes)
    assert "attempts of 2 runs that are not done, 2.50 GPU-hours, 2 min 00 s" in text
    assert "<dt>GPU-hours</dt><dd>2.5</dd>" in text


def luminance(color: str) -> float:
    """Relative luminance of `#rrggbb`, as WCAG 2 defines it."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_the_contrast_of_wcag_aa() -> None:
    blocks = re.findall(
        r":root \{(.*?)\}", resources.read_resource("report", "templates", "report.css"), re.S
    )
    for block in blocks:
        colors = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        pairs = [(name, "bg") for name in ("text", "muted", "link")] + [
            (name, "surface") for name in ("text", "muted")
        ]
        pairs += [
            (name, f"{name}-bg")
            for name in ("ours", "done", "running", "queued", "failed", "waiting")
        ]
        for front, back in [*pairs, ("text", "queued-bg")]:
            light, dark = sorted((luminance(colors[front]), luminance(colors[back])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back, colors[front], colors[back])
    assert len(blocks) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (390, "dark")])
def test_in_a_browser(page: str, tmp_path: Path, width: int, scheme: str) -> None:
    chromium: Callable[[str], str | None] = shutil.which
    browser = chromium("chromium") or chromium("google-chrome") or chromium("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium on PATH (Debian: apt-get install chromium)")
    # As long as names of lines and columns become; texts wrap, so on a screen nothing scrolls.
    first = page.index('<th scope="row" class="sticky">')
    for end in ("</th>", "</td>"):
        end_at = page.index(end, first)
        page = f"{page[:end_at]}{', linear probe without instance supervision' * 2}{page[end_at:]}"
    # The page itself allows no other script than its own.
    page = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", page)
    (tmp_path / "report.html").write_text(
        page.replace("</body>", f"<script>{PROBE.read_text()}</script></body>"), encoding="utf-8"
    )
    (tmp_path / "frame.html").write_text(FRAME % width)
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
    ]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"]
    command += [
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        (tmp_path / "frame.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    _, found, rest = done.stdout.rpartition('<pre id="probe">')
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    seen = json.loads(
        rest.partition("</pre>")[0].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&")
    )
    assert seen["dark"] == (scheme == "dark")
    assert seen["width"] == width and not seen["overflow"], seen
    assert seen["images"] == 3 and not seen["broken_images"] and not seen["dead_links"], seen
    assert not seen["uncaptioned"] and not seen["too_small"], seen
    assert not seen["low_contrast"], seen["low_contrast"]
    assert width < 1280 or not seen["summary_scrolls"]
    assert not seen["unreachable"], seen["unreachable"]


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


def test_publishing_replaces_only_what_was_published(
    run_root: Any, row: ResultRow, tmp_path: Path
) -> None:
    """The folder of a run has a rows.csv too."""
    run_root.add("abc", "knn", [row])
    run = FinishedRun("abc", "knn", "knn", rows="knn/knn-abc/rows.csv")
    collection = collect_results(run_root.path, [run])
    for name, content in (("rows.csv", ",".join(COLUMNS)), ("runs.json", "{}")):
        folder = tmp_path / name
        write_atomic(folder / name, content)
        with pytest.raises(OverwriteError, match=f"{name}: .*it is not overwritten"):
            publish_tables(collection, folder)
        assert (folder / name).read_text() == content
        assert publish_tables(collection, folder, force=True)
        # One that was interrupted in between is ours.
        (folder / "rows.csv").unlink()
        assert publish_tables(collection, folder)


def test_what_cannot_be_published_is_told(run_root: Any, row: ResultRow, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results to publish"):
        publish_tables(CollectedResults(()), tmp_path)
    with pytest.raises(RowsError, match="line 3"):
        publish_tables(CollectedResults((), problems=("rows.csv, line 3: bad",)), tmp_path)


def test_the_id_of_a_run_is_linked_as_a_whole() -> None:
    runs = {run_id: FinishedRun(run_id, "knn", "n") for run_id in ("a", "a-b")}
    linked = 'of &lt;<a href="#run-a-b">a-b</a>&gt; and <a href="#run-a">a</a>'
    assert str(link_run_ids("of <a-b> and a", runs)) == linked
