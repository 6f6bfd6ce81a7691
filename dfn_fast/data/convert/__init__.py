"""Labels of other programs, made into the layout of data set ``folder``: a file for each form, which ``write.py`` uses.

Imports ``media``, ``files``, ``errors``, ``data.base`` and ``data.datasets``. Start reading at ``shapes.py``.
"""
