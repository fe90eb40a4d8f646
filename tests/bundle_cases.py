"""A small reproduction that is done, its bundle, and ways to change a bundle."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.archive import write_archive
from pipeline.files import with_checksum
from pipeline.identity import dump_settings
from pipeline.manifest import ManifestEntry, Output, parse_entry, record_entry
from results.schema import ResultRow
from results.store import write_rows
from stages.commands import bundle, bundle_content
from stages.commands.bundle import BundleRequest, write_bundle
from stages.commands.reproduction import Selection, load_selection

Members = dict[str, bytes]

REPRODUCTION = """
name: small
runs:
  imagenet: {stage: convert, dataset: imagenet1k, num_classes: 1000, train_dir: /secret/group/train}
  pretrain: {stage: pretrain, arch: vit_s16, epochs: 100, batch_size: 512, needs: {data: imagenet}}
  knn: {stage: knn, ks: [10, 20], temperatures: [0.07], needs: {data: imagenet, weights: pretrain}}
  linear: {stage: linear, needs: {data: imagenet, weights: pretrain}}
"""
INFO: dict[str, dict[str, Any]] = {
    "convert": {"dataset": "imagenet1k", "num_classes": 1000, "notes": ["read /secret/group/x"]},
    "pretrain": {"method": "mugs", "arch": "vit_s16", "epochs": 100, "seed": 0},
}
PROVENANCE = {
    "git_sha": "c0ffee",
    "git_dirty": False,
    "versions": {"torch": "2.15.0"},
    "host": "secret-host",
    "command": ["/secret/group/job.py"],
    "environment": {"cpu": "one", "variables": {"OMP_NUM_THREADS": "secret-value"}},
    "energy": {"kwh": 2.0, "measured": 1, "of": 1},
}
VALUES = ((10, 71.5), (20, 72.3))
TEACHER = b"not read by any test that does not repeat an evaluation"


def finish_runs(
    folder: Path,
    *,
    leave_out: tuple[str, ...] = ("linear",),
    overrides: tuple[str, ...] = (),
    values: tuple[tuple[int, float], ...] = VALUES,
    teacher: bytes = TEACHER,
    started: str = "2026-11-30T11:00:00+0000",
) -> Selection:
    """Record the runs of the reproduction as done, in a run root below the folder."""
    folder.mkdir(exist_ok=True)
    file = folder / "small.yaml"
    file.write_text(REPRODUCTION)
    selection = load_selection(str(file), overrides, (), folder / "runs")
    for run in selection.runs:
        if run.name in leave_out:
            continue
        run_dir = run.run_dir(selection.root)
        (run_dir / "attempts").mkdir(parents=True)
        (run_dir / "attempts" / "0001.json").write_text('{"time": 5.0, "host": "secret-host"}')
        outputs = {}
        rows = None
        if run.stage == "pretrain":
            (run_dir / "teacher.safetensors").write_bytes(teacher)
            (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
            digest = hashlib.sha256(teacher).hexdigest()
            path = f"pretrain/{run_dir.name}/teacher.safetensors"
            outputs["teacher"] = Output(path=path, size=len(teacher), sha256=digest)
        if run.stage == "knn":
            rows = f"knn/{run_dir.name}/rows.csv"
            write_rows(run_dir / "rows.csv", [knn_row(run.run_id, k, v) for k, v in values])
        record_entry(
            selection.root,
            ManifestEntry(
                stage=run.stage,
                name=run.name,
                run_id=run.run_id,
                upstream=dict(run.needs),
                config=dump_settings(run.config),
                info=INFO.get(run.stage, {}),
                outputs=outputs,
                rows=rows,
                provenance={**PROVENANCE, "started": started},
                finished=started.replace("T11", "T12"),
            ),
        )
    return selection


def knn_row(run_id: str, k: int, value: float, seed: int = 0) -> ResultRow:
    """A row of a k-NN evaluation."""
    setting = f"cls, k={k}, T=0.07"
    return ResultRow(
        run_id, "mugs", "vit_s16", 100, "knn", "imagenet1k", setting, "top1", value, "%", seed
    )


def make_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "b.zip") -> Path:
    """Write a bundle of the reproduction; drawing figures for the report would take seconds."""
    monkeypatch.setattr(bundle, "render_report", lambda *_, **__: "<p>report</p>")
    request = BundleRequest("small", folder / name, weights=True)
    return write_bundle(finish_runs(folder), request, [])[0]


def read_members(path: Path) -> Members:
    """Return the files of a bundle."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def seal(members: Members) -> Members:
    """Return the files with metadata and checksums that fit, as a careful forger would write."""
    found = dict(members)
    names = found.keys() - {bundle_content.CRATE, bundle_content.CHECKSUMS}
    checksums = {name: hashlib.sha256(found[name]).hexdigest() for name in names}
    sizes = {name: len(found[name]) for name in names}
    entries = []
    for name in sorted(names):
        if name.endswith("/entry.json"):
            try:
                entries.append(parse_entry(found[name]))
            except ValueError:
                continue
    crate = bundle_content.build_crate("small", sizes, checksums, entries)
    found[bundle_content.CRATE] = crate
    checksums[bundle_content.CRATE] = hashlib.sha256(crate).hexdigest()
    found[bundle_content.CHECKSUMS] = bundle_content.format_checksums(checksums)
    return found


def find_name(members: Members, *parts: str) -> str:
    """Return the one name that has all parts."""
    (name,) = (name for name in members if all(part in name for part in parts))
    return name


def change_json(*parts: str, change: Callable[[Any], Any], record: bool = False) -> Any:
    """Return what changes a JSON file; a `record` gets a checksum that fits."""

    def apply(members: Members) -> Members:
        name = find_name(members, *parts)
        value = json.loads(members[name])
        change(value)
        if record:
            value = with_checksum({key: v for key, v in value.items() if key != "sha256"})
        return members | {name: json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"}

    return apply


def change_text(old: str, new: str, *names: str) -> Any:
    """Return what changes a text in files."""

    def apply(members: Members) -> Members:
        changed = {name: members[name].replace(old.encode(), new.encode()) for name in names}
        assert changed != {name: members[name] for name in names}
        return members | changed

    return apply


def write_with_zipfile(path: Path, members: Members, **options: Any) -> None:
    """Write a bundle with the usual module, which makes what other programs make."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name in sorted(members):
            archive.writestr(name, members[name])


def patch_bytes(position: int, value: bytes, *, central: str | None = None) -> Any:
    """Return what changes bytes of a bundle: from its end, or of a member's central header."""

    def apply(path: Path, members: Members) -> None:
        write_archive(path, members)
        data = bytearray(path.read_bytes())
        start = len(data) if central is None else data.rindex(central.encode()) - 46
        data[start + position : start + position + len(value)] = value
        path.write_bytes(data)

    return apply
