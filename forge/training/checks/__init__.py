"""The parts of ``check``: configuration, data, model and tokenizer, packages, machine."""
