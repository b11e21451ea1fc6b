"""SGLang servers as the engine: started, asked for completions, given the policy's weights over HTTP.

SGLang is never imported. What does not depend on it is in rollout/servers.

engine.py        the engine; the ranks agree here
api.py           a request to /generate, and what a server may answer
capabilities.py  what a server must be able to do
server.py        calls that start, stop and update a server
publisher.py     first rank: every version of the weights is brought to all servers
publication.py   one such update: disk, tensor or distributed
"""
