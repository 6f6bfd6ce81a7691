"""``python -m dfn_fast.data``: data sets by name, and the path from files to training batches.

Imports ``media``, ``files``, ``errors`` and below. Start reading at ``base.py``, then ``registry.py``.
"""

from dfn_fast.data.base import IGNORE, Pair, Sample, SegmentationDataset

__all__ = ["IGNORE", "Pair", "Sample", "SegmentationDataset"]
