"""Adapter -> merged weights -> GGUF -> verified, each artefact named by its SHA-256."""
