"""FastDFN: the Discriminative Feature Network (Yu et al., CVPR 2018) for semantic segmentation, made fast."""

from dfn_fast.reference import ReferenceDFN

__all__ = ["ReferenceDFN"]
__version__ = "0.1.0"
