"""Documents become examples, and examples become micro-batches."""
