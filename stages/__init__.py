"""The stages. Each calls `mugs` with its configuration and inputs, and returns files and rows."""

from pipeline.spec import StageSpec
from stages import (
    ade20k_data,
    ade20k_segmentation,
    attention,
    coco_data,
    coco_detection,
    convert,
    davis_data,
    davis_segmentation,
    features,
    finetune,
    import_weights,
    knn,
    knn_curve,
    linear,
    logistic,
    pretrain,
)

# In the order in which a reproduction usually runs them; docs and messages list them like this.
_MODULES = (
    convert,
    pretrain,
    import_weights,
    features,
    knn,
    knn_curve,
    linear,
    logistic,
    attention,
    finetune,
    ade20k_data,
    ade20k_segmentation,
    davis_data,
    davis_segmentation,
    coco_data,
    coco_detection,
)
STAGES: dict[str, StageSpec] = {module.SPEC.name: module.SPEC for module in _MODULES}
