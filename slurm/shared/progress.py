"""How far a run is, by the file that its newest attempt rewrites every second or so."""

from pathlib import Path
from typing import Any

from pipeline.files import read_json

FILE_NAME = "progress.json"
_FIELDS: dict[str, type] = {
    "phase": str,
    "done": float,
    "total": float,
    "unit": str,
    "rate": float,
    "rate_unit": str,
    "eta_s": float,
    "time": float,
}


def read_progress(run_dir: Path) -> dict[str, Any]:
    """Return what the file says; {} if there is none or it cannot be read."""
    return read_json(run_dir / FILE_NAME, _FIELDS) or {}
