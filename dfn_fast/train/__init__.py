"""``python -m dfn_fast.train``: one training run, from its options to its summary.

Imports every lower room. Start reading at ``__main__.py``, then ``run.py``, the loop over epochs.
"""
