"""The operations that a training step spends its time in besides the large products: reference, Triton, and the choice."""
