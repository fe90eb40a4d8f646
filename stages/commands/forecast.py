"""Forecasts of the k-NN curves that are not complete yet, for `status` and the report."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import manifest
from pipeline.files import read_json
from pipeline.identity import science_fields
from pipeline.manifest import ManifestEntry
from pipeline.spec import ConfigError, StageRun
from results.forecast import FEWEST_RUNS, forecast_end
from stages.commands.bundle_content import read_science
from stages.knn_curve import KnnCurveConfig

# Settings of a curve and of its pretraining but the seed, and the data of both.
Family = tuple[object, ...]


def list_forecasts(
    runs: Sequence[StageRun], root: Path, seconds_left: Mapping[str, float]
) -> Iterator[str]:
    """Yield a line for each pretraining whose k-NN curve is begun, and not complete.

    It says how high the curve will end; or what is missing to say it. Of runs with `seconds_left`,
    by run id, it also says when they end, and what that costs.
    """
    by_id = {run.run_id: run for run in runs}
    open_curves = [
        (run, curve)
        for run in runs
        if isinstance(run.config, KnnCurveConfig)
        if run.needs.get("weights") in by_id
        if manifest.read_entry(root, run.run_id) is None
        if (curve := read_curve(run.run_dir(root)))
    ]
    if not open_curves:
        return
    finished = _collect_finished(root)
    for run, curve in open_curves:
        pretraining = by_id[run.needs["weights"]]
        others = finished.get(_find_family(run, pretraining), [])
        found = forecast_end(curve, others)
        said = (
            f"forecast unknown: {len(others)} finished runs like it, {FEWEST_RUNS} are needed"
            if found is None
            else found.describe()
        )
        yield f"{pretraining.name}: {said}{_describe_end(pretraining, seconds_left)}"


def read_curve(run_dir: Path) -> dict[int, float]:
    """Return the accuracy after each epoch that a curve has so far, at its first k and temperature.

    What is no record of an epoch is left out.
    """
    found = {}
    for path in sorted((run_dir / "epochs").glob("epoch_*.json")):
        record: Any = read_json(path)
        try:
            epoch = record["epoch"]
            value = record["top1"][0][2]
        except (TypeError, LookupError):
            continue
        if isinstance(epoch, int) and isinstance(value, int | float) and 0 <= value <= 100:
            found[epoch] = float(value)
    return found


def _collect_finished(root: Path) -> dict[Family, list[dict[int, float]]]:
    """Return the complete curves of a run root by what they have in common."""
    found: dict[Family, list[dict[int, float]]] = {}
    for run_id in manifest.list_run_ids(root):
        entry = manifest.read_entry(root, run_id)
        if entry is None or entry.stage != "knn_curve":
            continue
        weights = manifest.read_entry(root, entry.upstream.get("weights", "none"))
        curve = read_curve(entry.run_dir)
        if weights is None or not curve:
            continue
        try:
            family = _find_recorded_family(entry, weights)
        except ConfigError:
            continue  # recorded by code that had other settings
        # A curve that lacks its end would count its last value as the end.
        if max(curve) == weights.config.get("epochs"):
            found.setdefault(family, []).append(curve)
    return found


def _find_family(run: StageRun, pretraining: StageRun) -> Family:
    return _make_family(
        science_fields(run.config),
        run.needs,
        science_fields(pretraining.config),
        pretraining.needs,
    )


def _find_recorded_family(entry: ManifestEntry, weights: ManifestEntry) -> Family:
    return _make_family(
        read_science(entry), entry.upstream, read_science(weights), weights.upstream
    )


def _make_family(
    curve: Mapping[str, Any],
    curve_needs: Mapping[str, str],
    pretraining: Mapping[str, Any],
    pretraining_needs: Mapping[str, str],
) -> Family:
    unseeded = {key: value for key, value in pretraining.items() if key != "seed"}
    return (
        repr(sorted(curve.items())),
        curve_needs.get("data"),
        repr(sorted(unseeded.items())),
        tuple(sorted(pretraining_needs.items())),
    )


def _describe_end(run: StageRun, seconds_left: Mapping[str, float]) -> str:
    seconds = seconds_left.get(run.run_id)
    if seconds is None:
        return ""
    end = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
    hours = seconds / 3600 * run.resources.gpus
    cost = f" and {hours:.1f} GPU-hours" if hours else ""
    return f"; ends {end:%Y-%m-%d %H:%M}, after {seconds / 3600:.1f} hours{cost} more"
