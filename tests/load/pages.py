"""Pages that look on: so many ask for the overview every two seconds, as the dashboard does.

    python pages.py PORT COUNT SECONDS

A process of its own, so that its work is on no other's account; tells how many answers there were, and how many 304.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections import Counter

EVERY = 2.0  # seconds between two looks of a page


async def page(port: int, number: int, count: int, end: float, answers: Counter[int]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    clock, etag = asyncio.get_running_loop().time, b'"none"'
    await asyncio.sleep(EVERY * number / count)
    while (began := clock()) < end:
        writer.write(
            b"GET /overview HTTP/1.1\r\nHost: bench\r\nAccept-Encoding: gzip\r\nIf-None-Match: " + etag + b"\r\n\r\n"
        )
        head = await reader.readuntil(b"\r\n\r\n")
        if length := re.search(rb"content-length: (\d+)", head, re.I):
            await reader.readexactly(int(length[1]))
        etag = (re.search(rb"etag: ([^\r]+)", head, re.I) or [b"", etag])[1]
        answers[int(head[9:12])] += 1
        await asyncio.sleep(began + EVERY - clock())
    writer.close()


async def main(port: int, count: int, seconds: float) -> None:
    answers: Counter[int] = Counter()
    end = asyncio.get_running_loop().time() + seconds
    await asyncio.gather(*(page(port, number, count, end, answers) for number in range(count)))
    print(json.dumps(answers))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
