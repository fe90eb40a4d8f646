"""Where runs are kept, and on which cluster they run."""

import os
from pathlib import Path

from pipeline.provenance import code_root
from pipeline.spec import ConfigError
from slurm.submission.profile import ClusterProfile, load_profile

RUN_ROOT_VARIABLE = "MUGS_RUN_ROOT"
DEFAULT_RUN_ROOT = "~/mugs-runs"


def choose_run_root(given: Path | None, cluster: str | None) -> Path:
    """Return the given run root, else the profile's, else MUGS_RUN_ROOT, else ~/mugs-runs.

    Raises:
        ConfigError: there is no such profile, or the run root is inside the checkout.
    """
    profile = None if cluster is None else load_profile(cluster)  # also checked if not needed
    if given is not None:
        return given.expanduser().absolute()
    chosen = os.environ.get(RUN_ROOT_VARIABLE) or DEFAULT_RUN_ROOT
    root = profile.run_root if profile else Path(chosen).expanduser().absolute()
    if root.is_relative_to(code_root()):
        raise ConfigError(f"run root {root} is inside the checkout; name another with --run-root")
    return root


def load_profile_at(cluster: str, given: Path | None) -> ClusterProfile:
    """Return the cluster's profile with the run root that `choose_run_root` chooses."""
    return load_profile(cluster).model_copy(update={"run_root": choose_run_root(given, cluster)})
