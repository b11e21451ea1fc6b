"""OpenAI-compatible completions servers as the engine (experimental): vLLM, SGLang's /v1/completions."""
