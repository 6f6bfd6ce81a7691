"""Shared by the operators: the choice of implementation, Triton or its stub, resize arithmetic, compilation cases."""
