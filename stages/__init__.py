"""The stages there are: thin glue from a configuration and inputs to `mugs` and back to files and rows."""

from __future__ import annotations

from pipeline.spec import Resources, StageSpec
from stages.ade20k_data import Ade20kDataConfig
from stages.ade20k_segmentation import Ade20kSegmentationConfig
from stages.attention import AttentionConfig
from stages.coco_data import CocoDataConfig
from stages.coco_detection import CocoDetectionConfig
from stages.convert import ConvertConfig
from stages.davis_data import DavisDataConfig
from stages.davis_segmentation import DavisSegmentationConfig
from stages.features import FeaturesConfig
from stages.finetune import FinetuneStageConfig
from stages.import_weights import ImportConfig
from stages.knn import KnnConfig
from stages.knn_curve import KnnCurveConfig
from stages.linear import LinearConfig
from stages.logistic import LogisticConfig
from stages.pretrain import PretrainConfig

WEIGHTS = "pretrain|import"
FROZEN = {
    "data": "convert?",
    "weights": f"{WEIGHTS}?",
    "features": "features?",
}  # either features, or the other two

STAGES: dict[str, StageSpec] = {
    "convert": StageSpec(
        name="convert",
        config=ConvertConfig,
        entrypoint="stages.convert:run",
        preflight="stages.convert:preflight",
        check="stages.convert:check",
        resources=Resources(gpu=False, cpus_per_rank=16, hours=4.0),
    ),
    "pretrain": StageSpec(
        name="pretrain",
        config=PretrainConfig,
        entrypoint="stages.pretrain:run",
        needs={"data": "convert"},
        resources=Resources(nodes=1, ranks_per_node=8, hours=36.0),
    ),
    "import": StageSpec(
        name="import",
        config=ImportConfig,
        entrypoint="stages.import_weights:run",
        preflight="stages.import_weights:preflight",
        resources=Resources(gpu=False, cpus_per_rank=4, hours=0.5),
    ),
    "features": StageSpec(
        name="features",
        config=FeaturesConfig,
        entrypoint="stages.features:run",
        needs={"data": "convert", "weights": WEIGHTS},
        resources=Resources(ranks_per_node=8, hours=2.0),
    ),
    "knn": StageSpec(
        name="knn",
        config=KnnConfig,
        entrypoint="stages.knn:run",
        needs=FROZEN,
        resources=Resources(ranks_per_node=1, hours=2.0),
    ),
    "knn_curve": StageSpec(
        name="knn_curve",
        config=KnnCurveConfig,
        entrypoint="stages.knn_curve:run",
        needs={"data": "convert", "weights": "pretrain"},
        resources=Resources(ranks_per_node=1, hours=12.0),
    ),
    "linear": StageSpec(
        name="linear",
        config=LinearConfig,
        entrypoint="stages.linear:run",
        needs=FROZEN,
        resources=Resources(ranks_per_node=8, hours=24.0),
    ),
    "logistic": StageSpec(
        name="logistic",
        config=LogisticConfig,
        entrypoint="stages.logistic:run",
        preflight="stages.logistic:preflight",
        needs={"features": "features"},
        resources=Resources(ranks_per_node=1, hours=4.0),
    ),
    "attention": StageSpec(
        name="attention",
        config=AttentionConfig,
        entrypoint="stages.attention:run",
        needs={"data": "convert", "weights": WEIGHTS},
        resources=Resources(ranks_per_node=1, hours=0.5),
    ),
    "finetune": StageSpec(
        name="finetune",
        config=FinetuneStageConfig,
        entrypoint="stages.finetune:run",
        preflight="stages.finetune:preflight",
        needs={"data": "convert", "weights": WEIGHTS},
        resources=Resources(ranks_per_node=4, hours=24.0),
    ),
    "ade20k_data": StageSpec(
        name="ade20k_data",
        config=Ade20kDataConfig,
        entrypoint="stages.ade20k_data:run",
        preflight="stages.ade20k_data:preflight",
        resources=Resources(gpu=False, cpus_per_rank=16, hours=1.0),
    ),
    "ade20k_segmentation": StageSpec(
        name="ade20k_segmentation",
        config=Ade20kSegmentationConfig,
        entrypoint="stages.ade20k_segmentation:run",
        needs={"data": "ade20k_data", "weights": WEIGHTS},
        resources=Resources(ranks_per_node=4, hours=24.0),
    ),
    "davis_data": StageSpec(
        name="davis_data",
        config=DavisDataConfig,
        entrypoint="stages.davis_data:run",
        preflight="stages.davis_data:preflight",
        resources=Resources(gpu=False, cpus_per_rank=16, hours=1.0),
    ),
    "davis_segmentation": StageSpec(
        name="davis_segmentation",
        config=DavisSegmentationConfig,
        entrypoint="stages.davis_segmentation:run",
        needs={"data": "davis_data", "weights": WEIGHTS},
        resources=Resources(ranks_per_node=1, hours=2.0),
    ),
    "coco_data": StageSpec(
        name="coco_data",
        config=CocoDataConfig,
        entrypoint="stages.coco_data:run",
        preflight="stages.coco_data:preflight",
        resources=Resources(gpu=False, cpus_per_rank=16, hours=1.0),
    ),
    "coco_detection": StageSpec(
        name="coco_detection",
        config=CocoDetectionConfig,
        entrypoint="stages.coco_detection:run",
        needs={"data": "coco_data", "weights": WEIGHTS},
        resources=Resources(ranks_per_node=8, hours=24.0),
    ),
}
