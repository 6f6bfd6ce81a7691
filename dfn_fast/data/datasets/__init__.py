"""The data sets, a file for each layout on disk; they share ``pairing.py``.

Imports ``media``, ``files``, ``errors`` and ``data.base``. Start reading at ``folder.py``.
"""
