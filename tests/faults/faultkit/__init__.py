"""The walk through every call that can fail: what is struck, where, and how it is judged."""
