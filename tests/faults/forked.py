"""A campaign that forks, run in a process of its own, which has started no threads."""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from outcome import Outcome


def in_own_process(script: str, *arguments: object) -> Outcome:
    """Run `script`, which calls `answer`, with these arguments; the Outcome that it found."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run([sys.executable, script, file.name, *map(str, arguments)], check=True)
        return Outcome(**json.loads(Path(file.name).read_text()))


def answer(outcome: Outcome) -> None:
    """Hand the outcome to the process that waits for it."""
    Path(sys.argv[1]).write_text(json.dumps(asdict(outcome)))
