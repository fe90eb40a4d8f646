"""What a user who overrides one setting of a run may have overlooked in the others."""

from pipeline.config import RunConfig


def remark_on_overrides(run: RunConfig) -> list[str]:
    """Return a line for each setting that --set left as the file has it, though it depends on
    another one that --set changed.
    """
    if run.as_written is None:
        return []
    now, before = run.config, run.as_written.config
    need, need_before = run.resources, run.as_written.resources
    remarks = []
    epochs = getattr(now, "epochs", None), getattr(before, "epochs", None)
    if epochs[0] != epochs[1] and need.hours == need_before.hours:
        remarks.append(
            f"epochs is {epochs[0]} instead of {epochs[1]}, but resources.hours is still "
            f"{need.hours:g}, from which the GPU-hours are counted"
        )
    if need.gpus != need_before.gpus and need.hours == need_before.hours:
        remarks.append(
            f"{need.gpus} GPUs instead of {need_before.gpus}, but resources.hours is still "
            f"{need.hours:g}, from which the GPU-hours are counted"
        )
    batches = getattr(now, "batch_size", None), getattr(before, "batch_size", None)
    if batches[0] != batches[1] and not now.rate_follows_batch():
        remarks.append(
            f"batch_size is {batches[0]} instead of {batches[1]}, and the learning rate of this "
            "stage does not follow it: set the rate as well if the recipe scales it"
        )
    return remarks
