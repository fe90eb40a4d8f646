"""The job of a keeper: look after the runs of a reproduction once.

`python -m slurm.node.keep NOTE SHA256`; see `slurm/submission/keeper.py`.

Exit codes: 0 the keeper has done its work, 2 the note is not what the job was submitted with, 75
Slurm did not answer in time: the batch script starts this job again.
"""

import logging
import sys
import time
from pathlib import Path

from pipeline.ownership import keep_others_from_writing
from pipeline.spec import ConfigError
from slurm.shared.exit_codes import EXIT_INTERRUPTED
from slurm.shared.queue import SlurmError
from slurm.submission.keeper import keep_going

logger = logging.getLogger("slurm.node.keep")  # `__name__` is "__main__" under `python -m`
_PATIENCE_S = 1200.0  # a restart of the controller takes minutes
_PAUSE_S = 30.0


def main(arguments: list[str]) -> int:
    """Run the command line, `NOTE SHA256`, and return the exit code of the job."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    keep_others_from_writing()
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            found = keep_going(Path(arguments[0]), arguments[1])
        except ConfigError as error:
            logger.error("%s", error)
            return 2
        except SlurmError as error:
            problem = str(error)
        else:
            logger.info("%s; submitted: %s", found.state, ", ".join(found.submitted) or "nothing")
            for reason in found.reasons:
                logger.info("%s", reason)
            if found.state != "unknown":
                return 0
            problem = "; ".join(found.reasons)
        logger.warning("%s", problem)
        if time.monotonic() > end:
            return EXIT_INTERRUPTED
        time.sleep(_PAUSE_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
