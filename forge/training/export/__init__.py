"""An export: adapter -> merged weights -> GGUF -> verified, each artefact named by its SHA-256.

``export.export_run`` does the whole of it; the other modules are its steps. Everything that runs
llama.cpp's native code, its converter or a GGUF parser does so in a child process
(:mod:`~forge.training.llamacpp.parent`), because a bad file can crash or hang it.
"""
