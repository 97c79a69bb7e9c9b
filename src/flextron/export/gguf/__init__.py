"""Sub-networks as GGUF files, which llama.cpp and the programs around it run."""
