"""What a training has written to its metrics.jsonl since the last look, each step once.

It only reads. The training appends to its file and never waits for a reader, so a sink that hangs,
crashes or is killed changes nothing of it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """The values of one line, by name, after `step` (counted from 0)."""

    step: int
    values: Mapping[str, float]


@dataclass
class MetricsReader:
    """Reads a metrics.jsonl from where it stopped.

    A run that was killed resumes from its last checkpoint and writes the steps since then again.
    They belong to the same curve, so a value of a step that was already read is left out.
    """

    path: Path
    # Bytes of the file that were read.
    position: int = 0
    # The last step of each value.
    last: dict[str, int] = field(default_factory=dict)

    def read_new(self) -> Iterator[Point]:
        """Yield what was added since the last call; nothing if there is no file."""
        if not self.path.is_file():
            return
        # A shorter file is another one: it was copied back or made again.
        if self.path.stat().st_size < self.position:
            self.position = 0
        with self.path.open("rb") as file:
            file.seek(self.position)
            for line in file:
                # The training is writing this line.
                if not line.endswith(b"\n"):
                    return
                self.position += len(line)
                point = self._take_new(line)
                if point is not None:
                    yield point

    def _take_new(self, line: bytes) -> Point | None:
        try:
            content = json.loads(line)
            step = int(content["step"])
        except (ValueError, TypeError, KeyError):
            return None  # cut off when the job was killed
        values = {
            name: value
            for name, value in list_numbers(content)
            if name != "step" and step > self.last.get(name, -1)
        }
        self.last.update(dict.fromkeys(values, step))
        return Point(step, values) if values else None


def list_numbers(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line; those of a part of it have names such as `checkpoint/bytes`."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from list_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)
