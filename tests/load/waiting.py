"""Callers that wait: how soon they are answered, and what they cost while nothing changes."""

from __future__ import annotations

import asyncio
import random
import time

from offered import Channel, LoadError, lock_id, message


async def connect(port: int) -> Channel:
    return (await asyncio.get_running_loop().create_connection(Channel, "127.0.0.1", port))[1]


async def handovers(ports: tuple[int, int], wish: bytes, patient: bytes, count: int) -> list[float]:
    """Seconds from the sending of a release at the second port to the answer of who waits at the first one.

    One user: each holder's successor waits before it releases. `wish` does not wait, `patient` does.
    """
    here, there = [await connect(ports[0]) for _ in range(2)], await connect(ports[1])
    taken: list[float] = []
    held = lock_id(*await here[0].call(message("POST", "/locks", wish)))
    for number in range(count):
        answer = here[number % 2].call(message("POST", "/locks", patient))
        await asyncio.sleep(random.uniform(0.02, 0.06))
        sent = time.perf_counter()
        release = there.call(message("DELETE", f"/locks/{held}"))
        held = lock_id(*await answer)
        taken.append(time.perf_counter() - sent)
        await release
    await there.call(message("DELETE", f"/locks/{held}"))
    for channel in (*here, there):
        channel.transport.close()
    return sorted(taken)


async def crowd(port: int, patient: bytes, count: int, seconds: float, look: asyncio.Queue[str]) -> list[float]:
    """So many callers wait. `look` gets a word when all do, and again before they go; seconds of /livez meanwhile."""
    channels, waiting = [], []
    for _ in range(count // 100):
        group = await asyncio.gather(*(connect(port) for _ in range(100)))
        channels += group
        waiting += [channel.call(message("POST", "/locks", patient)) for channel in group]
        await asyncio.sleep(0.05)
    await asyncio.sleep(2)
    look.put_nowait("waiting")
    probe, taken = await connect(port), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sent = time.perf_counter()
        await probe.call(message("GET", "/livez"))
        taken.append(time.perf_counter() - sent)
        await asyncio.sleep(0.1)
    look.put_nowait("over")
    if any(answer.done() for answer in waiting):
        raise LoadError("one that should wait was answered")
    for channel in (*channels, probe):
        channel.transport.abort()
    await asyncio.gather(*waiting, return_exceptions=True)
    return sorted(taken)
