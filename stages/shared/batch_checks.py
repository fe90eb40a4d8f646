"""The global batch against the ranks a run asks for: said when the plan is made, before GPUs are spent."""

from pipeline.spec import Resources


def ranks_in_words(resources: Resources) -> str:
    """`3 x 8 = 24 ranks` for three nodes of eight, `8 ranks` for one."""
    product = f"{resources.nodes} x {resources.ranks_per_node} = " if resources.nodes > 1 else ""
    return f"{product}{resources.ranks} ranks"


def explain_uneven_batch(batch_size: int, resources: Resources) -> str | None:
    """Why a global batch does not divide over the ranks, or None."""
    ranks = resources.ranks
    if batch_size % ranks == 0:
        return None
    below, above = batch_size // ranks * ranks, -(-batch_size // ranks) * ranks
    fitting = f"{below} or {above}" if below else f"{above}"
    return (
        f"batch_size {batch_size} over {ranks_in_words(resources)} leaves {batch_size / ranks:.2f} images each; "
        f"expected a multiple of {ranks} (nearest: {fitting}), or other nodes and ranks_per_node in resources"
    )


def uneven_pairs(batch_size: int, resources: Resources, group: int | None) -> str | None:
    """Why a batch does not divide into groups of images that are mixed in pairs, each pair on one rank, or None."""
    share = batch_size // resources.ranks
    if batch_size % (group or batch_size):
        return f"batch_size {batch_size} does not divide into groups of {group} (mix.group); expected an even divisor"
    if share % 2:
        each = (
            f"batch_size {batch_size} over {ranks_in_words(resources)} leaves {share} images each"
        )
        return f"{each}, which are mixed in pairs; expected an even number, or mix.prob 0"
    return None


def uneven_passes(
    batch_size: int, resources: Resources, most: int | None, *, whole: bool
) -> str | None:
    """Why a rank's share does not divide into passes of at most `most` images, or must not (`whole`), or None."""
    share = batch_size // resources.ranks
    if most is None or share <= most:
        return None
    each = f"batch_size {batch_size} over {ranks_in_words(resources)} leaves {share} images each"
    if whole:
        return f"{each}, more than micro_batch_size {most}, and batch normalisation wants them in one pass"
    if share % most == 0:
        return None
    fitting = max(n for n in range(1, most + 1) if share % n == 0)
    return (
        f"{each}, which micro_batch_size {most} cuts into {share / most:.2f} passes; "
        f"expected a divisor of {share} (nearest below: {fitting})"
    )
