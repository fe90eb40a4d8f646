"""Values of `MugsConfig.pair_average`; here, because planning must not import torch."""

from typing import Literal

PairAverage = Literal["released", "uniform"]
"""How pairs of teacher and student crops are weighted;
`mugs.losses.pairs` has the formulas (M8).
"""
