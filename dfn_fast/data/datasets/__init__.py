"""The data sets, a file for each layout on disk; ``pairing.py`` is what they share.

Imports ``media``, ``files``, ``errors`` and ``data.base``. Start reading at ``folder.py``.
"""
