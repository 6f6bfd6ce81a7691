"""From images to labels, in memory: scales, mirror images, sliding windows.

Imports ``network``, ``data`` and below. Start reading at ``predictor.py``.
"""

from dfn_fast.inference.loading import LoadedModel, load_model
from dfn_fast.inference.predictor import Predictor

__all__ = ["LoadedModel", "Predictor", "load_model"]
