"""A grid of clients that lock users through several replicas, the faults they meet, and a checker of what they saw.

The clients, the database and the checker read one clock of one machine, so what a client saw can be compared with
what the database recorded. Each acquire names its idempotency key as the holder: so the records tell which call each
lock belongs to, seen by its client or not.

Sections: replicas and servers, HTTP, proxies, clients, the checker.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import asyncpg
import psutil
import ready
from conftest import KEY, ROOT, environment

from farm import embedded

# ---- Replicas and servers ----------------------------------------------------------------------------------


def quiet_port() -> int:
    """A free port below those of outgoing connections: while its replica is down nothing else may get it.

    A client that connects to a closed port among those can even meet itself.
    """
    for _ in range(200):
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


@dataclass(eq=False)
class Replica:
    """`python botfarm.py serve` as a process of its own; its output goes to a file, so that it never blocks.

    One whose libraries are others' (`LD_PRELOAD`) is started by a Python of its own, the others are forked.
    """

    url: str
    output: Path
    env: dict[str, str] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    port: int = field(default_factory=quiet_port)
    process: Any = None

    def start(self) -> None:
        own = {"DATABASE_URL": self.url, "BOTFARM_KEYS": KEY, "BOTFARM_PORT": str(self.port)}
        env = environment(own) | self.env
        with self.output.open("ab") as file, open(os.devnull) as nothing:
            if "LD_PRELOAD" in env:
                command = [sys.executable, str(ROOT / "botfarm.py"), "serve"]
                self.process = subprocess.Popen(command, env=env, stdout=file, stderr=file, cwd=ROOT)
            else:
                self.process = ready.fork(["serve"], env, nothing, file, file, changes=self.changes)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def stop(self, seconds: float = 20) -> int | None:
        """SIGTERM; the exit status, None where it had to be killed."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                return self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()
        return None

    async def ready(self, seconds: float = 40) -> None:
        """Wait until it answers; not by blocking, because its database may be behind a proxy of ours."""
        await eventually(lambda: answers(self.port, "/readyz"), seconds, f"replica {self.port}: {self.output}")


@asynccontextmanager
async def replicas(
    url: str, folder: Path, *environments: dict[str, str], changes: Mapping[str, Any] | None = None
) -> AsyncIterator[list[Replica]]:
    """A replica for each environment, all on one database; `changes` as `ready.fork` has them."""
    made = [Replica(url, folder / f"replica-{n}.log", env, changes or {}) for n, env in enumerate(environments)]
    try:
        for replica in made:
            replica.start()
        for replica in made:
            await replica.ready()
        yield made
    finally:  # in threads, because the last words of their connections may go through a proxy of ours
        await asyncio.gather(*(asyncio.to_thread(replica.stop) for replica in made))


@dataclass(eq=False)
class Postgres:
    """A PostgreSQL of the test's own, which nobody starts again but the test."""

    home: Path
    child: subprocess.Popen[Any] | None = None

    def __post_init__(self) -> None:
        self.home = embedded.settle_home(self.home)
        self.user = embedded._user(self.home)
        self.programs = embedded._programs(self.home / "data", self.user)
        embedded._create(self.home / "data", self.programs, self.user)
        self.dsn = embedded._dsn(str(self.home))

    def start(self) -> None:
        settings = embedded.SETTINGS | {"unix_socket_directories": str(self.home)}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [str(self.programs / "postgres"), "-D", str(self.home / "data"), *options]
        with (self.home / "postgres.log").open("ab") as file:
            self.child = subprocess.Popen(command, stdout=file, stderr=file, **embedded._process(self.user))

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """SIGQUIT is an immediate shutdown: a crash, but for the wait."""
        assert self.child
        self.child.send_signal(number)
        self.child.wait(30)

    async def ready(self) -> None:
        async def accepts() -> bool:
            with suppress(OSError, asyncpg.PostgresError):
                await (await asyncpg.connect(self.dsn, timeout=5)).close()
                return True
            return False

        await eventually(accepts, 30, "PostgreSQL")

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """Stop the postmaster, then all its children, where they stand."""
        assert self.child
        stopped = [psutil.Process(self.child.pid)]
        try:
            stopped[0].suspend()
            stopped += stopped[0].children(recursive=True)
            for process in stopped[1:]:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            yield
        finally:
            for process in reversed(stopped):
                with suppress(psutil.NoSuchProcess):
                    process.resume()


@asynccontextmanager
async def postgres() -> AsyncIterator[Postgres]:
    """In a folder that an unprivileged user can reach, because PostgreSQL refuses to run as root."""
    with tempfile.TemporaryDirectory(prefix="bf-") as folder:
        os.chmod(folder, 0o755)
        server = Postgres(Path(folder) / "home")
        server.start()
        try:
            await server.ready()
            yield server
        finally:
            server.stop()


async def eventually(condition: Callable[[], Awaitable[Any]], seconds: float, what: str) -> Any:
    """Ask again until it is true, bounded, without blocking the event loop."""
    end = time.monotonic() + seconds
    while not (found := await condition()):
        assert time.monotonic() < end, f"waited {seconds} s in vain: {what}"
        await asyncio.sleep(0.02)
    return found


# ---- HTTP --------------------------------------------------------------------------------------------------
# Small and quick, because hundreds of clients share one process with the proxies.

LOST = (OSError, EOFError)  # TimeoutError and IncompleteReadError are of these


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw) if self.raw else None

    @property
    def slug(self) -> str:
        """The kind of a problem, empty for what is none."""
        if self.headers.get("content-type") != "application/problem+json":
            return ""
        return self.body["type"].removeprefix("urn:botfarm:")


async def read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of a request or a reply, which always tells its length here."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":0")
    return head, await reader.readexactly(int(length.partition(b":")[2]))


def write_request(method: str, path: str, body: Any, key: str | None) -> bytes:
    """A request with a body as JSON, or with bytes: NDJSON."""
    is_bytes = isinstance(body, bytes)
    content = body if is_bytes else b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: grid", f"Content-Length: {len(content)}"]
    lines += [f"Content-Type: application/{'x-ndjson' if is_bytes else 'json'}"] if content else []
    lines += [f"Idempotency-Key: {key}"] if key else []
    return "\r\n".join([*lines, "", ""]).encode() + content


class Line:
    """A connection to one port, opened when it is needed and again after it broke."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def send(self, request: bytes) -> None:
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writer.write(request)

    async def ask(self, request: bytes, seconds: float = 30) -> Reply:
        try:
            async with asyncio.timeout(seconds):
                await self.send(request)
                assert self.reader
                head, raw = await read_message(self.reader)
        except BaseException:
            self.close()
            raise
        status, *lines = head.decode().strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return Reply(int(status.split()[1]), headers, raw)

    def close(self) -> None:
        if self.writer:
            self.writer.close()
        self.reader = self.writer = None


@asynccontextmanager
async def line(port: int) -> AsyncIterator[Line]:
    opened = Line(port)
    try:
        yield opened
    finally:
        opened.close()


async def ask(port: int, method: str, path: str, body: Any = None, key: str | None = None) -> Reply:
    """One call on a connection of its own."""
    async with line(port) as opened:
        return await opened.ask(write_request(method, path, body, key))


async def recovered(ports: list[int], project: str, seconds: float = 6.0) -> None:
    """Each replica locks a user and gives it back again, this soon."""

    async def works(port: int) -> bool:
        with suppress(*LOST):
            granted = await ask(port, "POST", "/locks", {"project_id": project, "ttl": 2})
            return granted.status == 201 and (await ask(port, "DELETE", f"/locks/{granted.body['id']}")).status == 204
        return False

    async with asyncio.timeout(seconds):  # also for a call that hangs
        await asyncio.gather(*(eventually(partial(works, port), seconds, f"replica {port}") for port in ports))


async def answers(port: int, path: str) -> bool:
    with suppress(*LOST):
        return (await ask(port, "GET", path)).status == 200
    return False


# ---- Proxies -----------------------------------------------------------------------------------------------


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passes: Callable[[bytes], bytes], silence: float
) -> None:
    """Hand bytes on until one side ends, or `passes` says that none get through, and the connection is lost."""
    with suppress(*LOST):
        while (part := await reader.read(1 << 16)) and (passing := passes(part)):
            if time.monotonic() < silence:
                writer.write(passing)
                await writer.drain()
    writer.close()


@asynccontextmanager
async def proxy(handle: Callable[..., Awaitable[None]]) -> AsyncIterator[int]:
    """A port whose connections `handle` serves; all of them end with the block."""
    running: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        running.add(task)
        try:
            with suppress(*LOST):
                await handle(reader, writer)
        except asyncio.CancelledError:
            pass  # the block ends; a cancelled handler would be reported as failed
        finally:
            running.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def drops_replies(port: int, share: float) -> Any:
    """A proxy before a replica: what is asked gets done, but a share of the replies is lost with the connection."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with line(port) as upstream:
            while True:
                await upstream.send(b"".join(await read_message(reader)))
                assert upstream.reader
                answer = b"".join(await read_message(upstream.reader))
                if random.random() < share:
                    return
                writer.write(answer)

    return proxy(handle)


@dataclass
class Wire:
    """Between a service and its database; `share` of what the database answers is lost with the connection."""

    url: str
    share: float = 0.0
    silent_after: float = float("inf")  # seconds after which a connection stays open, but nothing gets through
    cuts: int = 0
    behind: tuple[bytes, bytes] | None = None  # an answer with the first of these is followed by the second

    def _passes(self, part: bytes) -> bytes:
        lost = random.random() < self.share
        self.cuts += lost
        sign, more = self.behind or (b"", b"")
        return b"" if lost else part + more if sign in part else part

    async def _upstream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self.url)
        port = parts.port or int(parse_qs(parts.query).get("port", ["5432"])[0])
        if folder := parse_qs(parts.query).get("host"):
            return await asyncio.open_unix_connection(f"{folder[0]}/.s.PGSQL.{port}")
        return await asyncio.open_connection(parts.hostname, port)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await self._upstream()
        silence = time.monotonic() + self.silent_after
        try:
            await asyncio.gather(
                _pump(reader, up_writer, bytes, silence),
                _pump(up_reader, writer, self._passes, silence),
            )
        finally:
            up_writer.close()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        """The database's URL by this way."""
        async with proxy(self._handle) as port:
            parts = urlsplit(self.url)
            account = parts.netloc.rpartition("@")[0]
            yield urlunsplit(parts._replace(netloc=f"{account}@127.0.0.1:{port}", query=""))


# ---- Clients -----------------------------------------------------------------------------------------------


@dataclass
class Event:
    """One call as its client saw it; without a reply where none came."""

    kind: str
    key: str
    lock_id: str | None
    sent: float
    answered: float
    reply: Reply | None

    @property
    def status(self) -> int:
        return self.reply.status if self.reply else 0

    @property
    def outcome(self) -> str:
        return f"{self.kind} {self.status} {self.reply.slug if self.reply else ''}".strip()


LONGEST = 12.0  # seconds for a call: ten of the service's, and two for a slow machine
USUAL = {"release": 20, "renew": 8}
UNSTEADY = USUAL | {"keep": 4, "stall": 4, "vanish": 1, "hang up": 1}


@dataclass
class Grid:
    """Clients of one project. Each uses the replicas by turns and asks again elsewhere when one does not answer."""

    ports: list[int]
    project: str = field(default_factory=lambda: str(uuid.uuid4()))
    habits: dict[str, int] = field(default_factory=lambda: USUAL)
    ttls: tuple[int, ...] = (1, 2)
    wait: int = 0
    keyed: bool = True
    gives_up: float = 30.0  # seconds after which a client asks elsewhere
    patience: float = 30.0  # seconds after which it fails
    longest: float = LONGEST  # seconds that a call may take, whatever happens
    rate: float = 0.0  # cycles a second of all clients together, each begun at its moment; 0: as many as they can
    begun: int = 0
    began: float = 0.0
    offered: float = 0.0  # cycles whose moment came before the end, where there is a rate
    events: list[Event] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def create(self, count: int) -> None:
        """Users for the clients."""
        user = {"password": "pw", "project_id": self.project, "env": "stage"}
        lines = "\n".join(json.dumps(user | {"login": f"bot-{number}"}) for number in range(count))
        made = await ask(self.ports[0], "POST", "/users/import", lines.encode())
        assert (made.status, made.body["created"]) == (200, count)

    @asynccontextmanager
    async def clients(self, count: int) -> AsyncIterator[None]:
        """So many clients work during the block and end what they do after it. What one raises is raised.

        Where there is a rate they also catch up with it, so that a slow machine takes longer and leaves nothing out.
        """
        self.began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(self._work(number))
            try:
                yield
            finally:
                self.offered = self.rate * (time.monotonic() - self.began)
                self.over.set()

    async def _work(self, number: int) -> None:
        lines = [Line(port) for port in self.ports]
        turn = itertools.count(number)
        try:
            while not self.over.is_set() or self.begun < self.offered:
                await self._due()
                await self._cycle(Client(self, lines, turn))
        finally:
            for opened in lines:
                opened.close()

    async def _due(self) -> None:
        """Wait for the moment of the next cycle, where there is a rate. One that is late begins at once."""
        if self.rate:
            due = self.began + self.begun / self.rate
            self.begun += 1
            await asyncio.sleep(max(due - time.monotonic(), 0))

    async def _cycle(self, client: Client) -> None:
        habit = random.choices(list(self.habits), list(self.habits.values()))[0]
        if habit == "hang up":
            await client.hang_up()
            await asyncio.sleep(0.5)
            return
        granted = await client.insist("acquire", "POST", "/locks", client.wish)
        if granted.status == 201:
            await client.use(granted.body, habit)
        else:
            await asyncio.sleep(random.uniform(0.02, 0.1))


@dataclass
class Client:
    """One acquire of a client and what it does with the lock."""

    grid: Grid
    lines: list[Line]
    turn: Iterator[int]
    key: str = field(default_factory=lambda: str(uuid.uuid4()))

    def __post_init__(self) -> None:
        ttl = random.choice(self.grid.ttls)
        self.wish = {"project_id": self.grid.project, "ttl": ttl, "holder": self.key, "wait": self.grid.wait}

    def request(self, method: str, path: str, body: Any) -> bytes:
        return write_request(method, path, body, self.key if method == "POST" and self.grid.keyed else None)

    async def attempt(self, kind: str, method: str, path: str, body: Any = None, lock_id: str | None = None) -> Event:
        """One try, at the replica whose turn it is, noted whatever happens."""
        chosen = self.lines[next(self.turn) % len(self.lines)]
        event = Event(kind, self.key, lock_id, time.time(), 0.0, None)
        self.grid.events.append(event)
        with suppress(*LOST):
            event.reply = await chosen.ask(self.request(method, path, body), self.grid.gives_up)
        event.answered = time.time()
        return event

    async def insist(self, kind: str, method: str, path: str, body: Any = None, lock_id: str | None = None) -> Reply:
        """Try again, with the same key, until there is an answer that is not 503."""
        end = time.monotonic() + self.grid.patience
        while True:
            event = await self.attempt(kind, method, path, body, lock_id)
            if event.reply and event.status != 503:
                return event.reply
            if not self.grid.keyed and kind == "acquire":
                return event.reply or Reply(0, {}, b"")  # without a key it would be another lock
            assert time.monotonic() < end, f"no answer in {self.grid.patience} s: {event.outcome}"
            await asyncio.sleep(random.uniform(0.02, 0.1))

    async def use(self, lock: dict[str, Any], habit: str) -> None:
        if habit == "vanish":
            return
        await asyncio.sleep(random.uniform(0, 0.05))
        if habit == "stall":
            left = moment(lock["expires_at"]) - time.time()
            await asyncio.sleep(min(max(left, 0.0), lock["ttl"]) + random.uniform(0.005, 0.3))
        for _ in range({"release": 0, "keep": 3}.get(habit, 1)):
            await asyncio.sleep(0.6 * lock["ttl"] if habit == "keep" else 0)  # three of these are more than the ttl
            await self.insist("extend", "PATCH", f"/locks/{lock['id']}", lock_id=lock["id"])
        await self.insist("release", "DELETE", f"/locks/{lock['id']}", lock_id=lock["id"])

    async def hang_up(self) -> None:
        """Ask and close without a look at the reply."""
        event = Event("acquire", self.key, None, time.time(), time.time(), None)
        self.grid.events.append(event)
        with suppress(*LOST):
            async with line(random.choice(self.grid.ports)) as opened:
                await opened.send(self.request("POST", "/locks", self.wish))
                await asyncio.sleep(random.uniform(0, 0.01))


async def burst(port: int, project: str, count: int) -> list[Event]:
    """So many calls of each kind at once, each on a connection of its own."""
    user = {"password": "pw", "project_id": project, "env": "prod"}

    async def timed(method: str, path: str) -> Event:
        event = Event("burst", "", None, time.time(), 0.0, None)
        with suppress(*LOST):
            body = user | {"login": f"burst-{uuid.uuid4()}"} if method == "POST" else None
            event.reply = await ask(port, method, path, body)
        event.answered = time.time()
        return event

    paths = [("GET", f"/users?project_id={project}&limit=5"), ("POST", "/users"), ("GET", f"/locks/{uuid.uuid4()}")]
    return await asyncio.gather(*(timed(*path) for path in paths * count))


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


# ---- The checker -------------------------------------------------------------------------------------------

SLACK = 0.001  # seconds: the database's microseconds against floats
FORESEEN = {
    "acquire 201", "acquire 409 pool-exhausted", "acquire 409 lock-ended", "extend 200", "extend 404 lock-not-held",
    "release 204", "release 404 lock-not-held",
}  # fmt: skip
FAULTS = {f"{kind} {end}" for kind in ("acquire", "extend", "release") for end in ("0", "503 database-unavailable")}
FAULTS |= {"acquire 503 shutting-down"}

RECORDS = """
select lock_id, user_id, fence, holder, acquired_at, ended_at, ended_by
from history
where user_id in (select id from users where project_id = $1)
union all
select lock_id, user_id, fence, holder, acquired_at,
    case when expires_at <= statement_timestamp() then expires_at end,
    case when expires_at <= statement_timestamp() then 'expired' end
from locks
where lock_id is not null
    and user_id in (select id from users where project_id = $1)
"""


@dataclass(frozen=True)
class Record:
    """A lock as the database has it; it ends at infinity while it lives."""

    lock_id: str
    user_id: str
    fence: int
    holder: str
    acquired_at: float
    ended_at: float
    ended_by: str | None


def _record(row: asyncpg.Record) -> Record:
    ended_at = row["ended_at"].timestamp() if row["ended_at"] else float("inf")
    acquired_at = row["acquired_at"].timestamp()
    ids = str(row["lock_id"]), str(row["user_id"])
    return Record(*ids, row["fence"], row["holder"], acquired_at, ended_at, row["ended_by"])


@dataclass
class Evidence:
    """What the clients saw against what the database recorded."""

    events: list[Event]
    records: dict[str, Record]
    last_fences: dict[str, int]
    keyed: bool = True
    longest: float = LONGEST

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(event.outcome for event in self.events)

    def of(self, kind: str, status: int) -> list[Event]:
        return [event for event in self.events if (event.kind, event.status) == (kind, status)]

    def by_user(self) -> list[list[Record]]:
        """The locks of each user in the order of their fences."""
        ordered = sorted(self.records.values(), key=lambda record: (record.user_id, record.fence))
        return [list(locks) for _, locks in itertools.groupby(ordered, key=lambda record: record.user_id)]

    def check(self, faults: bool = True) -> None:
        """Every promise of the lock, each with the counter-examples that were found."""
        unforeseen = set(self.outcomes) - FORESEEN - (FAULTS if faults else {"acquire 0"})
        assert not unforeseen, {outcome: self.outcomes[outcome] for outcome in unforeseen}
        assert all("retry-after" in event.reply.headers for event in self.events if event.reply and event.status == 503)
        for problem in (
            self.slow_calls, self.overlaps, self.shrinking_fences, self.seen_overlaps, self.lost_grants,
            self.second_locks, self.wrong_ends, self.wrong_releases, self.wrong_renewals, self.wrong_denials,
            self.wrong_expiries,
        ):  # fmt: skip
            found = problem()
            assert not found, f"{problem.__name__}: {len(found)}, for instance {found[:3]}"

    def slow_calls(self) -> list[Any]:
        return [event for event in self.events if event.answered - event.sent > self.longest]

    def overlaps(self) -> list[Any]:
        """Two locks of a user at one moment of the database's time."""
        pairs = (pair for locks in self.by_user() for pair in itertools.pairwise(locks))
        return [(one, two) for one, two in pairs if two.acquired_at < one.ended_at]

    def shrinking_fences(self) -> list[Any]:
        """A fence that was given twice, or is higher than the user's present one, which the next lock raises."""
        pairs = (pair for locks in self.by_user() for pair in itertools.pairwise(locks))
        twice = [(one, two) for one, two in pairs if one.fence >= two.fence]
        return twice + [locks[-1] for locks in self.by_user() if locks[-1].fence != self.last_fences[locks[-1].user_id]]

    def seen_overlaps(self) -> list[Any]:
        """Two clients that could both believe to hold a user: from the reply to the release or the end they know."""
        spans: dict[str, list[tuple[float, float, str]]] = {}
        for event in self.of("acquire", 201):
            assert event.reply
            lock = event.reply.body
            if event.answered < (end := self._believed_end(lock)):  # else it knows that it got nothing any more
                spans.setdefault(lock["user"]["id"], []).append((event.answered, end, lock["id"]))
        pairs = (pair for found in spans.values() for pair in itertools.pairwise(sorted(found)))
        return [(one, two) for one, two in pairs if two[0] < one[1] - SLACK and one[2] != two[2]]

    def _believed_end(self, lock: dict[str, Any]) -> float:
        events = self._about.get(lock["id"], [])
        renewed = [moment(event.reply.body["expires_at"]) for event in events if event.status == 200 and event.reply]
        released = [event.sent for event in events if event.kind == "release"]
        return min([(renewed or [moment(lock["expires_at"])])[-1], *released])

    @cached_property
    def _about(self) -> dict[str, list[Event]]:
        """The calls with the id of each lock, in the order of their sending."""
        found: dict[str, list[Event]] = {}
        for event in self.events:
            if event.lock_id:
                found.setdefault(event.lock_id, []).append(event)
        return found

    def lost_grants(self) -> list[Any]:
        """Acknowledged locks that the database does not have just so."""
        return [event for event in self.of("acquire", 201) if not self._recorded(event)]

    def _recorded(self, event: Event) -> bool:
        assert event.reply
        lock = event.reply.body
        record = self.records.get(lock["id"])
        told = lock["user"]["id"], lock["fence"], lock["holder"], moment(lock["acquired_at"])
        return (
            record is not None
            and told == (record.user_id, record.fence, record.holder, record.acquired_at)
            and record.holder == event.key
            and record.acquired_at <= event.answered + SLACK
            and record.ended_at >= event.sent
        )

    def second_locks(self) -> list[Any]:
        """Keys with more than one lock: a repeat that got another one, so that the first was lost.

        Without keys the service itself may ask the database again after a lost reply; then it gives the first back.
        """
        if not self.keyed:
            unseen = [record for id, record in self.records.items() if id not in self._first_told]
            return [record for record in unseen if record.ended_by != "released"]
        found = Counter(record.holder for record in self.records.values())
        return [key for key, count in found.items() if count > 1]

    def wrong_ends(self) -> list[Any]:
        """Keys whose lock is said to have ended while it lives, or never was."""
        ends = {record.holder: record.ended_at for record in self.records.values()}
        refused = [event for event in self.of("acquire", 409) if event.outcome.endswith("lock-ended")]
        return [event for event in refused if ends.get(event.key, float("inf")) > event.answered + SLACK]

    def wrong_releases(self) -> list[Any]:
        """Releases that were acknowledged without being what ended that lock at that time."""
        return [event for event in self.of("release", 204) if not self._ended(event)] + [
            id for id, count in Counter(event.lock_id for event in self.of("release", 204)).items() if count > 1
        ]

    def _ended(self, event: Event) -> bool:
        record = self.records[event.lock_id or ""]
        in_time = event.sent - SLACK <= record.ended_at <= event.answered + SLACK
        return record.ended_by == "released" and in_time

    def wrong_renewals(self) -> list[Any]:
        """Heartbeats that were accepted after the end of their lock: as it's recorded, or as its client knew it."""
        beats = self.of("extend", 200)
        late = [event for event in beats if self.records[event.lock_id or ""].ended_at < event.sent]
        return late + [event for event in beats if event.sent > self._told_end(event) + SLACK]

    def _told_end(self, beat: Event) -> float:
        """The end that was told last before a heartbeat; infinity where one before it stayed unanswered."""
        before = [e for e in self._about[beat.lock_id or ""] if e.kind == "extend" and e.sent < beat.sent]
        if any(e.status in (0, 503) for e in before):
            return float("inf")
        told = [e.reply.body["expires_at"] for e in before if e.reply and e.status == 200]
        return moment((told or [self._first_told[beat.lock_id or ""]])[-1])

    @cached_property
    def _first_told(self) -> dict[str, str]:
        """What the grant of each lock said of its end."""
        grants = (event.reply.body for event in self.of("acquire", 201) if event.reply)
        return {lock["id"]: lock["expires_at"] for lock in grants}

    def wrong_denials(self) -> list[Any]:
        """Calls that were told that their lock had ended, before it had."""
        denied = [event for event in self.events if event.lock_id and event.status == 404]
        return [event for event in denied if self.records[event.lock_id or ""].ended_at > event.answered + SLACK]

    def wrong_expiries(self) -> list[Any]:
        """Locks that expired at another time than their client was told last, where no heartbeat stayed unanswered."""
        return [event for event in self.of("acquire", 201) if self._expired_elsewhen(event)]

    def _expired_elsewhen(self, event: Event) -> bool:
        assert event.reply
        lock = event.reply.body
        record, beats = self.records[lock["id"]], [e for e in self._about.get(lock["id"], []) if e.kind == "extend"]
        told = [lock["expires_at"], *(e.reply.body["expires_at"] for e in beats if e.reply and e.status == 200)]
        unsure = any(e.status in (0, 503) for e in beats)
        return record.ended_by == "expired" and not unsure and record.ended_at != moment(told[-1])


def check_burst(events: list[Event], longest: float = LONGEST) -> None:
    """Each call was answered in time: by what it asked for, or by 503 with the time to try again."""
    outcomes = Counter((event.status, event.reply.slug if event.reply else "") for event in events)
    foreseen = {(200, ""), (201, ""), (404, "lock-not-held"), (503, "database-unavailable")}
    assert set(outcomes) <= foreseen, outcomes
    assert all("retry-after" in event.reply.headers for event in events if event.reply and event.status == 503)
    slowest = max(event.answered - event.sent for event in events)
    assert slowest < longest, (slowest, outcomes)


async def conclude(grid: Grid, url: str, seconds: float = 6, faults: bool = True) -> Evidence:
    """Wait until every user is free, which no fault may hold up for longer than its ttl; then check everything."""

    async def all_free() -> bool:
        with suppress(*LOST):
            found = await ask(grid.ports[0], "GET", f"/pools?project_id={grid.project}")
            return found.status == 200 and all(pool["free"] == pool["total"] for pool in found.body["items"])
        return False

    await eventually(all_free, seconds, "users that should be free")
    evidence = await read_evidence(grid, url)
    evidence.check(faults)
    return evidence


async def read_evidence(grid: Grid, url: str) -> Evidence:
    connection = await asyncpg.connect(url)
    try:
        records = [_record(row) for row in await connection.fetch(RECORDS, grid.project)]
        fences = await connection.fetch("select user_id, fence from locks")
    finally:
        await connection.close()
    last = {str(row["user_id"]): row["fence"] for row in fences}
    return Evidence(grid.events, {record.lock_id: record for record in records}, last, grid.keyed, grid.longest)
