"""``python -m dfn_fast.export``: the inference network as ONNX, ``torch.export`` program or AOTInductor package.

Imports ``inference``, ``network`` and below. Start reading at ``network.py``, then ``formats.py``.
"""
