"""api.openai.com for one test: programs with that address written into them reach the server under test, unchanged.

Two listeners on loopback, in a thread: a proxy that takes CONNECT api.openai.com:443 and nothing else, and the TLS end
behind it, which passes plain HTTP on. The certificate is our own, its key is public, and only a program that is told so
by SSL_CERT_FILE trusts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

CERTIFICATE = Path(__file__).with_name("front_certificate.pem")
KEY = Path(__file__).with_name("front_key.pem")


@contextlib.contextmanager
def openai_address(base_url: str) -> Iterator[dict[str, str]]:
    """The environment variables for a program that shall find the server at base_url under https://api.openai.com."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        port = asyncio.run_coroutine_threadsafe(_listen(base_url), loop).result(10)
        yield {"HTTPS_PROXY": f"http://127.0.0.1:{port}", "SSL_CERT_FILE": str(CERTIFICATE)}
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _listen(base_url: str) -> int:
    where = urlsplit(base_url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE, KEY)

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _join(reader, writer, where.hostname or "", where.port or 80)

    behind = await asyncio.start_server(plain, "127.0.0.1", 0, ssl=context)
    tls_port = behind.sockets[0].getsockname()[1]

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"CONNECT api.openai.com:443 "):
            writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
            writer.close()
            return
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await _join(reader, writer, "127.0.0.1", tls_port)

    front = await asyncio.start_server(proxy, "127.0.0.1", 0)
    port: int = front.sockets[0].getsockname()[1]
    return port


async def _join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int) -> None:
    there_reader, there_writer = await asyncio.open_connection(host, port)
    await asyncio.gather(_pump(reader, there_writer), _pump(there_reader, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):  # either side may leave at any time
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
