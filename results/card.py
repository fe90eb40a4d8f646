"""The card of a backbone on the Hugging Face Hub: its README.md, with results for programs."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml

from pipeline.text import clean_line
from results import spec
from results.cells import format_value
from results.collect import CollectedResults
from results.explain import describe_code, describe_energy
from results.runs import FinishedRun, iter_with_upstream
from results.schema import Result
from results.tables import OurCell, build_tables
from results.variants import format_setting
from results.verdict import DEFAULT_MARGIN, describe_method, describe_verdict
from results.vocabulary import describe_setting, load_vocabulary

# Names of tasks on the Hub, by stage; the others classify images.
TASKS = {
    "coco_detection": "object-detection",
    "ade20k_segmentation": "image-segmentation",
    "davis_segmentation": "mask-generation",
}
# What the networks of a pretraining are, by the name of the weights.
NETWORKS = {
    "teacher": "A vision transformer that was pretrained without labels.",
    "student": "The student of a vision transformer that was pretrained without labels; results\n"
    "are usually those of its teacher.",
    "initial": "A vision transformer as it was **before** its pretraining: its weights are\n"
    "random, and it learned nothing. It shows what the pretraining adds.",
}
_EXAMPLE = 'import timm\n\nmodel = timm.create_model("hf-hub:USER/NAME", pretrained=True)'
METRIC_TYPES = {"top1": "accuracy"}


@dataclass(frozen=True)
class CardResult:
    """A number of a backbone, with the printed one and the verdict if there is one."""

    result: Result
    paper: float | None
    verdict: str

    def describe(self) -> dict[str, Any]:
        """Return it as the Hub reads it, in `model-index`."""
        row = self.result.row
        arguments: dict[str, Any] = {"protocol": row.stage, "setting": row.setting}
        if self.paper is not None:
            arguments |= {"paper": self.paper, "verdict": self.verdict}
        return {
            "task": {"type": TASKS.get(row.stage, "image-classification")},
            "dataset": {
                "name": load_vocabulary().dataset_title(row.dataset),
                "type": row.dataset,
            },
            "metrics": [
                {
                    "type": METRIC_TYPES.get(row.metric, row.metric),
                    "name": f"{row.metric}, {row.stage}",
                    "value": round(row.value, 3),
                    "args": arguments,
                }
            ],
        }


def list_card_results(
    run: FinishedRun, weights: str, collection: CollectedResults
) -> list[CardResult]:
    """Return the numbers in tables that are of one network of a pretraining."""
    found: dict[Result, CardResult] = {}
    for table in build_tables(collection.results, spec.table_names()):
        for ours in table.our_cells():
            for result in ours.cell.results:
                known = found.get(result)
                if not _is_of(result, run, weights, collection):
                    continue
                # Several tables may have it; one of them has the printed number.
                if known is None or known.paper is None:
                    found[result] = CardResult(result, ours.paper, _decide(ours, result))
    rows = found.values()
    return sorted(
        rows,
        key=lambda each: (each.result.row.dataset, each.result.row.stage, each.result.row.metric),
    )


def _is_of(result: Result, run: FinishedRun, weights: str, collection: CollectedResults) -> bool:
    for user in iter_with_upstream(result.row.run_id, collection.runs):
        if run.run_id in user.upstream.values():
            return str(user.config.get("weights", "teacher")) == weights
    return False


def _decide(ours: OurCell, result: Result) -> str:
    if ours.paper is None:
        return ""
    # Of several seeds, this backbone is one.
    alone = replace(ours.cell, value=result.row.value, spread=None, results=(result,))
    return describe_verdict(alone, ours.paper, DEFAULT_MARGIN)


def render_card(
    run: FinishedRun,
    weights: str,
    collection: CollectedResults,
    *,
    mark: str,
    sizes: tuple[int, int],
    co2: float | None = None,
) -> str:
    """Return the card.

    `mark` is the tag by which we know it. `sizes` are the shorter side that images are resized to,
    and the side of the middle that is taken of them. `co2` are grams of CO2 for each kWh.
    """
    vocabulary = load_vocabulary()
    method = vocabulary.method_title(str(run.info.get("method", "")))
    arch = vocabulary.arch_title(str(run.info.get("arch", "")))
    trained = "not trained" if weights == "initial" else f"{run.info.get('epochs')} epochs"
    network = ", student" if weights == "student" else ""
    title = clean_line(f"{method} {arch}, {trained}{network}")
    results = list_card_results(run, weights, collection)
    head: dict[str, Any] = {
        "tags": [mark, "self-supervised-learning"],
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
    }
    if results:
        found = [each.describe() for each in results]
        head["model-index"] = [{"name": title, "results": found}]
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---\n",
        f"# {title}\n",
        f"{NETWORKS.get(weights, NETWORKS['teacher'])} It turns an image into a\n"
        "vector: for k-NN, linear probes, retrieval and as a start for fine-tuning. It names no\n"
        "classes, and was not tested for decisions about people.\n",
        "## Use\n",
        f"```python\n{_EXAMPLE}\n```\n",
        "From disk, `local-dir:FOLDER` takes the place of `hf-hub:USER/NAME` (timm 1.0.16 or\n"
        f"newer). Images: the shorter side resized to {sizes[0]} pixels, of it the middle\n"
        f"{sizes[1]} x {sizes[1]}, normalized with the mean and standard deviation of ImageNet.\n"
        "`timm.data.create_transform(**timm.data.resolve_model_data_config(model))` does it.\n",
        "## Data\n",
        "\n".join(_describe_data(run, collection)) + "\n",
        "## Results\n",
        "\n".join(_tabulate(results)) + "\n",
        "## Training\n",
        "\n".join(_describe_training(run, weights, co2)) + "\n",
        "## License\n",
        "None is stated. Add one before you upload this folder, and look whether that of the\n"
        "images says something of networks trained on them.\n",
    ]
    return "\n".join(parts)


def _describe_data(run: FinishedRun, collection: CollectedResults) -> Iterator[str]:
    data = collection.runs.get(run.upstream.get("data", ""))
    if data is None:
        yield "- weights of others, which were imported; see their source for the data"
        return
    title = load_vocabulary().dataset_title(str(data.info.get("dataset", "")))
    yield f"- pretrained on the images of {_plain(title)}, without their labels"
    yield from (f"- {_plain(note)}" for note in data.info.get("notes") or ())


def _tabulate(results: list[CardResult]) -> Iterator[str]:
    if not results:
        yield "None yet."
        return
    compared = any(each.paper is not None for each in results)
    titles = ["data set", "protocol", "setting", "metric", "here"]
    # Without a printed number there is no verdict either, and nothing to explain about it.
    titles += ["paper", "verdict"] if compared else []
    yield f"| {' | '.join(titles)} |"
    yield "|---|---|---|---|---:|---:|---|" if compared else "|---|---|---|---|---:|"
    for each in results:
        row = each.result.row
        cells = [
            load_vocabulary().dataset_title(row.dataset),
            row.stage,
            describe_setting(row.stage, row.setting),
            row.metric,
            format_value(row.value),
        ]
        if compared:
            cells += ["" if each.paper is None else format_value(each.paper), each.verdict]
        yield f"| {' | '.join(map(_plain, cells))} |"
    if compared:
        yield ""
        yield from describe_method(DEFAULT_MARGIN)


def _describe_training(run: FinishedRun, weights: str, co2: float | None) -> Iterator[str]:
    yield f"- network: {weights}"
    yield f"- cost: {run.gpu_hours:g} GPU-hours{describe_energy(run, co2)}; {run.restarts} restarts"
    yield f"- code: {describe_code(run)}"
    yield f"- run: {_plain(run.name)}-{run.run_id}"
    yield ""
    yield "Settings that can change a result:"
    yield ""
    yield "```yaml"
    for key, value in sorted(run.science().items()):
        yield clean_line(f"{key}: {json.dumps(value) if value is None else format_setting(value)}")
    yield "```"


def _plain(text: object) -> str:
    """Return a text without markup of its own."""
    return "".join(f"\\{sign}" if sign in "|*_`\\<[" else sign for sign in clean_line(str(text)))
