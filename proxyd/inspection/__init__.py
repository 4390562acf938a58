"""The inspection socket: a running proxy is asked over Varlink what it is doing.

`entrance` alone is imported at the start, and only if there is such a socket. The rest is imported
with the first caller.
"""
