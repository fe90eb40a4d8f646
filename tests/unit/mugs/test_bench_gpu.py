"""The GPU benchmark runs in miniature on the CPU, and says so where there is no GPU."""

from dataclasses import replace

import bench_gpu
import pytest
import torch
from step_cases import SMALLEST


def test_miniature(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "MODES", ("fp32", "bf16"))
    config = replace(SMALLEST, queue_size=64, memory_size=64)
    bench_gpu.table(
        {"tiny": bench_gpu.Setup(config, torch.device("cpu"), batch=4, sizes=(32, 16), steps=1)}
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["tiny", "fp32"], ["tiny", "bf16"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(SystemExit, match="no GPU"):
        bench_gpu.main()
