"""Socket-activated forwarder for IPv4, IPv6, UNIX and VSOCK stream sockets."""

__version__ = "0.1.0"
