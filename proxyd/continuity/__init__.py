"""Connections survive a restart: they go from one process to the next in a parcel.

Nothing here is imported by an ordinary start. `reload` is for SIGHUP, `departure` packs what a
process leaves behind, `parcel` and `blocks` are how it is packed, and `arrival` goes on with it.
`store` has a parcel stored by the service manager at a stop.

They survive a kill as well: `keep` has the relay keep what would be lost, `root` is where all of it
is found, and `recovery` makes a parcel of it. `fd_queue` and `deposit` are what both ways use.
"""
