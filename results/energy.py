"""Energy that GPUs counted, in words: of a run, and of several together."""

from collections.abc import Iterable, Mapping

from results.runs import FinishedRun

Energy = Mapping[str, float]
"""`kwh`, of so many `measured` GPUs `of` all, over all attempts; empty without a counter."""


def sum_energy_of_runs(runs: Iterable[FinishedRun]) -> Energy:
    """Return the energy of runs together; empty if none was measured.

    GPUs of a run without a counter are not measured, so what is told is a part of all.
    """
    energies = []
    unmeasured = 0
    for run in runs:
        if run.energy:
            energies.append(run.energy)
        else:
            unmeasured += run.gpus
    if not energies:
        return {}
    total = {name: sum(energy[name] for energy in energies) for name in ("kwh", "measured", "of")}
    return {**total, "of": total["of"] + unmeasured}


def format_energy(energy: Energy, co2: float | None = None, whose: str = "") -> str:
    """Return `1.2 kWh`, followed by `whose`; "" if it was not measured.

    With `co2`, grams for each kWh, also the kg of CO2: `1.2 kWh (0.46 kg CO2 at 380 g/kWh)`.
    """
    if not energy:
        return ""
    kwh = f"{energy['kwh']:.4g} kWh{whose}"
    if co2 is not None:
        kwh += f" ({energy['kwh'] * co2 / 1000:.4g} kg CO2 at {co2:g} g/kWh)"
    measured, of = energy["measured"], energy["of"]
    if measured == of:
        return kwh
    return f"at least {kwh} ({measured:g} of {of:g} measured, over all attempts)"
