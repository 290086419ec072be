"""uvicorn as we run it: what it owes to slow callers and to those who have gone, when it stops, how many processes.

uvicorn has a protocol object for each connection, a cycle for each request on it, and a server for each process.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import socket
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from typing import Any

import httptools
import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.multiprocess import Process

from farm.addresses import run_apart
from farm.check import address
from farm.locks import ANSWERS, GONE
from farm.migrations import prepared
from farm.passwords import proven_keys
from farm.problems import HeadTooLarge, MalformedBody, Problem
from farm.settings import BadSettings, Settings, log
from farm.telemetry import SHARED
from farm.words import JSON

# -- Connections -----------------------------------------------------------------------------------------

HEADERS = [("X-Content-Type-Options", "nosniff")]  # of every reply
GRACE = 7  # seconds for what runs when the service is told to stop; with what is closed then, ten at the most


class _Way:
    """The connection as a call has it whose caller has not sent all of its body, or sends nothing any more."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.begun = 0  # bytes of the reply that are written already, see `Protocol._ask`

    def is_closing(self) -> bool:
        return self.protocol.transport.is_closing()

    def write(self, data: bytes) -> None:
        begun, self.begun = self.begun, 0
        self.protocol.transport.write(data[begun:])

    def close(self) -> None:
        self.protocol.end(self.protocol.cycle.more_body)


def _without_chunks(cycle: RequestResponseCycle) -> Any:
    """What sends a reply over HTTP/1.0: its end is that of the connection. (uvicorn would write chunks there, too.)"""
    send = cycle.send

    async def send_plain(message: Any) -> None:
        cycle.chunked_encoding = False
        cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return send_plain


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP, which bounds what slow and endless callers hold, and tells a call that its caller is gone.

    uvicorn itself would keep for ever a connection that sends nothing or half a request, a reply that nobody reads,
    and headers and trailers of any size. It would drop a call whose caller has closed its sending half, and the body
    of one that wishes for another protocol, and take for a body what comes after a refusal.
    """

    LATE = 40  # seconds for a head; in as many a body brings SLOW bytes, and some of a reply is read
    SLOW = 40 * 1024
    HEAD = 64 * 1024  # bytes of a head, of trailers, or of what else is no body
    BEGINNING = b"HTTP/1.1 "  # of every reply
    PROBE = 0.02  # seconds from the end of what a caller sends to a look whether it is there; the next ones are rarer

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._heads = self._brought = self._bodiless = 0
        self._running: RequestResponseCycle | None = None  # the call that is answered now, or was last
        self._owed: tuple[Any, float] = None, 0
        self._way: Any = _Way(self)
        self._keeps = True  # whether more requests may follow the one that is read
        self._drops = self._is_half = False  # what comes goes nowhere; nothing comes any more
        self._asking: asyncio.Task[None] | None = None
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
            return "reading", unsent + self._unread()
        if self._drops:
            return "end", self._brought // self.SLOW
        cycle = self.cycle
        if cycle is None or cycle.scope is not self.scope:
            return "head", self._heads
        if cycle.response_complete:  # uvicorn's own timer is gone when an empty line came
            return None if self.timeout_keep_alive_task else ("head", self._heads)
        return ("body", self._brought // self.SLOW) if cycle.more_body and not self.flow.read_paused else None

    def _unread(self) -> int:
        """Bytes that the system has, and that have not reached the caller."""
        queued = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(queued, sys.byteorder)

    def data_received(self, data: bytes) -> None:
        if self._drops:
            self._brought += len(data)
            self._unset_keepalive_if_required()
            return
        self._bodiless += len(data)
        self._unset_keepalive_if_required()
        try:
            rest: bytes | memoryview = data
            while rest and not self._drops:
                rest = self._read(rest)
        except httptools.HttpParserError:
            self._refuse(MalformedBody("The request is not HTTP."))
        if self._bodiless > self.HEAD and not (self._drops or self.transport.is_closing()):
            self._refuse(HeadTooLarge())

    def _read(self, data: bytes | memoryview) -> bytes | memoryview:
        """Up to the head of a request that wishes to go on in another protocol; what comes behind it.

        The parser takes no body of it, so the head is read once more without that wish. Java's own client wishes so
        with the first request of each connection.
        """
        try:
            self.parser.feed_data(data)
            return b""
        except httptools.HttpParserUpgrade as wish:
            rest = memoryview(data)[wish.args[0] :]  # no copy: it may hold thousands of such requests
        if (method := self.parser.get_method()) == b"CONNECT":
            raise httptools.HttpParserError
        kept = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        line = b"%b %b HTTP/%b\r\n" % (method, self.url, self.parser.get_http_version().encode())
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(b"".join([line, *kept, b"\r\n"]))
        return rest

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._heads += 1
        self._bodiless = 0
        if self.url.startswith(b"//"):  # else //users is read as the index page of a host named users
            self.url = b"/%252F" + self.url[2:]
        super().on_headers_complete()
        cycle = self.cycle  # a reply before the end of the body ends the connection, as long as that end has not come
        self._keeps, cycle.keep_alive, cycle.transport = cycle.keep_alive, False, self._way
        if cycle.scope["http_version"] != "1.1":
            cycle.waiting_for_100_continue = False  # RFC 9110, section 10.1.1
            cycle.send = _without_chunks(cycle)

    def on_body(self, body: bytes) -> None:
        self._brought += len(body)
        self._bodiless = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        cycle = self.cycle
        if not cycle.response_started:
            cycle.keep_alive, cycle.transport = self._keeps, self.transport

    def shutdown(self) -> None:
        self._keeps = False
        super().shutdown()

    # What a caller has sent is no sign that it is there, and that it sends no more is none that it is gone: the system
    # tells the end of a half and that of a whole connection alike. But who is gone resets the connection when
    # something is written, and who is not acknowledges it. So the bytes that every reply begins with are written one
    # by one, and the last of them before a user is handed out. (An interim reply, 100, would do the same, but not
    # over HTTP/1.0, and some clients take it for the reply.)

    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whether somebody is still to be answered, and may be there to read it."""
        cycle, running = self.cycle, self._running
        if self._drops or cycle is None or running is None or cycle.response_complete or cycle.more_body:
            return False
        self._is_half, cycle.keep_alive = True, False
        for asked in (running, *(waiting for waiting, _ in self.pipeline)):
            asked.scope["state"][ANSWERS] = self.answers  # pyright: ignore[reportTypedDictNotRequiredAccess]
        self._follow(running)
        return True

    def _follow(self, cycle: RequestResponseCycle) -> None:
        """Look whether the caller is there while it is answered."""
        self._way.begun, cycle.transport = 0, self._way
        self._asking = self.loop.create_task(self._ask(cycle))

    async def _ask(self, cycle: RequestResponseCycle) -> None:
        """Most calls are answered before a look would help."""
        pause = self.PROBE
        while not cycle.response_started and self._way.begun < len(self.BEGINNING) - 1:
            await asyncio.sleep(pause)
            if cycle.response_started or not await self.answers():
                break
            pause *= 4

    def _begin(self) -> None:
        begun = self._way.begun
        self.transport.write(self.BEGINNING[begun : begun + 1])
        self._way.begun = min(begun + 1, len(self.BEGINNING))

    def _is_reset(self) -> bool:
        return bool(self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    async def answers(self) -> bool:
        """Whether a caller that sends nothing any more is there; where neither is known after a second it is."""
        end = self.loop.time() + 1
        if not self.transport.is_closing():
            self._begin()
        while not self.transport.is_closing() and self.loop.time() < end:
            if self._is_reset():
                self.transport.abort()
            elif not self.transport.get_write_buffer_size() and not self._unread():
                return True
            else:
                await asyncio.sleep(0.002)
        return not self.transport.is_closing()

    # -- The end

    def _refuse(self, problem: Problem) -> None:
        """Answer without the application, and end the connection."""
        body = problem.response().content
        headers = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(body))]
        headers += [(b"connection", b"close"), *self.server_state.default_headers]
        head = [STATUS_LINE[problem.status_code], *(b"%b: %b\r\n" % header for header in headers)]
        self.transport.write(b"".join([*head, b"\r\n", body]))
        self.end(self._running is None or self._running.response_complete)

    def end(self, more: bool) -> None:
        """Close the connection after a reply; where its caller may send more, only our half.

        Else the system would reset it when that comes, maybe before the caller has read the reply.
        """
        if more and not self.transport.is_closing():
            self._drops = True
            self.transport.write_eof()
        else:
            self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        if self._is_half:
            self._follow(cycle)
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """uvicorn tells the last call that it has read, and the one that is answered may be one before that."""
        self._timer.cancel()
        if self._asking:
            self._asking.cancel()
        if running := self._running:
            running.scope.setdefault("state", {})[GONE] = True
            running.disconnected = running.disconnected or not running.response_complete
            running.message_event.set()
        super().connection_lost(exc)


# -- The process -----------------------------------------------------------------------------------------


def end_with_parent() -> None:
    """Let a worker end when the process that started it does, however that ends: else it would keep the port.

    As at SIGTERM, but within three seconds.
    """
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_after, args=(parent.sentinel,), name="parent", daemon=True).start()


def _end_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)
    os._exit(1)


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
    """Lines to paste: a value that calls take by default is another one where it is not allowed here."""
    service = address(settings.host, settings.port)
    project = "11111111-1111-4111-8111-111111111111"
    token = ' -H "Authorization: Bearer $TOKEN"' if settings.auth == "on" else ""
    json_post = f"curl -X POST{token} -H 'Content-Type: {JSON}'"
    pool = {"project_id": project, "env": "stage" if "stage" in settings.envs else settings.envs[0]}
    domain = {} if "regular" in settings.domains else {"domain": settings.domains[0]}
    ttl = {} if settings.max_ttl >= 300 else {"ttl": settings.max_ttl}
    user = json.dumps({"login": "bot-1", "password": "secret", **pool, **domain})
    wish = json.dumps({**pool, **ttl, "holder": "me"})
    return f"""BotFarm serves at {service}  (API: {service}/docs)
create:  {json_post} '{service}/users' -d '{user}'
acquire: {json_post} '{service}/locks' -d '{wish}'
release: curl -X DELETE{token} '{service}/locks?holder=me'"""


def _greet() -> None:
    """Whoever reads it, or not: the service serves on."""
    with contextlib.suppress(OSError):
        print(banner(Settings.load()), flush=True)


class _Server(uvicorn.Server):
    """One serving process."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A second ctrl-C hurries nobody: uvicorn would break off the stop, which ends by itself, with a traceback."""
        if not self.should_exit:
            super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        _greet()


class _Workers(Multiprocess):
    """Several serving processes. `started`: one of them serves, or has served; `failed`: so none goes on."""

    started = failed = False
    spare = 2  # starts that may fail before: the database was there when this process looked

    def keep_subprocess_alive(self) -> None:
        if self.should_exit.is_set():
            return
        for process in self.processes:
            process.child_conn.close()  # our copy: with it open one that ends is waited for like one that is silent
        super().keep_subprocess_alive()
        if not self.started and any(process.is_ready() for process in self.processes):
            self.started = True
            _greet()
        for place, process in enumerate(self.processes):
            if process.exitcode == STARTUP_FAILURE and (self.started or self.spare):
                self._start_again(place)
        self.failed = self.should_exit.is_set()

    def _start_again(self, place: int) -> None:
        """One that comes back while the database is away can't start: for uvicorn a reason to end the others, too."""
        self.spare -= not self.started
        self.processes[place] = Process(self.config, self.sockets)
        self.processes[place].start()
        self.should_exit.clear()

    def terminate_all(self) -> None:
        """Else callers would still reach the port, and nobody there."""
        for sock in self.sockets:
            sock.close()
        super().terminate_all()


def _open_many_files() -> None:
    """Each connection is a file, and thousands may wait."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1 << 20
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, 1 << 20), hard))


def _is_loopback(host: str) -> bool:
    """Whether this machine alone reaches what listens there.

    BadSettings where nothing can. (uvicorn would name neither the setting nor its value.)
    """
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as fault:
        raise BadSettings(f"BOTFARM_HOST: {host!r} is not an address to listen on: {fault}") from None
    return all(ipaddress.ip_address(place[0]).is_loopback for *_, place in found)


def _config(settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        "botfarm:app",
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
        timeout_worker_healthcheck=30,  # with 5 s workers were killed as they began, again and again, on a busy machine
        timeout_keep_alive=75,  # longer than clients keep idle connections, or one is closed as they use it again
        http=Protocol,
        ws="none",
    )


def _run(config: uvicorn.Config) -> int:
    """The exit status. (One process that can't start ends with it by itself.)"""
    if config.workers == 1:
        _Server(config).run()
        return 0
    try:
        workers = _Workers(config, [config.bind_socket()])
    except SystemExit:  # uvicorn has told why, but not where
        log.error("BOTFARM_HOST and BOTFARM_PORT: can't listen on %s, port %d", config.host, config.port)
        raise
    with tempfile.TemporaryDirectory(prefix="botfarm-") as folder:
        os.environ[SHARED] = folder
        workers.run()
    return STARTUP_FAILURE if workers.failed else 0


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT. The database and the keys are checked first, for a clear message."""
    _open_many_files()
    if not _is_loopback(settings.host) and settings.auth == "off":
        log.warning("Opened to %s without authentication: whoever reaches it gets passwords", settings.host)
    for stop in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it is done: end well then
        signal.signal(stop, lambda *_: sys.exit(0))
    with prepared(settings) as url:
        keys = run_apart(proven_keys(settings, url))
        found = {"DATABASE_URL": url, "BOTFARM_KEYS": keys.reveal() if keys else ""}
        for variable in found:  # the application reads the environment
            os.environ.pop(f"{variable}_FILE", None)
        os.environ.update(found)
        return _run(_config(settings))
