"""The ceiling's ceiling: an ASGI application that answers everything with the bytes of /livez.

`python bare.py PORT` serves it under uvicorn with the options that `serve` in botfarm.py has.
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn

BODY = b'{"status":"ok"}'
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())],
}


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})
        return
    await send(START)
    await send({"type": "http.response.body", "body": BODY})


if __name__ == "__main__":
    uvicorn.run(
        app,
        port=int(sys.argv[1]),
        access_log=False,
        log_config=None,
        server_header=False,
        lifespan="on",
        backlog=4096,
        timeout_graceful_shutdown=8,
        ws="none",
    )
