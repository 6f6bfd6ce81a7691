"""``python -m dfn_fast.predict``: images, videos and cameras in, label maps and overlays out.

Imports ``inference``, ``media`` and below. Start reading at ``prediction.py``.
"""
