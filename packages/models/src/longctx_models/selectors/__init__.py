"""Sparsity selectors: pure functions from what attention sees to a plan."""

from longctx_models.selectors.layers import (
    AllLayers,
    DenseFirst,
    DriftMeter,
    DriftProfile,
    LayerList,
    ReuseFrom,
    SecondHalf,
    parse_layers,
)
from longctx_models.selectors.star import StarPlan, StarSelector
from longctx_models.selectors.token_sparse import TokenSparseSelector
from longctx_models.selectors.window import WindowRetention, WindowSelector

__all__ = [
    "AllLayers",
    "DenseFirst",
    "DriftMeter",
    "DriftProfile",
    "LayerList",
    "ReuseFrom",
    "SecondHalf",
    "StarPlan",
    "StarSelector",
    "TokenSparseSelector",
    "WindowRetention",
    "WindowSelector",
    "parse_layers",
]
