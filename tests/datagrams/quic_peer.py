"""A QUIC server or client that echoes or checks bytes; needs aioquic.

Usage: quic_peer.py server PORT CERTIFICATE KEY | quic_peer.py client PORT BYTES CONNECTIONS

The server makes a certificate first if the file is not there.
"""

import asyncio
import hashlib
import os
import ssl
import sys

from aioquic.asyncio import connect, serve
from aioquic.quic.configuration import QuicConfiguration


def certificate(path, key_path):
    """Write a self-signed certificate and its key."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    with open(path, "wb") as file:
        file.write(made.public_bytes(serialization.Encoding.PEM))
    with open(key_path, "wb") as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )


async def server(port, path, key_path):
    if not os.path.exists(path):
        certificate(path, key_path)
    configuration = QuicConfiguration(is_client=False, alpn_protocols=["echo"])
    configuration.load_cert_chain(path, key_path)

    async def echo(reader, writer):
        while data := await reader.read(65536):
            writer.write(data)
        writer.write_eof()

    def on_stream(reader, writer):
        asyncio.get_running_loop().create_task(echo(reader, writer))

    await serve("127.0.0.1", port, configuration=configuration, stream_handler=on_stream)
    print("serves", flush=True)
    await asyncio.Event().wait()


async def one_client(port, size):
    configuration = QuicConfiguration(is_client=True, alpn_protocols=["echo"])
    configuration.verify_mode = ssl.CERT_NONE
    async with connect("127.0.0.1", port, configuration=configuration) as connection:
        reader, writer = await connection.create_stream()
        data = os.urandom(size)
        writer.write(data)
        writer.write_eof()
        received = hashlib.sha256()
        count = 0
        while piece := await reader.read(65536):
            received.update(piece)
            count += len(piece)
    assert count == size
    assert received.digest() == hashlib.sha256(data).digest()


async def clients(port, size, connections):
    await asyncio.gather(*[one_client(port, size) for _ in range(connections)])
    print("all bytes came back", flush=True)


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    if kind == "server":
        asyncio.run(server(int(arguments[0]), *arguments[1:]))
    else:
        asyncio.run(clients(*map(int, arguments)))
