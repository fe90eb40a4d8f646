"""Forecasts of the k-NN curves that are not complete yet, for `status` and the report."""

import datetime
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import manifest
from pipeline.files import read_json
from pipeline.identity import science_fields
from pipeline.manifest import ManifestEntry
from pipeline.spec import ConfigError, StageRun
from results.forecast import FEWEST_RUNS, Forecast, forecast_end
from stages.commands.bundle_content import read_science
from stages.knn_curve import KnnCurveConfig

# Settings of a curve and of its pretraining but the seed, and the data of both.
Family = tuple[object, ...]


@dataclass(frozen=True)
class CurveForecast:
    """A k-NN curve that is begun and not complete, and how high and when it will end."""

    run: StageRun
    pretraining: StageRun
    # Accuracy by epoch, so far.
    curve: Mapping[int, float]
    # None if too few of the `finished` curves like it have a value at its epoch.
    forecast: Forecast | None
    finished: int
    # Until the end of the pretraining; None unless it is running and says so.
    seconds_left: float | None

    @property
    def ends(self) -> datetime.datetime | None:
        """When the pretraining ends."""
        if self.seconds_left is None:
            return None
        return datetime.datetime.now() + datetime.timedelta(seconds=self.seconds_left)

    @property
    def gpu_hours_left(self) -> float | None:
        """What the rest of the pretraining costs."""
        if self.seconds_left is None:
            return None
        return self.seconds_left / 3600 * self.pretraining.resources.gpus

    def describe(self) -> str:
        """Return it in one line."""
        said = (
            f"forecast unknown: {self.finished} finished runs like it, {FEWEST_RUNS} are needed"
            if self.forecast is None
            else self.forecast.describe()
        )
        line = f"{self.pretraining.name}: {said}"
        if self.seconds_left is None:
            return line
        cost = f" and {self.gpu_hours_left:.1f} GPU-hours" if self.gpu_hours_left else ""
        hours = self.seconds_left / 3600
        return f"{line}; ends {self.ends:%Y-%m-%d %H:%M}, after {hours:.1f} hours{cost} more"

    def to_json(self) -> dict[str, Any]:
        """Return it for programs; what is unknown is None."""
        found = self.forecast
        epoch = max(self.curve) if found is None else found.epoch
        return {
            "pretraining": self.pretraining.run_id,
            "epoch": epoch,
            "value": round(self.curve[epoch], 2),
            "expected": None if found is None else round(found.expected, 2),
            "low": None if found is None else round(found.low, 2),
            "high": None if found is None else round(found.high, 2),
            "finished_runs": self.finished if found is None else found.runs,
            "ends": self.ends and self.ends.astimezone().isoformat(timespec="minutes"),
            "gpu_hours_left": self.gpu_hours_left and round(self.gpu_hours_left, 2),
        }


def list_forecasts(
    runs: Sequence[StageRun], root: Path, seconds_left: Mapping[str, float]
) -> Iterator[CurveForecast]:
    """Yield a forecast for each k-NN curve that is begun, and not complete.

    Of pretrainings with `seconds_left`, by run id, it also knows when they end.
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
        left = seconds_left.get(pretraining.run_id)
        found = forecast_end(curve, others)
        yield CurveForecast(run, pretraining, curve, found, len(others), left)


def explain_missing_forecasts(
    runs: Sequence[StageRun],
    root: Path,
    forecasts: Collection[str],
    done: Collection[str],
    *,
    whole_root: bool,
) -> dict[str, str]:
    """Return why runs have no forecast, by run id.

    `forecasts` are the ids of the runs that have one, `done` those of finished runs. Of a
    `whole_root`, the settings of the runs are not known.
    """
    return {
        run.run_id: _explain_missing_forecast(run, root, run.run_id in done, whole_root)
        for run in runs
        if run.run_id not in forecasts
    }


def _explain_missing_forecast(run: StageRun, root: Path, done: bool, whole_root: bool) -> str:
    if run.stage != "knn_curve":
        return "no k-NN curve"
    if done:
        return "the curve is complete"
    if whole_root:
        return "name the reproduction for one"
    if not read_curve(run.run_dir(root)):
        return "the curve is not begun"
    return "its pretraining is not among these runs"


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
