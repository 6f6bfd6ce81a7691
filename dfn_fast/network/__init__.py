"""DFN: the plain network, the fast one and the one for inference, with the same parameters.

Imports ``checkpoint``, ``runtime`` and below. Start reading at ``reference.py``, with figure 2 of the paper beside it.
"""

from dfn_fast.network.fast import FastDFN
from dfn_fast.network.fused import FusedDFN
from dfn_fast.network.reference import ReferenceDFN
from dfn_fast.network.savings import Savings

__all__ = ["FastDFN", "FusedDFN", "ReferenceDFN", "Savings"]
