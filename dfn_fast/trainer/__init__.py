"""One optimiser step: network, optimiser, scaler and the processes that share a batch.

Imports ``config``, ``data``, ``network`` and below. Start reading at ``trainer.py``.
"""
