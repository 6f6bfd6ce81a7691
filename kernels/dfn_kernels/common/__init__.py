"""What the operators share: the choice of implementation, Triton or its stub, resize arithmetic, compilation cases."""
