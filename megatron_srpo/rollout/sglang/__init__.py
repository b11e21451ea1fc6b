"""SGLang servers as the engine: started, asked for completions, given weights over HTTP; never imported."""
