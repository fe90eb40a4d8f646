"""Check the global batch against the requested ranks when the plan is made, before GPUs are spent.

Each check raises ValueError with the arithmetic and with what would fit.
"""

from pipeline.spec import Resources


def _describe_share(batch_size: int, resources: Resources, share: str) -> str:
    """Return e.g. "batch_size 512 over 3 x 8 = 24 ranks leaves 21.33 images each"."""
    product = f"{resources.nodes} x {resources.ranks_per_node} = " if resources.nodes > 1 else ""
    ranks = f"{product}{resources.ranks} ranks"
    return f"batch_size {batch_size} over {ranks} leaves {share} images each"


def check_batch_is_filled(batch_size: int, images: int) -> None:
    """Require as many training images as a batch has."""
    if batch_size > images:
        raise ValueError(
            f"batch_size {batch_size} is more than all {images:,} training images; "
            "set a smaller one"
        )


def check_even_batch(batch_size: int, resources: Resources) -> None:
    """Require that the global batch divides over the ranks."""
    ranks = resources.ranks
    below, rest = divmod(batch_size, ranks)
    if rest:
        nearest = [str(ranks * times) for times in (below, below + 1) if times]
        raise ValueError(
            f"{_describe_share(batch_size, resources, f'{batch_size / ranks:.2f}')}; "
            f"expected a multiple of {ranks} (nearest: {' or '.join(nearest)}), "
            "or other nodes and ranks_per_node in resources"
        )


def check_even_pairs(batch_size: int, resources: Resources, group: int | None) -> None:
    """Require that the batch divides into mix groups, and each rank's share into pairs."""
    if batch_size % (group or batch_size):
        raise ValueError(
            f"batch_size {batch_size} does not divide into groups of {group} (mix.group); "
            "expected an even divisor"
        )
    # Both images of a mixed pair are on one rank, so that ranks need not exchange images.
    share = batch_size // resources.ranks
    if share % 2:
        raise ValueError(
            f"{_describe_share(batch_size, resources, f'{share}')}, which are mixed in pairs; "
            "expected an even number, or mix.prob 0"
        )


def check_even_passes(
    batch_size: int, resources: Resources, micro_batch_size: int | None, *, single_pass: bool
) -> None:
    """Require that a rank's share divides into micro-batches, or is one of them (`single_pass`)."""
    share = batch_size // resources.ranks
    if micro_batch_size is None or share <= micro_batch_size:
        return
    each = _describe_share(batch_size, resources, f"{share}")
    # Statistics of batch normalization are those of a pass, so several passes change the result.
    if single_pass:
        raise ValueError(
            f"{each}, more than micro_batch_size {micro_batch_size}, "
            "and batch normalization needs them in one pass"
        )
    if share % micro_batch_size:
        fitting = max(n for n in range(1, micro_batch_size + 1) if share % n == 0)
        raise ValueError(
            f"{each}, which micro_batch_size {micro_batch_size} cuts into "
            f"{share / micro_batch_size:.2f} passes; "
            f"expected a divisor of {share} (nearest below: {fitting})"
        )
