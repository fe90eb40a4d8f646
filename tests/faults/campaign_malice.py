"""Files made to do harm: each is refused at once, runs no code,
and leads to no file outside the run root.
"""

import logging
import tempfile
from pathlib import Path

from malice import harm
from malicious_records import ENTRIES, RECORDS, YAMLS
from malicious_weights import BOMBS, LIES
from outcome import Outcome

NAME = "5_malicious_files"
LIMIT_S = 1.0


CASES = {**BOMBS, **LIES, **RECORDS, **ENTRIES, **YAMLS}


def run() -> Outcome:
    """Every case, in a folder of its own."""
    outcome, slowest = Outcome(NAME), 0.0
    logging.getLogger().addHandler(logging.NullHandler())
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            found, seconds = harm(case, Path(folder))
        outcome.trials += 1
        slowest = max(slowest, seconds)
        outcome.expect(not found, f"{name}: {found}")
        outcome.expect(seconds < LIMIT_S, f"{name}: took {seconds:.1f} s")
    outcome.note = (
        f"pickles, safetensors headers, records, entries, YAML; slowest refusal {slowest:.2f} s"
    )
    return outcome
