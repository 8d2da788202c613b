"""GGUF files: written for llama.cpp and the programs that build on it, and read as starts of a run."""
