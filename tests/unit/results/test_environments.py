"""What `--explain` and the report say of the environments of runs."""

from collections.abc import Callable
from typing import Any

from results.collect import CollectedResults
from results.environments import describe_environment, list_environment_differences
from results.explain import explain_cell
from results.runs import run_from_entry
from results.schema import Result

Make = Callable[..., list[Result]]

COMMON = {
    "python": "CPython 3.11.4",
    "kernel": "Linux 5.15",
    "driver": "535.104.05",
    "gpus": ["NVIDIA H200, 139 GiB, capability 9.0"],
    "packages": {"numpy": "2.0.0", "torch": "2.4.0"},
    "slurm": {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]"},
    "variables": {"OMP_NUM_THREADS": "1"},
}


def run(name: str, **changes: Any) -> Any:
    environment = COMMON | changes if changes or name != "old" else {}
    entry = {
        "stage": "knn",
        "name": name,
        "run_id": name,
        "provenance": {"environment": environment},
    }
    return run_from_entry(entry)


def test_only_what_differs_is_told_with_its_runs() -> None:
    runs = [
        run("a"),
        run(
            "b", driver="550.54.15", packages={"numpy": "2.0.0", "torch": "2.5.1", "scipy": "1.14"}
        ),
        run("c", slurm={"SLURM_JOB_ID": "18"}, batch_script="submission.sh, SHA-256 0"),
        run("old"),
    ]
    assert list_environment_differences(runs) == [
        "driver: 535.104.05 (a, c); 550.54.15 (b)",
        "packages.scipy: 1.14 (b); none (a, c)",
        "packages.torch: 2.4.0 (a, c); 2.5.1 (b)",
    ]
    assert list_environment_differences([runs[0], runs[2], runs[3]]) == []


def test_a_run_that_computes_without_torch_has_no_other_cuda() -> None:
    with_torch = [run("a", cuda="13.2"), run("b", cuda="13.2")]
    assert list_environment_differences([*with_torch, run("convert")]) == []
    differ = list_environment_differences([with_torch[0], run("b", cuda="12.8"), run("convert")])
    assert differ == ["cuda: 12.8 (b); 13.2 (a)"]


def test_threads_of_ranks_are_told_last_and_once() -> None:
    runs = [
        run(name, driver=driver, variables={"OMP_NUM_THREADS": n, "MKL_NUM_THREADS": n, "Z": n})
        for name, driver, n in (("a", "1", "1"), ("b", "2", "2"))
    ]
    assert list_environment_differences(runs) == [
        "driver: 1 (a); 2 (b)",
        "variables.Z: 1 (a); 2 (b)",
        "threads of a rank, which follow from its settings (MKL_NUM_THREADS, OMP_NUM_THREADS): "
        "1 (a); 2 (b)",
    ]


def test_explain_shows_environments_and_their_differences(results: Make) -> None:
    rows = results({"run_id": "a"}, {"run_id": "b", "seed": 1})
    runs = {"a": run("a"), "b": run("b", driver="550.54.15")}
    text = explain_cell(CollectedResults(tuple(rows), runs), "table1", "mugs vit-s/16 3200", "k-nn")
    assert text.count("  environment: python CPython 3.11.4, kernel Linux 5.15\n") == 2
    assert text.endswith(
        "\nthe environments of these runs differ:\n  driver: 535.104.05 (a); 550.54.15 (b)\n"
    )
    alone = CollectedResults(tuple(rows[:1]), runs)
    assert "differ" not in explain_cell(alone, "table1", "mugs vit-s/16 3200", "k-nn")


def test_lines_of_one_run() -> None:
    assert describe_environment(run("a").environment) == [
        "python CPython 3.11.4, kernel Linux 5.15",
        "gpus [NVIDIA H200, 139 GiB, capability 9.0], driver 535.104.05",
        "slurm: SLURM_JOB_ID=17, SLURM_JOB_NODELIST=n[1-2]",
        "variables: OMP_NUM_THREADS=1",
        "2 installed packages, listed in the record of the run",
    ]
    assert describe_environment(run("old").environment) == []
