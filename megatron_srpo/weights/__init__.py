"""Weights between Hugging Face folders and Megatron ranks: one table, read both ways."""
