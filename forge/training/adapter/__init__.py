"""A LoRA adapter on disk: its config, its tensors, merging it, where it came from."""
