"""Repeat the runs of a reproduction with other seeds: the trainings, and all that needs them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.spec import ConfigError, StageConfig

MOST_SEEDS = 100
# Planning takes a millisecond for each; a file of 256 KB could ask for a million.
MOST_RUNS = 20_000
EXPECTED = "expected different whole numbers from 0 on, such as 0 1 2"


def check_seeds(seeds: Any, where: str) -> tuple[int, ...]:
    """Return the seeds that a file or an option gives.

    Raises:
        ConfigError: they are not different whole numbers from 0 on.
    """
    if not isinstance(seeds, list | tuple) or not seeds or len(seeds) > MOST_SEEDS:
        raise ConfigError(f"{where}: {EXPECTED}, got {seeds!r}")
    # True and False are whole numbers to Python.
    whole = all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{where}: {EXPECTED}, got {list(seeds)!r}")
    return tuple(seeds)


def parse_seeds(given: Sequence[str]) -> tuple[int, ...]:
    """Return the seeds of `--seeds 0 1 2`, `--seeds 0,1,2` or `--seeds 0 --seeds 1`.

    Raises:
        ConfigError: as `check_seeds`.
    """
    texts = [part.strip() for text in given for part in text.split(",")]
    if not all(text.isascii() and text.isdigit() and len(text) < 10 for text in texts):
        raise ConfigError(f"--seeds {' '.join(given)}: {EXPECTED}")
    return check_seeds([int(text) for text in texts], "--seeds")


class SeedPlan:
    """Which runs of a reproduction there are with which seeds.

    `runs` are those of the file, `seeds` those of the command line or of the whole file. A run that
    is trained from a seed (`StageConfig.repeats_with_seed`) is repeated, and so are all runs that
    need it. With the seed that the file gives it, a run keeps its name and its id.
    """

    def __init__(self, source: str, runs: Mapping[str, Any], seeds: Sequence[int]) -> None:
        self.source = source
        self.runs = runs
        self.seeds = tuple(seeds)
        self._found: dict[str, tuple[int, ...]] = {}
        self._kept: dict[tuple[str, int], bool] = {}

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """Return the seeds of a run; none if seeds do not concern it.

        Raises:
            ConfigError: runs that it needs have different ones.
        """
        if name not in self.runs:
            return ()  # a mistake that is reported when the runs are put in order
        if name not in self._found:
            # Runs that need each other in a circle are reported later too.
            self._found[name] = ()
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> tuple[int, ...]:
        run = self.runs[name]
        needed = {filler: self.seeds_of(filler) for filler in run.needs.values()}
        lists = {filler: seeds for filler, seeds in needed.items() if seeds}
        if len(set(lists.values())) > 1:
            told = ", ".join(f"{filler} {list(seeds)}" for filler, seeds in lists.items())
            raise ConfigError(
                f"{self.source}: runs.{name}.needs: runs with different seeds: {told}"
            )
        inherited = next(iter(lists.values()), ())
        if not run.config.repeats_with_seed():
            return inherited
        own: tuple[int, ...] = self.seeds or run.seeds
        if own and inherited and own != inherited:
            raise ConfigError(
                f"{self.source}: runs.{name}.seeds: {list(own)}, but it needs runs with the seeds"
                f" {list(inherited)}"
            )
        return own or inherited

    def name(self, name: str, seed: int) -> str:
        """Return the name of a run with a seed: its own with the seed that the file gives it."""
        if not self.seeds_of(name):
            return name
        key = (name, seed)
        if key not in self._kept:
            run = self.runs[name]
            as_written = not run.config.repeats_with_seed() or run.config.seed == seed
            self._kept[key] = as_written and all(
                self.name(each, seed) == each for each in run.needs.values()
            )
        return name if self._kept[key] else f"{name}_seed{seed}"

    def repeat(self) -> dict[str, Any]:
        """Return all runs, by name.

        Raises:
            ConfigError: two runs would have the same name, or there is nothing to repeat.
        """
        try:
            count = sum(len(self.seeds_of(name)) or 1 for name in self.runs)
        except RecursionError:
            problem = "needs: runs need each other over too many others"
            raise ConfigError(f"{self.source}: runs: {problem}") from None
        if count > MOST_RUNS:
            raise ConfigError(
                f"{self.source}: {count} runs with all seeds, more than {MOST_RUNS}; write several"
                " reproductions"
            )
        repeated: dict[str, Any] = {}
        for name, run in self.runs.items():
            for seed in self.seeds_of(name) or (None,):
                made = run if seed is None else self._with_seed(name, seed)
                if made.name in repeated or (made.name != name and made.name in self.runs):
                    raise ConfigError(f"{self.source}: runs: two runs are named {made.name!r}")
                repeated[made.name] = made
        if self.seeds and not any(map(self.seeds_of, self.runs)):
            raise ConfigError(
                f"{self.source}: seeds: nothing here is trained from a seed; imported weights have"
                " the seed that they were trained with"
            )
        return repeated

    def _with_seed(self, name: str, seed: int) -> Any:
        run = self.runs[name]
        changed = self.name(name, seed)
        own_name = run.own_name if changed == name else f"{run.own_name}_seed{seed}"
        as_written = run.as_written
        if as_written is not None:
            config = _put_seed(as_written.config, seed)
            as_written = replace(as_written, name=changed, config=config)
        return replace(
            run,
            name=changed,
            own_name=own_name,
            written_name=name,
            config=_put_seed(run.config, seed),
            needs={role: self.name(filler, seed) for role, filler in run.needs.items()},
            as_written=as_written,
        )


def _put_seed(config: StageConfig, seed: int) -> StageConfig:
    """Return the settings with another seed, if the run is trained from one."""
    if not config.repeats_with_seed():
        return config
    changed: Any = {"seed": seed}
    return replace(config, **changed)
