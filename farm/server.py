from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import logging
import os
import resource
import signal
import socket
import sys
import tempfile
import termios
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import uvicorn
from litestar import Litestar
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.supervisors import Multiprocess

from farm.database import open_pool
from farm.locks import GONE, UNREAD
from farm.migrations import prepared
from farm.passwords import Keyring, check_keys, keyring_of, load_keys
from farm.problems import HeadTooLarge, MalformedBody, Problem
from farm.settings import Secret, Settings, log
from farm.telemetry import SHARED
from farm.words import JSON

HEADERS = [("X-Content-Type-Options", "nosniff")]  # of every reply


CALLERS = logging.getLogger("botfarm.callers")  # what uvicorn says of callers; but for errors anybody could fill it


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP, which bounds what slow and endless senders hold, and tells of callers that did not read.

    uvicorn itself would keep for ever a connection that sends nothing or half a request, a reply that nobody reads,
    and headers and trailers of any size. What comes in one piece, as nearly every request does, starts no timer.
    """

    LATE = 40  # seconds for the head of a request; a body brings SLOW bytes in them, a reply is read
    SLOW = 40 * 1024
    HEAD = 64 * 1024  # bytes of a head, of trailers, or of what else is no body

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self.logger = CALLERS
        self._received = self._bodiless = 0
        self._running: RequestResponseCycle | None = None  # the call that is answered now, or was last
        self._unread: asyncio.TimerHandle | None = None
        self._late: asyncio.TimerHandle | None = None
        self._watched: Any = None
        self._watch()

    def data_received(self, data: bytes) -> None:
        self._bodiless += len(data)
        super().data_received(data)
        if self._is_partial():
            self._received += len(data)
            if self._bodiless > self.HEAD and not self.transport.is_closing():
                self._refuse(HeadTooLarge())
            elif self._watched is not self.scope:
                self._watch()
        else:
            self._bodiless = 0
            cycle = self.cycle
            if cycle and cycle.response_complete and not self.timeout_keep_alive_task:  # an empty line came after it
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

    def on_body(self, body: bytes) -> None:
        self._bodiless = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._bodiless = 0
        super().on_message_complete()

    def _is_partial(self) -> bool:
        """Whether the end of a request is still to come."""
        return self.cycle is None or self.cycle.scope is not self.scope or self.cycle.more_body

    def _watch(self) -> None:
        """Look again when it is late: whether this very request is still there, and has brought enough."""
        if self._late:
            self._late.cancel()
        self._watched = self.scope
        self._late = self.loop.call_later(self.LATE, self._look, self.scope, self._received)

    def _look(self, scope: Any, received: int) -> None:
        self._late = self._watched = None
        if not self._is_partial() or self.transport.is_closing():
            return
        has_body = self.cycle is not None and self.cycle.scope is scope and not self.cycle.response_complete
        is_enough = self._received - received >= self.SLOW or self.flow.read_paused
        if self.scope is not scope or (has_body and is_enough):
            self._watch()
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reply()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch_reply()  # what is left of it has to be read too

    def _watch_reply(self) -> None:
        """Look again when it is late: whether somebody reads."""
        if self._unread:
            self._unread.cancel()
        self._unread = self.loop.call_later(self.LATE, self._look_at_reply, self._left())

    def _look_at_reply(self, before: int) -> None:
        left = self._left()
        if 0 < left < before:
            self._watch_reply()
        elif left:
            self.transport.abort()

    def _left(self) -> int:
        """Bytes that the caller has not taken yet, also of those that the system has, which may be megabytes."""
        queued = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)

    def send_400_response(self, msg: str) -> None:
        self._refuse(MalformedBody("The request is not HTTP."))

    def _refuse(self, problem: Problem) -> None:
        """Answer without the application, and end the connection."""
        body = problem.response().content
        headers = {"content-type": "application/problem+json", "content-length": len(body), "connection": "close"}
        lines = [f"HTTP/1.1 {problem.status} ", *(f"{name}: {value}" for name, value in [*headers.items(), *HEADERS])]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()

    def on_headers_complete(self) -> None:
        if self.url.startswith(b"//"):  # else //users is read as the index page of a host named users
            self.url = b"/%252F" + self.url[2:]
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """Who closed without reading the reply answers it with a reset; who has read it ends the connection."""
        for timer in (self._late, self._unread):
            if timer:
                timer.cancel()
        was_reset = exc is not None or self._is_reset()
        running = self._running
        if running:  # uvicorn tells the last call that it has read of it, and this may be one before that
            running.scope.setdefault("state", {})[GONE] = True
            running.disconnected = running.disconnected or not running.response_complete
            running.message_event.set()
        super().connection_lost(exc)
        if was_reset and running and (unread := running.scope.get("state", {}).get(UNREAD)):
            unread()

    def _is_reset(self) -> bool:
        """Also where the end of the connection was read before the reset: Linux tells by the state (7: TCP_CLOSE)."""
        connection = self.transport.get_extra_info("socket")
        if connection is None or not hasattr(socket, "TCP_INFO"):
            return False
        with contextlib.suppress(OSError):
            return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 7
        return False


def on_stop(stop: Callable[[], None]) -> None:
    """Hear of SIGTERM and SIGINT as soon as the server does.

    uvicorn tells the application only when all calls are done, but those who wait have to be answered for that.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        servers = signal.getsignal(number)

        def heard(number: int, frame: Any, servers: Any = servers) -> None:
            loop.call_soon_threadsafe(stop)
            if callable(servers):
                servers(number, frame)

        signal.signal(number, heard)


def banner(settings: Settings) -> str:
    address = f"http://{settings.host}:{settings.port}"
    project = "11111111-1111-4111-8111-111111111111"
    token = ' -H "Authorization: Bearer $TOKEN"' if settings.auth == "on" else ""
    json_post = f"curl -X POST{token} -H 'Content-Type: {JSON}'"
    user = f'{{"login": "bot-1", "password": "secret", "project_id": "{project}", "env": "stage"}}'
    wish = f'{{"project_id": "{project}", "env": "stage", "holder": "me"}}'
    return f"""BotFarm serves at {address}  (API: {address}/docs)
create:  {json_post} {address}/users -d '{user}'
acquire: {json_post} {address}/locks -d '{wish}'
release: curl -X DELETE{token} '{address}/locks?holder=me'"""


class _Server(uvicorn.Server):
    """Tells where it serves once it does."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self.settings = settings

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(banner(self.settings), flush=True)


class _Workers(Multiprocess):
    """Several serving processes; they tell where they serve once one of them does."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config, [config.bind_socket()])
        self.settings = settings
        self.told = False

    def keep_subprocess_alive(self) -> None:
        super().keep_subprocess_alive()
        if not self.told and any(process.is_ready() for process in self.processes):
            self.told = True
            print(banner(self.settings), flush=True)


def _open_many_files() -> None:
    """Each connection is a file, and thousands may wait."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1 << 20
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, 1 << 20), hard))


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def serve(settings: Settings, create_app: Callable[[Settings], Litestar]) -> int:
    """Serve until SIGTERM or SIGINT. The database and the keys are checked first, for a clear message."""
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "access_log": False,  # halves the rate
        "log_config": None,
        "server_header": False,
        "headers": HEADERS,
        "proxy_headers": "FORWARDED_ALLOW_IPS" in os.environ,  # else a caller could choose its address at /token
        "lifespan": "on",
        "backlog": 4096,
        "timeout_graceful_shutdown": 8,
        "timeout_keep_alive": 75,  # longer than clients keep idle connections, or one is closed as they use it again
        "http": Protocol,
        "ws": "none",
    }
    if settings.log == "quiet":
        logging.getLogger().setLevel(logging.WARNING)
    _open_many_files()
    if settings.auth == "off" and not _is_loopback(settings.host):
        log.warning("Opened to %s without authentication: whoever reaches it gets passwords", settings.host)
    for stop in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it is done: end well then
        signal.signal(stop, lambda *_: sys.exit(0))
    with prepared(settings) as url:
        keys = load_keys(settings)
        asyncio.run(_check_keys(url, settings.pooler, keyring_of(keys)))
        if settings.workers == 1:
            ready = msgspec.structs.replace(settings, database_url=Secret(url), keys=keys)
            server = _Server(uvicorn.Config(create_app(ready), **options), settings)
            server.run()
            return 0 if server.started else 3
        for variable, value in (("DATABASE_URL", url), ("BOTFARM_KEYS", keys.reveal() if keys else "")):
            os.environ.pop(f"{variable}_FILE", None)
            os.environ[variable] = value
        with tempfile.TemporaryDirectory(prefix="botfarm-") as folder:
            os.environ[SHARED] = folder
            workers = _Workers(uvicorn.Config("botfarm:app", workers=settings.workers, **options), settings)
            workers.run()
        failed = any(process.exitcode == STARTUP_FAILURE for process in workers.processes)
        return 0 if workers.told and not failed else 3


async def _check_keys(url: str, pooler: str, keyring: Keyring | None) -> None:
    async with open_pool(url, 1, "force_custom_plan", 60, pooler) as pool:
        await check_keys(pool, keyring)
