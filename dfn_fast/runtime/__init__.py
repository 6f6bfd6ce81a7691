"""The machine: device, processes, random numbers, CUDA graphs, signals. Nothing here knows what a DFN is.

Imports ``errors`` and ``dfn_kernels``. Start reading at ``device.py``.
"""
