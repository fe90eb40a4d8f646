"""The files of pinned versions agree where they must."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What decides about CUDA; all else is the same for every driver.
OF_CUDA = re.compile(r"(torch|torchvision|triton|nvidia-.*|cuda-.*)==")


def read_pins(name: str) -> set[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {line.lower().replace("_", "-") for line in lines if line and line[0] != "#"}


def test_the_versions_for_cuda_12_differ_only_in_what_belongs_to_cuda() -> None:
    newest = read_pins("constraints.txt")
    cuda12 = read_pins("constraints-cuda12.txt")
    assert {pin for pin in newest ^ cuda12 if not OF_CUDA.match(pin)} == set()
    assert any(pin.startswith("nvidia-cuda-runtime-cu12==12.") for pin in cuda12)
    assert not any(re.match(r"nvidia-.*-cu13==", pin) for pin in cuda12)
