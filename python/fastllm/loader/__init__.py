"""Reading checkpoints: folders of safetensors, GGUF files, hub names; strict, memory-mapped, without copies."""
