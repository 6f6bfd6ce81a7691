"""``python -m dfn_fast.evaluate``: how good a checkpoint is on a split of a data set.

Imports ``inference``, ``data`` and below. Start reading at ``evaluation.py``.
"""

from dfn_fast.evaluate.evaluation import evaluate
from dfn_fast.evaluate.report import Report

__all__ = ["Report", "evaluate"]
