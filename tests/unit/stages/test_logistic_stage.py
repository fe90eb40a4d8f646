"""The logistic regression stage starts again: what is finished is kept,
what is damaged or of other features is not.
"""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stopping import NoteSaves

from mugs import distributed
from mugs.engine.control import NullControl
from mugs.evaluation import feature_store, logistic
from pipeline.reading import validate_model
from pipeline.stage import StageOutput
from stages import logistic as stage
from stages.logistic import LogisticConfig

CFG = validate_model(
    LogisticConfig,
    {"labelled": {"percent": 10, "by": "class_balanced"}, "penalties": (0.3, 0.1, 0.03)},
    "x.yaml",
)


class Store:
    def __init__(self, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(40, 6, generator=generator), torch.arange(40) % 4

    def load(self, split: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x, self.y


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Penalties in the order in which they are computed."""
    calls: list[float] = []

    def counted(*args: Any, penalty: float, **options: Any) -> logistic.LogisticFit:
        calls.append(penalty)
        return real(*args, penalty=penalty, **options)

    class Part(SimpleNamespace):
        def __len__(self) -> int:
            return 20

    real = logistic.fit_logistic_regression
    monkeypatch.setattr(logistic, "fit_logistic_regression", counted)
    monkeypatch.setattr(feature_store, "FeatureStore", Store)
    part = Part(indices=list(range(20)), classes=["a", "b", "c", "d"])
    monkeypatch.setattr(stage, "select_labelled_part", lambda *_: part)
    return calls


def run(folder: Path, features: str = "f" * 64, control: NullControl | None = None) -> StageOutput:
    info = {
        "method": "mugs",
        "arch": "vit_mini",
        "epochs": 1,
        "seed": 0,
        "weights": "teacher",
        "dataset": "d",
    }
    outputs = {"features": SimpleNamespace(sha256=features)}
    entry = SimpleNamespace(outputs=outputs, info=info, output=lambda _: folder)
    ctx = SimpleNamespace(
        run_dir=folder, run_id="r", stage="logistic", inputs={"features": entry}, control=control
    )
    return stage.run(ctx, CFG)  # type: ignore[arg-type]


def test_a_finished_penalty_is_not_computed_again(fitted: list[float], tmp_path: Path) -> None:
    straight = run(tmp_path / "straight")
    assert fitted == [0.3, 0.1, 0.03]
    run(tmp_path / "again")
    CFG.fit_path(tmp_path / "again", 0.03).unlink()  # as if it had ended after the second
    fitted.clear()
    control = NoteSaves()
    resumed = run(tmp_path / "again", control=control)
    assert fitted == [0.03]
    assert control.saves == [3], "else a stop at the time limit would end the run"
    assert (list(resumed.rows), resumed.info) == (list(straight.rows), straight.info)


def test_what_cannot_be_used_is_computed_again(
    fitted: list[float], tmp_path: Path, caplog: Any
) -> None:
    run(tmp_path)
    path = CFG.fit_path(tmp_path, 0.1)
    path.write_bytes(path.read_bytes()[:40])
    fitted.clear()
    run(tmp_path)
    assert fitted == [0.1] and f"{path}: not a readable result" in caplog.text
    fitted.clear()
    run(tmp_path, features="0" * 64)
    assert (
        fitted == [0.3, 0.1, 0.03]
        and "of other features; lambda 0.3 is computed again" in caplog.text
    )


def test_other_ranks_do_nothing_and_say_so(
    fitted: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert not run(tmp_path).rows and not fitted
    assert "nothing to do on rank 1: logistic regression runs on rank 0 of 2" in caplog.text
