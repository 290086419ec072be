"""uvicorn as we run it: what it owes to slow callers and to those who have gone, when it stops, how many processes.

uvicorn has a protocol object for each connection, a cycle for each request on it, and a server for each process.
"""

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

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.supervisors import Multiprocess

from farm.check import address
from farm.database import open_pool
from farm.locks import GONE
from farm.migrations import prepared
from farm.passwords import check_keys, keyring_of, load_keys
from farm.problems import HeadTooLarge, MalformedBody, Problem
from farm.settings import Settings, log
from farm.telemetry import SHARED
from farm.words import JSON

# -- Connections -----------------------------------------------------------------------------------------

HEADERS = [("X-Content-Type-Options", "nosniff")]  # of every reply
GRACE = 8  # seconds for what runs when the service is told to stop
CALLERS = logging.getLogger("botfarm.callers")  # what uvicorn says of callers; but for errors anybody could fill it
CALLERS.setLevel(logging.ERROR)


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP, which bounds what slow and endless callers hold, and tells a call that its caller is gone.

    uvicorn itself would keep for ever a connection that sends nothing or half a request, a reply that nobody reads,
    and headers and trailers of any size.
    """

    LATE = 40  # seconds for a head; in as many a body brings SLOW bytes, and some of a reply is read
    SLOW = 40 * 1024
    HEAD = 64 * 1024  # bytes of a head, of trailers, or of what else is no body

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self.logger = CALLERS
        self._heads = self._brought = self._bodiless = 0
        self._running: RequestResponseCycle | None = None  # the call that is answered now, or was last
        self._owed: tuple[Any, float] = None, 0
        self._look()

    def _look(self) -> None:
        """Give up a caller that owes the same as LATE seconds ago."""
        owed, now = self._owes(), self.loop.time()
        if owed is None or owed != self._owed[0]:
            self._owed = owed, now
        elif now - self._owed[1] >= self.LATE:
            self.transport.abort()
        self._timer = self.loop.call_later(self.LATE / 8, self._look)

    def _owes(self) -> tuple[str, int] | None:
        """What the caller has to do next. As long as it gets on, the number changes."""
        if unsent := self.transport.get_write_buffer_size():  # then the system is full too, with up to megabytes
            queued = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
            return "reading", unsent + int.from_bytes(queued, sys.byteorder)
        cycle = self.cycle
        if cycle is None or cycle.scope is not self.scope:
            return "head", self._heads
        if cycle.response_complete:  # uvicorn's own timer is gone when an empty line came, or more of a refused body
            return None if self.timeout_keep_alive_task else ("head", self._heads)
        return ("body", self._brought // self.SLOW) if cycle.more_body and not self.flow.read_paused else None

    def data_received(self, data: bytes) -> None:
        self._bodiless += len(data)
        super().data_received(data)
        if self._bodiless > self.HEAD and not self.transport.is_closing():
            self._refuse(HeadTooLarge())

    def on_headers_complete(self) -> None:
        self._heads += 1
        self._bodiless = 0
        if self.url.startswith(b"//"):  # else //users is read as the index page of a host named users
            self.url = b"/%252F" + self.url[2:]
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._brought += len(body)
        self._bodiless = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        self._refuse(MalformedBody("The request is not HTTP."))

    def _refuse(self, problem: Problem) -> None:
        """Answer without the application, and end the connection."""
        body = problem.response().content
        headers = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(body))]
        headers += [(b"connection", b"close"), *self.server_state.default_headers]
        head = [STATUS_LINE[problem.status_code], *(b"%b: %b\r\n" % header for header in headers)]
        self.transport.write(b"".join([*head, b"\r\n", body]))
        self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """uvicorn tells the last call that it has read, and the one that is answered may be one before that."""
        self._timer.cancel()
        if running := self._running:
            running.scope.setdefault("state", {})[GONE] = True
            running.disconnected = running.disconnected or not running.response_complete
            running.message_event.set()
        super().connection_lost(exc)


# -- The process -----------------------------------------------------------------------------------------


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
    service = address(settings.host, settings.port)
    project = "11111111-1111-4111-8111-111111111111"
    token = ' -H "Authorization: Bearer $TOKEN"' if settings.auth == "on" else ""
    json_post = f"curl -X POST{token} -H 'Content-Type: {JSON}'"
    user = f'{{"login": "bot-1", "password": "secret", "project_id": "{project}", "env": "stage"}}'
    wish = f'{{"project_id": "{project}", "env": "stage", "holder": "me"}}'
    return f"""BotFarm serves at {service}  (API: {service}/docs)
create:  {json_post} {service}/users -d '{user}'
acquire: {json_post} {service}/locks -d '{wish}'
release: curl -X DELETE{token} '{service}/locks?holder=me'"""


def _greet() -> None:
    print(banner(Settings.load()), flush=True)


class _Server(uvicorn.Server):
    """One serving process."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            _greet()


class _Workers(Multiprocess):
    """Several serving processes. `started`: one of them serves, or has served."""

    started = False

    def keep_subprocess_alive(self) -> None:
        super().keep_subprocess_alive()
        if not self.started and any(process.is_ready() for process in self.processes):
            self.started = True
            _greet()


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


def _config(settings: Settings, app: str) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        access_log=False,  # halves the rate
        log_config=None,
        server_header=False,
        headers=HEADERS,
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,  # else a caller could choose its address at /token
        lifespan="on",
        backlog=4096,
        timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=75,  # longer than clients keep idle connections, or one is closed as they use it again
        http=Protocol,
        ws="none",
    )


def _run(config: uvicorn.Config) -> bool:
    """Whether it has served."""
    if config.workers == 1:
        server = _Server(config)
        server.run()
        return server.started
    workers = _Workers(config, [config.bind_socket()])
    with tempfile.TemporaryDirectory(prefix="botfarm-") as folder:
        os.environ[SHARED] = folder
        workers.run()
    return workers.started and all(process.exitcode != STARTUP_FAILURE for process in workers.processes)


async def _keys(settings: Settings, url: str) -> str:
    """Those that the database's passwords are sealed with."""
    keys = load_keys(settings)
    async with open_pool(url, 1, "force_custom_plan", 60, settings.pooler) as pool:
        await check_keys(pool, keyring_of(keys))
    return keys.reveal() if keys else ""


def serve(settings: Settings, app: str) -> int:
    """Serve until SIGTERM or SIGINT. The database and the keys are checked first, for a clear message."""
    if settings.log == "quiet":
        logging.getLogger().setLevel(logging.WARNING)
    _open_many_files()
    if settings.auth == "off" and not _is_loopback(settings.host):
        log.warning("Opened to %s without authentication: whoever reaches it gets passwords", settings.host)
    for stop in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it is done: end well then
        signal.signal(stop, lambda *_: sys.exit(0))
    with prepared(settings) as url:
        found = {"DATABASE_URL": url, "BOTFARM_KEYS": asyncio.run(_keys(settings, url))}
        for variable in found:  # the application reads the environment
            os.environ.pop(f"{variable}_FILE", None)
        os.environ.update(found)
        return 0 if _run(_config(settings, app)) else STARTUP_FAILURE
