"""Connections survive a restart: they go from one process to the next in a parcel.

Nothing here is imported by an ordinary start. `reload` is for SIGHUP, `departure` packs what a
process leaves behind, `parcel` and `blocks` are how it is packed, and `arrival` goes on with it.
"""
