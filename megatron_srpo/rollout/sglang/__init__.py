"""SGLang servers as the engine: started and watched, asked for samples, given the policy's weights. SGLang is
never imported.

engine.py        what the run sees; the ranks agree here
generation.py    every rank: requests to whichever server is free, retried on another one
replies.py       what a server may answer
capabilities.py  what a server must be able to do
fleet.py         first rank: our servers' processes, restarts
guard.py         beside each of our servers: ends it when the trainer is gone
publisher.py     first rank: every version of the weights brought to all servers
publication.py   one such update: disk, tensor or distributed
http.py          calls that start, stop and update a server
"""
