"""A small HTTP proxy that stands before an S3 server and spoils some of the requests, as real stores do.

Which request meets which fault follows from a seed and the request's number alone.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable

import aiohttp
from aiohttp import web
from yarl import URL

# slow_down: 503 at once. reset: the connection ends before the server hears of the request; late_reset: after it did
# its work. truncated: half of the body, up or down, then the end. stall: nothing for a while, then the answer.
FAULTS = ("slow_down", "reset", "late_reset", "truncated", "stall")
SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
# About one hop, not the message.
HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length", "upgrade"}


class FaultProxy:
    """Runs in a thread of its own until it is closed.

    Args:
        upstream: ``http://host:port`` of the S3 server.
        rate: share of the requests that meet a fault.
        stall_s: how long a stall lasts.
        seed: of the faults.
        only: where given, faults meet only requests for which ``only(method, path)`` holds.
        kinds: faults to choose from.

    Attributes:
        done: how many requests there were (``requests``), and how many met each fault.
        log: (method, path, fault or "") of every request.
    """

    def __init__(
        self,
        upstream: str,
        rate: float = 0.02,
        stall_s: float = 5.0,
        seed: int = 0,
        only: Callable[[str, str], bool] | None = None,
        kinds: tuple[str, ...] = FAULTS,
    ):
        self.upstream, self.rate, self.stall_s, self.seed = upstream, rate, stall_s, seed
        self.only, self.kinds = only, kinds
        self.done: Counter[str] = Counter()
        self.log: list[tuple[str, str, str]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _start(self) -> str:
        self._client = aiohttp.ClientSession(auto_decompress=False, connector=aiohttp.TCPConnector(limit=0))
        app = web.Application(client_max_size=2**32)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        await self._client.close()
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        # Read in any case: a client that is still writing would see a reset in place of an answer.
        body = await request.read()
        self.done["requests"] += 1
        draw = random.Random(f"{self.seed}:{self.done['requests']}")
        met = draw.random() < self.rate and (self.only is None or self.only(request.method, request.raw_path))
        fault = draw.choice(self.kinds) if met else ""
        self.done[fault] += bool(fault)
        self.log.append((request.method, request.raw_path, fault))
        if fault == "slow_down":
            return web.Response(status=503, body=SLOW_DOWN, content_type="application/xml")
        if fault == "stall":
            await asyncio.sleep(self.stall_s)
        if fault == "reset":
            return _reset(request)
        if fault == "truncated" and body:
            await self._half_up(request, body)
            return _reset(request)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP}
        url = URL(self.upstream + request.raw_path, encoded=True)
        async with self._client.request(request.method, url, headers=headers, data=body) as answer:
            content = await answer.read()
            if fault == "late_reset":
                return _reset(request)
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in HOP}
            # The answer to HEAD announces a length and has no body.
            length = answer.headers.get("Content-Length") if request.method == "HEAD" else str(len(content))
            response = web.StreamResponse(status=answer.status, headers=kept)
            response.content_length = int(length or 0)
            await response.prepare(request)
            if fault == "truncated":
                await response.write(content[: len(content) // 2])
                return _reset(request, hard=False)
            await response.write(content)
            await response.write_eof()
            return response

    async def _half_up(self, request: web.Request, body: bytes) -> None:
        """Give the server half of an upload, and hang up."""
        address = URL(self.upstream)
        _, writer = await asyncio.open_connection(address.host, address.port)
        lines = [f"{request.method} {request.raw_path} HTTP/1.1"]
        lines += [f"{k}: {v}" for k, v in request.headers.items() if k.lower() not in HOP]
        lines += [f"Content-Length: {len(body)}", "", ""]
        writer.write("\r\n".join(lines).encode() + body[: len(body) // 2])
        await writer.drain()
        writer.close()


def _reset(request: web.Request, hard: bool = True) -> web.StreamResponse:
    """End the client's connection, ``hard`` with RST."""
    transport = request.transport
    if transport is not None:
        if hard:
            peer = transport.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        else:
            transport.close()
    return web.Response()
