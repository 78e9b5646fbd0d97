"""What a training step spends its time in besides the large products: in torch, in Triton, and the choice."""
