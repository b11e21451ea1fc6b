"""The policy network: Hugging Face folders, Megatron model chunks, local layers."""
