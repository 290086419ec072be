"""A load that does not wait for the service: so many cycles a second, whatever the answers take.

An acquire is timed from the moment at which it was to be sent, so that one slow answer is counted for all
that it delays (no coordinated omission). Its release follows at once.
"""

from __future__ import annotations

import asyncio
import gc
import selectors
import time
from collections import deque
from collections.abc import Coroutine
from typing import Any, TypeVar

HEAD_END = b"\r\n\r\n"
T = TypeVar("T")


class LoadError(Exception):
    """The service did not answer as it should."""


def run(task: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, on select(): epoll wakes up to a millisecond late, which would be counted as latency."""
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(task)


class Channel(asyncio.Protocol):
    """One keep-alive connection with one request under way."""

    def __init__(self) -> None:
        self.transport: Any = None
        self._buffer = b""
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def call(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        if self.transport.is_closing():
            raise LoadError("the service closed an idle connection")
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if (complete := parsed(self._buffer)) and self._answer:
            self._buffer, answer, self._answer = b"", self._answer, None
            if not answer.done():
                answer.set_result(complete)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(LoadError(f"the connection was closed: {exc}"))


def parsed(data: bytes) -> tuple[int, bytes] | None:
    """Status and body of an answer, once all of it is there."""
    head, end, body = data.partition(HEAD_END)
    if not end:
        return None
    _, found, rest = head.lower().partition(b"\r\ncontent-length:")
    length = int(rest.partition(b"\r\n")[0]) if found else 0
    return (int(head[9:12]), body) if len(body) >= length else None


def message(method: str, path: str, body: bytes = b"") -> bytes:
    kind = "Content-Type: application/json\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nHost: bench\r\n{kind}Content-Length: {len(body)}\r\n\r\n".encode() + body


def lock_id(status: int, body: bytes) -> str:
    """The id of a lock that was granted."""
    if status != 201 or not body.startswith(b'{"id":"'):
        raise LoadError(f"an acquire was answered with {status} {body[:200]!r}")
    return body[7:43].decode()


class Load:
    """Cycles against one service; more connections are opened as needed.

    The one that was idle longest is used next, so that none is idle for the 5 s after which uvicorn closes it.
    """

    def __init__(self, port: int, wish: bytes) -> None:
        self.port = port
        self.acquire = message("POST", "/locks", wish)
        self.idle: deque[Channel] = deque()
        self.opened = 0
        self.seconds: list[float] = []

    async def channel(self) -> Channel:
        if self.idle:
            return self.idle.popleft()
        self.opened += 1
        if self.opened > 500:
            raise LoadError("500 connections are in use: the service does not keep up")
        return (await asyncio.get_running_loop().create_connection(Channel, "127.0.0.1", self.port))[1]

    async def cycle(self, intended: float) -> None:
        """Acquire, timed from the intended moment, and release."""
        channel = await self.channel()
        granted = lock_id(*await channel.call(self.acquire))
        self.seconds.append(time.perf_counter() - intended)
        status, body = await channel.call(message("DELETE", f"/locks/{granted}"))
        if status != 204:
            raise LoadError(f"a release was answered with {status} {body[:200]!r}")
        self.idle.append(channel)

    async def run(self, rate: float, seconds: float) -> None:
        """Send `rate` cycles a second, evenly; what is late is sent at once and counted from its moment."""
        start = time.perf_counter() + 0.1
        async with asyncio.TaskGroup() as tasks:
            for number in range(int(rate * seconds)):
                intended = start + number / rate
                if (early := intended - time.perf_counter()) > 0:
                    await asyncio.sleep(early)
                tasks.create_task(self.cycle(intended))

    def close(self) -> None:
        for channel in self.idle:
            channel.transport.close()


async def offer(port: int, wish: bytes, rate: float, seconds: float) -> dict[str, float]:
    """Milliseconds of the acquires under a constant load, after a second to warm up."""
    load = Load(port, wish)
    gc.collect()
    gc.disable()
    try:
        await load.run(rate, 1)
        load.seconds.clear()
        await asyncio.wait_for(load.run(rate, seconds), seconds + 30)
    except* (LoadError, OSError, TimeoutError) as errors:
        raise LoadError(str(errors.exceptions[0])) from None
    finally:
        gc.enable()
        load.close()
    taken = sorted(load.seconds)
    return {"p50": at(taken, 0.5) * 1e3, "p99": at(taken, 0.99) * 1e3, "connections": load.opened, "cycles": len(taken)}


def at(ordered: list[float], share: float) -> float:
    """The value below which that share of the sorted values lies."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


async def alternate(port: int, wish: bytes, seconds: float) -> list[float]:
    """Seconds of each acquire on one connection that does nothing but cycles, one after the other."""
    load = Load(port, wish)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            await load.cycle(time.perf_counter())
    finally:
        load.close()
    return load.seconds
