"""Reads, checks and writes the units around the proxy, for systemd-socket-proxyd-units.

The daemon imports nothing of this.
"""
