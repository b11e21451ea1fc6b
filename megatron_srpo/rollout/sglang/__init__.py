"""SGLang servers as the engine, started and controlled over HTTP; SGLang itself is never imported."""
