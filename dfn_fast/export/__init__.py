"""``python -m dfn_fast.export``: the inference network as an ONNX, ``torch.export`` or AOTInductor file.

Imports ``inference``, ``network`` and below. Start reading at ``network.py``, then ``formats.py``.
"""
