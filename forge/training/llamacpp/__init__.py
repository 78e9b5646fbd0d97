"""llama.cpp in a child process: a bad file can crash or hang it, and the parent lives on."""
