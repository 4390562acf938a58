"""The units around the proxy: read, checked, written. For the command systemd-socket-proxyd-units.

The daemon imports nothing of this.
"""
