"""The policy network: reading a Hugging Face folder, building Megatron chunks, local layers."""
