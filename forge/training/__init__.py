"""Makes artefacts: corpus, examples, adapter, merged model, GGUF. ARCHITECTURE.md is the map."""
