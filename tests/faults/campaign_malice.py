"""Files made to do harm: each is refused at once, runs no code,
and leads to no file outside the run root.
"""

import logging
import tempfile
from pathlib import Path

from malice import Case, harm
from malicious_records import entries, inputs, records, yamls
from malicious_weights import bombs, headers
from outcome import Outcome

NAME = "5_malicious_files"
LIMIT_S = 1.0


def cases() -> dict[str, Case]:
    """All of them by name."""
    return dict(
        [*bombs(), *headers(), *records(), *entries(), *yamls(), ("run file, input ../", inputs)]
    )


def run() -> Outcome:
    """Every case, in a folder of its own."""
    outcome, slowest = Outcome(NAME), 0.0
    logging.getLogger().addHandler(logging.NullHandler())
    for name, case in cases().items():
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
