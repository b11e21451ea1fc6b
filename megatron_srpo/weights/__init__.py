"""Transfer of weights between Hugging Face folders, Megatron ranks and checkpoints."""
