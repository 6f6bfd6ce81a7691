"""FastDFN: the Discriminative Feature Network (Yu et al., CVPR 2018) for semantic segmentation, made fast."""

from dfn_fast.checkpoint.weights import load_weights
from dfn_fast.inference.loading import load_model
from dfn_fast.inference.predictor import Predictor
from dfn_fast.network.fast import FastDFN
from dfn_fast.network.fused import FusedDFN
from dfn_fast.network.reference import ReferenceDFN
from dfn_fast.network.savings import Savings
from dfn_fast.version import __version__

__all__ = [
    "FastDFN",
    "FusedDFN",
    "Predictor",
    "ReferenceDFN",
    "Savings",
    "__version__",
    "load_model",
    "load_weights",
]
