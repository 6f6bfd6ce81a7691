"""Data sets by name, and the path from files to training batches."""

from dfn_fast.data.base import IGNORE, Pair, Sample, SegmentationDataset

__all__ = ["IGNORE", "Pair", "Sample", "SegmentationDataset"]
