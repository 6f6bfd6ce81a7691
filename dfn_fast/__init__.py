"""FastDFN: the Discriminative Feature Network (Yu et al., CVPR 2018) for semantic segmentation, made fast."""

from dfn_fast.fused import FusedDFN
from dfn_fast.inference import Predictor
from dfn_fast.model import FastDFN
from dfn_fast.reference import ReferenceDFN
from dfn_fast.savings import Savings

__all__ = ["FastDFN", "FusedDFN", "Predictor", "ReferenceDFN", "Savings"]
__version__ = "0.1.0"
