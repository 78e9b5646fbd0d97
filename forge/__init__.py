"""Forge: documents in, a tested GGUF model out."""

__version__ = "0.1.0"
