"""Export fidelity: what is lost from adapter to GGUF file, judged (marker ``gpu``; on a CPU in tests/)."""
