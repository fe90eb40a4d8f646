"""One rank of a probe (`doctor --probe`): `python -m slurm.node.probe FOLDER`."""

import sys
from pathlib import Path

from pipeline.ownership import keep_others_from_writing
from pipeline.runfile import import_by_name
from slurm.node.rendezvous import join_rendezvous

if __name__ == "__main__":
    keep_others_from_writing()
    launch = join_rendezvous()
    # By name, as for stages: this package knows neither them nor torch.
    import_by_name("stages.shared.probe:probe_rank")(Path(sys.argv[1]), launch.rank)
