"""Image, label and video files, and pictures of label maps.

Imports ``files`` and ``errors``. Start reading at ``images.py``.
"""
