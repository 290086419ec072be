"""What happened: the log, which is the audit trail, and the metrics.

`Events` is told by whoever does something; it counts, and writes an `Entry` into the `Journal`. `Exporter` answers
GET /metrics: what was counted, and gauges that are read at that moment.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import platform
import re
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from select import PIPE_BUF
from typing import Any, TypeVar, get_args

import asyncpg
import msgspec
from msgspec import Struct
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric as MetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from farm import VERSION
from farm.database import DATABASE_FAULTS, SQL, Coalescer, Connections
from farm.passwords import SEALED
from farm.problems import Problem, TokenRefusal
from farm.settings import log
from farm.words import UserState, Wish

# ---- The log -----------------------------------------------------------------------------------------------


class Cause(Struct, frozen=True):
    """Which request made something happen; nothing where the service did it by itself."""

    request_id: str | None = None
    trace_id: str | None = None
    client: uuid.UUID | None = None
    echo: list[tuple[bytes, bytes]] | None = None  # headers that the caller sent and finds in the reply


NOWHERE = Cause()


class Entry(Struct, omit_defaults=True):
    """A line of the log; what does not apply is left out. No member ever holds a password, a key, a token or a URL."""

    time: datetime
    level: str
    event: str
    request_id: str | None = None
    trace_id: str | None = None  # of the caller's traceparent
    client: uuid.UUID | None = None  # with BOTFARM_AUTH=on
    holder: str | None = None
    user_id: uuid.UUID | str | None = None
    lock: str | None = None  # the first 8 characters of its id
    fence: int | None = None
    ttl_seconds: int | None = None
    acquire_seconds: float | None = None
    wait_seconds: float | None = None
    revealed: bool = False  # the password leaves with the reply
    held_seconds: float | None = None
    cooldown_seconds: int | None = None
    outcome: str | None = None  # as the test told it
    changed: list[str] | None = None
    reason: str | None = None
    valid: bool | None = None
    created: int | None = None
    updated: int | None = None
    unchanged: int | None = None
    count: int | None = None
    logger: str | None = None
    message: str | None = None
    traceback: str | None = None


def readable(entry: Entry) -> bytes:
    """A line for people. What could move the cursor of their terminal is escaped."""
    members = ((name, getattr(entry, name)) for name in Entry.__struct_fields__[3:])
    told = "".join(f" {name}={_plain(value)}" for name, value in members if value not in (None, False))
    return f"{entry.time:%H:%M:%S.%f} {entry.level:7} {entry.event}{told}".encode()


def _plain(value: Any) -> str:
    if not isinstance(value, str):
        return str(value)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    return text if text and " " not in text else f'"{text}"'


class Journal:
    """Writes lines to standard error from a thread of its own, whole lines in pieces that a pipe takes at once.

    So workers that share a pipe take no turns and yet break no line of another. Where the reader is slower than the
    events, up to LIMIT of them wait; then the newest are lost, and counted: in the log itself as soon as it moves
    again, and in botfarm_log_lines_lost_total. To stall the test grid instead would be worse: the database's history
    has each lock.
    """

    LIMIT = 50_000  # lines, of some 250 bytes
    PAUSE = 0.1  # seconds for which lines gather: each turn of the thread costs the loop one (0.02 s: 8 % of the rate)

    def __init__(self, file: int = 2) -> None:
        self.lost = 0
        self._file = file
        self._is_torn = False  # as a full disk leaves a line
        self._told = 0  # of those that were lost
        self._lines: deque[bytes] = deque()
        self._shown = readable if os.isatty(file) else msgspec.json.Encoder().encode
        self._hurry = threading.Event()
        self._thread: threading.Thread | None = None

    def write(self, entry: Entry) -> None:
        """Made a line at once: left to the thread, on another core, that took five times as long (1.5 us)."""
        if len(self._lines) >= self.LIMIT:
            self.lost += 1
            return
        self._lines.append(self._shown(entry) + b"\n")
        if self._thread is None and not sys.is_finalizing():  # then a thread that is started never runs
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            self._thread.start()
            atexit.register(self.flush)

    def flush(self, seconds: float = 1) -> None:
        """Wait until all is written; a reader that takes nothing is not waited for any longer."""
        end = time.monotonic() + seconds
        self._hurry.set()
        while self._thread and self._hurry.is_set() and time.monotonic() < end:
            time.sleep(0.001)

    def _run(self) -> None:
        while True:
            hurried = self._hurry.wait(self.PAUSE)
            while self._lines:
                self._write(self._piece())
            if hurried:
                self._hurry.clear()

    def _piece(self) -> bytes:
        """The next lines that a pipe takes at once (64 KiB gave no better rate); one that is longer stands alone."""
        piece = self._lines.popleft()
        while self._lines and len(piece) + len(self._lines[0]) <= PIPE_BUF:
            piece += self._lines.popleft()
        return piece

    def _write(self, piece: bytes) -> None:
        try:
            if (lost := self.lost) > self._told:
                entry = Entry(datetime.now(UTC), "error", "log-lost", count=lost - self._told)
                self._put(self._shown(entry) + b"\n")
                self._told = lost
            self._put(piece)
        except OSError:  # the reader is gone
            self.lost += piece.count(b"\n")

    def _put(self, data: bytes) -> None:
        data = b"\n" + data if self._is_torn else data
        while data:
            try:
                written = os.write(self._file, data)
                self._is_torn = data[written - 1] != ord("\n")
                data = data[written:]
            except BlockingIOError:  # somebody made standard error non-blocking
                time.sleep(0.01)


JOURNAL = Journal()  # of this process
DETAIL = re.compile(r"\n[ |]*DETAIL:.*")  # of PostgreSQL's errors: shows rows, and so lock ids and sealed secrets


class LogHandler(logging.Handler):
    """Every other record of the service as a line of the log too. One of a request has its `cause`."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            cause: Cause = getattr(record, "cause", None) or NOWHERE
            entry = Entry(datetime.fromtimestamp(record.created, UTC), record.levelname.lower(), "message")
            entry.request_id, entry.trace_id, entry.client = cause.request_id, cause.trace_id, cause.client
            entry.logger, entry.message = record.name, DETAIL.sub("", record.getMessage())
            if record.exc_info:
                entry.traceback = DETAIL.sub("", logging.Formatter().formatException(record.exc_info))
            JOURNAL.write(entry)
        except Exception:
            self.handleError(record)


def tell(event: str, count: int) -> None:
    """What a command did."""
    JOURNAL.write(Entry(datetime.now(UTC), "info", event, count=count))


def log_as_lines(events: bool = True) -> None:
    """Let all records of the process go into the log."""
    logging.basicConfig(level=logging.INFO if events else logging.WARNING, handlers=[LogHandler()])
    for noisy in ("httpx", "yoyo", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("asyncpg").setLevel(logging.ERROR)  # warns of an outage with a traceback; we tell of it in a line


# ---- What is counted ---------------------------------------------------------------------------------------

SHARED = "PROMETHEUS_MULTIPROC_DIR"  # `serve` makes this folder for its workers
FOLDER = os.environ.get(SHARED)  # read once, because prometheus_client reads it once: when it is imported

MOMENTS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
WAITS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
HOLDS = (1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0, 86400.0)
SIZES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
STATEMENTS = ("acquire_locks", "acquire_users", "release_locks", "extend_locks", "get_keyed_locks", "count_matching")
REASONS = (*sorted(kind.slug for kind in Problem.__subclasses__()), *TokenRefusal.ERRORS)

disable_created_metrics()

M = TypeVar("M", Counter, Histogram)


def _each(metric: M, values: Iterable[str]) -> dict[str, M]:
    """A series for each value of the label: there from the beginning, and found without a look-up in the metric."""
    return {value: metric.labels(value) for value in values}


Row = asyncpg.Record | Mapping[str, Any]


class Events:
    """What happened, told by whoever did it: counted and logged. Rows are those of the statement that did it.

    Numbers stand in a registry of their own. With several workers prometheus_client keeps them in files of FOLDER, a
    set for each process, and a scrape adds up all; that of a killed worker stays, so no sum ever shrinks.

    An increment takes 0.37 us and an observation 0.85, with several workers 0.94 and 2.1 (cells of our own in a mapped
    file: 0.21 and 0.41); a line takes 2.6 us. So the numbers are 2 to 4 % of the CPU of a cycle.
    """

    def __init__(self, journal: Journal | None) -> None:
        self.journal = journal  # none with BOTFARM_LOG=quiet
        self._counted = 0  # of the lines that the log has lost
        self.registry = CollectorRegistry()
        counter, histogram = partial(Counter, registry=self.registry), partial(Histogram, registry=self.registry)
        self._acquires = counter("botfarm_acquires", "Locks that were granted.")
        self._extensions = counter("botfarm_extensions", "Locks that were extended, by heartbeats.")
        told = "Locks whose time ran out; counted when that is noticed, a second later at most."
        self._ends = {
            "released": counter("botfarm_releases", "Locks that were given back."),
            "expired": counter("botfarm_expirations", told),
            "forced": counter("botfarm_forced_releases", "Locks that were ended by force."),
        }
        told = "Passwords that left the service in the reply that grants a lock."
        self._reveals = counter("botfarm_password_reveals", told)
        told = "Calls that were refused, by the slug of the problem or the error of a token."
        self._refusals = _each(counter("botfarm_refusals", told, ["reason"]), REASONS)
        self._lost = counter("botfarm_log_lines_lost", "Lines that were lost because nobody read the log.")
        told = "Calls and jobs that failed because the database did not answer."
        self._failures = counter("botfarm_database_errors", told)
        told = "From the call to the grant of a lock, for calls that did not wait."
        self._acquiring = histogram("botfarm_acquire_duration_seconds", told, buckets=MOMENTS)
        told = "How long calls waited for a user, by how that ended."
        waits = histogram("botfarm_wait_duration_seconds", told, ["outcome"], buckets=WAITS)
        self._waits = _each(waits, ("granted", "refused", "gone"))
        told = "From the grant of a lock to its end."
        self._holds = histogram("botfarm_lock_held_duration_seconds", told, buckets=HOLDS)
        sizes = histogram("botfarm_batch_size", "Calls that shared a statement.", ["statement"], buckets=SIZES)
        self._sizes = _each(sizes, STATEMENTS)

    def log(self, event: str, cause: Cause, lock: Row | None = None, **members: Any) -> None:
        """A line, with what names the lock where one is given."""
        if self.journal:
            now = datetime.now(UTC)
            entry = Entry(now, "info", event, cause.request_id, cause.trace_id, cause.client, **members)
            if lock is not None:
                entry.holder, entry.user_id, entry.fence = lock["holder"], lock["user_id"], lock["fence"]
                entry.lock = str(lock["lock_id"])[:8]
            self.journal.write(entry)

    def batched(self, statement: str, size: int) -> None:
        """So many calls share a statement."""
        self._sizes[statement].observe(size)

    def acquired(self, row: asyncpg.Record, cause: Cause, seconds: float, waited: bool) -> None:
        """A lock was granted. Where that ended one whose time had run out, this is told too."""
        if row["expired"]:
            self.ended("expired", msgspec.json.decode(row["expired"]))
        self._acquires.inc()
        (self._waits["granted"] if waited else self._acquiring).observe(seconds)
        ttl, revealed = row["ttl"], row["secret"].startswith(SEALED)
        took = {"wait_seconds" if waited else "acquire_seconds": seconds}
        self.log("lock-acquired", cause, row, ttl_seconds=ttl, revealed=revealed, **took)

    def waited(self, outcome: str, seconds: float) -> None:
        """A call waited in vain: it was refused, or its caller was gone."""
        self._waits[outcome].observe(seconds)

    def repeated(self, row: asyncpg.Record, cause: Cause) -> None:
        """An idempotency key was sent again, and its lock is told again."""
        self.log("lock-repeated", cause, row, ttl_seconds=row["ttl"], revealed=row["secret"].startswith(SEALED))

    def revealed(self, count: int) -> None:
        """So many passwords go out with a reply; the lines of their locks say so."""
        self._reveals.inc(count)

    def extended(self, row: asyncpg.Record, cause: Cause) -> None:
        self._extensions.inc()
        self.log("lock-extended", cause, row, ttl_seconds=row["ttl"])

    def ended(
        self, how: str, lock: Row, cause: Cause = NOWHERE, cooldown: int | None = None, outcome: str | None = None
    ) -> None:
        """A lock has ended: released, expired or forced."""
        held = lock["held_seconds"]
        self._ends[how].inc()
        self._holds.observe(held)
        self.log(f"lock-{how}", cause, lock, held_seconds=held, cooldown_seconds=cooldown or None, outcome=outcome)

    def refused(self, reason: str) -> None:
        """A call was refused. Nothing changed, so this is only counted."""
        self._refusals[reason].inc()

    def database_failed(self, told: str, fault: BaseException, cause: Cause = NOWHERE) -> None:
        self._failures.inc()
        log.warning("%s: %s: %s", told, type(fault).__name__, fault, extra={"cause": cause})

    def count_losses(self) -> None:
        """Into the metrics with the lines that the log has lost since it was asked last."""
        if self.journal and (lost := self.journal.lost - self._counted):
            self._counted += lost
            self._lost.inc(lost)


# ---- What a scrape shows -----------------------------------------------------------------------------------


class Snapshot(Struct):
    """What a worker has at this moment: who waits for which pools, and its database connections by name."""

    waiting: list[tuple[list[Wish], int]]
    connections: dict[str, tuple[int, int, int, int]]  # see Connections.gauges


Sample = tuple[Sequence[str], float]  # values of labels, and a number


def _gauge(name: str, told: str, labels: str, samples: Iterable[Sample]) -> MetricFamily:
    family = GaugeMetricFamily(name, told, labels=labels.split())
    for values, number in samples:
        family.add_metric(values, number)
    return family


class Scrape(Collector):
    """What GET /metrics shows, as prometheus_client collects it: what was counted, and gauges of this moment."""

    def __init__(self, counted: Collector, pools: list[asyncpg.Record], workers: list[Snapshot]) -> None:
        self._counted = counted
        self._pools = [(Wish.of_pool(row), (str(row["project_id"]), row["env"], row["domain"]), row) for row in pools]
        self._workers = workers

    def collect(self) -> Iterator[MetricFamily]:
        yield from self._counted.collect()
        states = get_args(UserState)
        users = [((*labels, state), row[state]) for _, labels, row in self._pools for state in states]
        yield _gauge("botfarm_users", "Users of a pool in a state.", "project_id env domain state", users)
        told = "Calls that wait for users of a pool; one that fits several counts in each."
        yield _gauge("botfarm_waiting_calls", told, "project_id env domain", self._waiting())
        yield from self._connections()
        versions = (VERSION, platform.python_version())
        yield _gauge("botfarm_build_info", "Versions.", "version python_version", [(versions, 1)])

    def _waiting(self) -> Iterator[Sample]:
        crowds: dict[uuid.UUID | None, list[tuple[list[Wish], int]]] = {}
        for wishes, count in (crowd for worker in self._workers for crowd in worker.waiting):
            for project_id in {wish.project_id for wish in wishes}:
                crowds.setdefault(project_id, []).append((wishes, count))
        for pool, labels, _ in self._pools:
            here = crowds.get(pool.project_id, ())
            yield labels, sum(count for wishes, count in here if any(pool.meets(wish) for wish in wishes))

    def _connections(self) -> Iterator[MetricFamily]:
        sums: dict[str, list[int]] = {}
        for name in self._workers[0].connections:
            columns = zip(*(worker.connections[name] for worker in self._workers), strict=True)
            sums[name] = [sum(column) for column in columns]
        found = [((name, state), sums[name][place]) for name in sums for place, state in enumerate(("busy", "idle"))]
        yield _gauge("botfarm_database_connections", "Open connections.", "pool state", found)
        limits = [((name,), most) for name, (_, _, most, _) in sums.items()]
        yield _gauge("botfarm_database_connections_limit", "Most connections.", "pool", limits)
        waiting = [((name,), calls) for name, (_, _, _, calls) in sums.items()]
        told = "Calls that wait for a connection."
        yield _gauge("botfarm_database_connection_waiting_calls", told, "pool", waiting)


class Workers(Collector):
    """What all workers of a start have counted, and what each of them has at this moment.

    The latter each tells once a second in a small file. Gauges of prometheus_client would keep every pool that anybody
    ever waited for: in this mode it can't forget a label.
    """

    FRESH = 5  # seconds; an older file is that of a dead worker, whose process id may be another's by now

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._own = self._folder / f"{os.getpid()}.json"

    def collect(self) -> Iterable[MetricFamily]:
        """The sums. An empty file is of a worker that begins, or was killed as it began: nobody could read it."""
        return MultiProcessCollector.merge([str(file) for file in self._folder.glob("*.db") if file.stat().st_size])

    def tell(self, snapshot: Snapshot) -> None:
        new = self._own.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(snapshot))
        new.replace(self._own)

    def others(self) -> list[Snapshot]:
        """What the other workers that live told last."""
        now, files = time.time(), [file for file in self._folder.glob("*.json") if file != self._own]
        fresh = [file for file in files if abs(now - file.stat().st_mtime) < self.FRESH]
        return [msgspec.json.decode(file.read_bytes(), type=Snapshot) for file in fresh]


class Exporter:
    """Answers GET /metrics, over all workers of this start.

    Users of pools are counted when asked for, and once a second at most. Where counting takes long it is kept for
    four times as long, so that no scraper keeps the database busy.
    """

    def __init__(self, events: Events, pool: Connections, here: Callable[[], Snapshot]) -> None:
        self._events = events
        self._pool = pool
        self._here = here
        self._workers = Workers(FOLDER) if FOLDER else None
        self.text = Coalescer(self._texts, 1000)
        self._until = 0.0
        self._pools: list[asyncpg.Record] = []

    async def _texts(self, asked: list[None]) -> list[bytes]:
        """As Prometheus reads it, one for all who ask meanwhile.

        Made in a thread, because ten thousand pools take their time.
        """
        self._events.count_losses()
        pools = await self._census()
        others = self._workers.others() if self._workers else []
        scrape = Scrape(self._workers or self._events.registry, pools, [self._here(), *others])
        return [await asyncio.to_thread(generate_latest, scrape)] * len(asked)

    async def _census(self) -> list[asyncpg.Record]:
        """As list_pools.sql gives them; none where the database does not answer."""
        began = time.monotonic()
        if began >= self._until:
            try:
                self._pools = await self._pool.fetch(SQL["list_pools"], None, None, timeout=5)
            except DATABASE_FAULTS as fault:
                self._pools = []
                self._events.database_failed("No counts of users for a scrape", fault)
            ended = time.monotonic()
            self._until = ended + max(1, 4 * (ended - began))
        return self._pools

    async def keep_told(self) -> None:
        """Tell the other workers what there is here, for ever; nothing without others."""
        while self._workers:
            self._events.count_losses()
            try:
                self._workers.tell(self._here())
            except OSError as fault:
                log.warning("The other workers cannot be told what there is here: %s", fault)
            await asyncio.sleep(1)
