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
    changes = []
    # Not every stage has these settings.
    for name in ("epochs", "steps"):
        length, length_before = (getattr(each, name, None) for each in (now, before))
        if length != length_before:
            changes.append(f"{name} is {length} instead of {length_before}")
    if need.gpus != need_before.gpus:
        changes.append(f"{need.gpus} GPUs instead of {need_before.gpus}")
    remarks = []
    if need.hours == need_before.hours:
        remarks = [
            f"{change}, but resources.hours is still {need.hours:g}, from which the GPU-hours "
            "are counted"
            for change in changes
        ]
    batch, batch_before = (getattr(each, "batch_size", None) for each in (now, before))
    if batch != batch_before and not now.rate_follows_batch():
        remarks.append(
            f"batch_size is {batch} instead of {batch_before}, and the learning rate of this "
            "stage does not follow it: set the rate as well if the recipe scales it"
        )
    return remarks
