"""Weights in files: written whole or not at all, read without running code, fitted by name and shape.

Imports ``files`` and ``errors`` and knows nothing about networks. Start reading at ``weights.py``.
"""

from dfn_fast.checkpoint.archive import read_file
from dfn_fast.checkpoint.weights import load_weights, save_weights

__all__ = ["load_weights", "read_file", "save_weights"]
