"""The GPU benchmark runs in miniature on the CPU, and says so where there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import bench_gpu
import pytest
import torch

# Runs the benchmark with pydantic out of sight, as it is on a bare machine.
WITHOUT_PYDANTIC = """
import importlib.machinery, importlib.util, runpy, sys
find = importlib.util.find_spec
bare = ("pydantic", "pydantic_core")
hidden = lambda name, *rest: None if name in bare else find(name, *rest)
importlib.util.find_spec = hidden
class Refuse:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in bare:
            folders = [path for path in sys.path if path.endswith("bare")]
            found = importlib.machinery.PathFinder.find_spec(name, folders)
            if found is None:
                raise ModuleNotFoundError(name)
            return found
sys.meta_path.insert(0, Refuse())
path = sys.argv.pop(1)
sys.argv[0] = path
runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.slow
def test_miniature_without_pydantic(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_PYDANTIC, bench_gpu.__file__]
    out = tmp_path / "found.json"
    done = subprocess.run(
        [*command, "--tiny", "--out", str(out)],
        env={"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert {facts["section"] for facts in found} == set(bench_gpu.SECTIONS)
    assert not [facts for facts in found if "failed" in facts]
    (shown, *_) = [facts for facts in found if facts["section"] == "rates"]
    assert shown["img_s"] > 0 and shown["tflops"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(SystemExit, match="no GPU"):
        bench_gpu.main([])
