"""What devices can do at most, from their data sheets; torch is not imported."""

# Dense peaks in TFLOP/s (bf16, TF32); the first name that is part of the device's counts.
PEAK_TFLOPS = {
    "H200": (989.0, 494.5),
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.0, 417.5),
    "H100": (989.0, 494.5),
    "A100": (312.0, 156.0),
}


def device_peak_tflops(name: str, precision: str) -> float | None:
    """Return the TFLOP/s of a device at "bf16" or "fp32" (taken as TF32); None if unknown."""
    found = [peaks for part, peaks in PEAK_TFLOPS.items() if part in name]
    return found[0][precision != "bf16"] if found else None
