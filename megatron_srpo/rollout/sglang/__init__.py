"""SGLang servers as the engine: started, asked for completions, given the policy's weights over HTTP.

SGLang is never imported. What does not depend on it is in rollout/servers.
"""
