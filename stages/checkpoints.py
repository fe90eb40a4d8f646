"""The checkpoints in a run's folder, looked through without torch."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mugs.storage.repair import Inspection


def inspect(run_dir: Path, *, repair: bool) -> "Inspection":
    """What is good and what is wrong; with `repair`, put right what can be."""
    from mugs.storage import repair as storage

    return storage.inspect(run_dir / "checkpoints", repair=repair)
