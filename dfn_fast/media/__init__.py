"""Images, label maps and videos as files, and the pictures made of them.

Imports ``files`` and ``errors``. Start reading at ``images.py``.
"""
