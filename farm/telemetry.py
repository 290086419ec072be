from __future__ import annotations

import atexit
import contextlib
import copy
import fcntl
import itertools
import logging
import mmap
import os
import re
import secrets
import select
import threading
import uuid
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import asyncpg
import msgspec
from litestar import Request, Response
from msgspec import Struct
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as MetricFamily

from farm.problems import Problem, Refused, TokenRefusal
from farm.settings import log
from farm.words import JSON, Imported, Wish, caller_of


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
    held_seconds: float | None = None
    cooldown_seconds: int | None = None
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


class Journal:
    """Writes lines to standard error, in batches, from a thread of its own.

    Where the reader is slower than the events, up to LIMIT of them wait; then the newest are lost, and counted: in the
    log itself as soon as it moves again, and in botfarm_log_lines_lost_total. To stall the test grid instead would
    be worse: the database's history has each lock.
    """

    LIMIT = 50_000  # lines, of some 250 bytes
    PAUSE = 0.1  # seconds for which lines gather: each turn of the thread costs the loop one (0.02 s: 8 % of the rate)

    def __init__(self, file: int = 2) -> None:
        self.lost = 0
        self._file = file
        self._told = 0  # of those that were lost
        self._lines: deque[bytes] = deque()
        self._shown = readable if os.isatty(file) else msgspec.json.Encoder().encode
        self._written = threading.Event()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock: int | None = None

    def write(self, entry: Entry) -> None:
        """Made a line at once: left to the thread, on another core, that took five times as long (1.5 us)."""
        if len(self._lines) >= self.LIMIT:
            self.lost += 1
            return
        self._lines.append(self._shown(entry))
        if not self._wake.is_set():
            self._begin()

    def _begin(self) -> None:
        self._written.clear()
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            self._thread.start()
            atexit.register(self.flush)

    def is_full(self) -> bool:
        """Whether whoever has much to tell should better wait."""
        return len(self._lines) > self.LIMIT // 2

    def share(self, folder: str) -> None:
        """Take turns with the other workers of this start: what two write to one pipe at once would mix."""
        self._lock = os.open(Path(folder) / "log", os.O_RDWR | os.O_CREAT, 0o600)

    def flush(self, seconds: float = 1) -> None:
        """Wait until all is written; a reader that takes nothing is not waited for any longer."""
        if self._thread is None:
            return
        self._hurry.set()
        self._begin()
        self._written.wait(seconds)
        self._hurry.clear()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._hurry.wait(self.PAUSE)
            self._wake.clear()
            self._drain()
            if not self._lines:
                self._written.set()

    def _drain(self) -> None:
        while self._lines:
            batch = [self._lines.popleft() for _ in range(min(len(self._lines), 1000))]
            lines, lost = len(batch), self.lost
            if lost > self._told:
                batch.append(self._shown(Entry(datetime.now(UTC), "error", "log-lost", count=lost - self._told)))
            try:
                self._put(b"\n".join([*batch, b""]))
                self._told = lost
            except OSError:  # the reader is gone
                self.lost += lines

    def _put(self, data: bytes) -> None:
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            left = memoryview(data)
            while left:
                try:
                    left = left[os.write(self._file, left) :]
                except BlockingIOError:  # somebody made standard error non-blocking
                    select.select([], [self._file], [], 1)
        finally:
            if self._lock is not None:
                fcntl.flock(self._lock, fcntl.LOCK_UN)


def readable(entry: Entry) -> bytes:
    """A line for people. What could move the cursor of their terminal is escaped."""
    members = ((name, getattr(entry, name)) for name in Entry.__struct_fields__[3:])
    told = "".join(f" {name}={_plain(value)}" for name, value in members if value is not None)
    return f"{entry.time:%H:%M:%S.%f} {entry.level:7} {entry.event}{told}".encode()


def _plain(value: Any) -> str:
    if not isinstance(value, str):
        return str(value)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    return text if text and " " not in text else f'"{text}"'


JOURNAL = Journal()


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


class Cause(Struct, frozen=True):
    """Which request made something happen; nothing where the service did it by itself."""

    request_id: str | None = None
    trace_id: str | None = None
    client: uuid.UUID | None = None
    echo: Mapping[str, str] | None = None  # headers that the caller sent and finds in the reply


NOWHERE = Cause()


class Metric(Struct, frozen=True):
    """A counter; with bounds a histogram. It has a series for each of `values` where it has a label."""

    name: str
    help: str
    label: str = ""
    values: tuple[str, ...] = ("",)
    bounds: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """Cells of a series: the number, or one for each bucket, the last one endless, and then the sum."""
        return len(self.bounds) + 2 if self.bounds else 1

    def family(self, cells: Sequence[float]) -> MetricFamily:
        """As prometheus_client shows it."""
        labels = [self.label] if self.label else []
        if not self.bounds:
            counted = CounterMetricFamily(self.name, self.help, labels=labels)
            for value, cell in zip(self.values, cells, strict=True):
                counted.add_metric([value] if labels else [], cell)
            return counted
        observed = HistogramMetricFamily(self.name, self.help, labels=labels)
        for number, value in enumerate(self.values):
            *counts, total = cells[number * self.width : (number + 1) * self.width]
            edges = [*map(str, self.bounds), "+Inf"]
            buckets = list(zip(edges, itertools.accumulate(counts), strict=True))
            observed.add_metric([value] if labels else [], buckets, total)
        return observed


MOMENTS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


WAITS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


HOLDS = (1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0, 86400.0)


SIZES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)


STATEMENTS = ("acquire_locks", "acquire_users", "release_locks", "extend_locks", "get_keyed_locks", "count_matching")


METRICS = (
    Metric("botfarm_acquires", "Locks that were granted."),
    Metric("botfarm_releases", "Locks that were given back."),
    Metric("botfarm_extensions", "Locks that were extended, by heartbeats."),
    Metric("botfarm_expirations", "Locks whose time ran out; counted when that is noticed, a second later at most."),
    Metric("botfarm_forced_releases", "Locks that were ended by force."),
    Metric("botfarm_password_reveals", "Passwords that left the service in the reply that grants a lock."),
    Metric(
        "botfarm_refusals", "Calls that were refused, by the slug of the problem or the error of a token.", "reason",
        (*sorted(kind.slug for kind in Problem.__subclasses__()), *TokenRefusal.ERRORS),
    ),
    Metric("botfarm_log_lines_lost", "Lines that were lost because nobody read the log."),
    Metric("botfarm_database_errors", "Calls and jobs that failed because the database did not answer."),
    Metric(
        "botfarm_acquire_duration_seconds", "From the call to the grant of a lock, for calls that did not wait.",
        bounds=MOMENTS,
    ),
    Metric(
        "botfarm_wait_duration_seconds", "How long calls waited for a user, by how that ended.", "outcome",
        ("granted", "refused", "gone"), WAITS,
    ),
    Metric("botfarm_lock_held_duration_seconds", "From the grant of a lock to its end.", bounds=HOLDS),
    Metric(
        "botfarm_batch_size", "Calls that shared a statement.", "statement", STATEMENTS, SIZES,
    ),
)  # fmt: skip


class Snapshot(Struct):
    """What a worker has at this moment: who waits for which pools, and its database connections by name."""

    waiting: list[tuple[list[Wish], int]] = []
    connections: dict[str, tuple[int, int, int, int]] = {}  # see Connections.gauges


SHARED = "BOTFARM_SHARED_FOLDER"  # no setting: `serve` makes the folder, and tells its workers so


class Tally:
    """The numbers of METRICS, of all workers of a start.

    They stand in flat cells: of this process, or, with a folder that the workers share, in a file that is mapped
    into its memory. A worker has a file of its own as long as it lives, and whoever is asked adds up those of all.
    That of a killed worker stays, and the one that takes its place goes on adding to it: so no sum ever shrinks,
    and nothing counts twice. (An increment takes 0.13 us and an observation 0.23; in prometheus_client's own
    multiprocess mode 0.84 and 1.76, and the files of dead workers gather. All that is counted: 1 to 2 % of the CPU of
    a cycle.)
    """

    def __init__(self, folder: str | None = None) -> None:
        self._places: dict[tuple[str, str], int] = {}
        self._series: dict[tuple[str, str], tuple[int, tuple[float, ...]]] = {}
        size = 0
        for metric in METRICS:
            for value in metric.values:
                self._places[metric.name, value] = size
                self._series[metric.name, value] = size, metric.bounds
                size += metric.width
        self._size = size
        self._folder = Path(folder) if folder else None
        self._own = Path()
        self._cells: Any = self._claim(self._folder) if self._folder else array("d", bytes(8 * size))

    def _claim(self, folder: Path) -> Any:
        """The cells of the first file that no living worker has."""
        for number in itertools.count():
            self._own = folder / f"{number}.cells"
            file = os.open(self._own, os.O_RDWR | os.O_CREAT, 0o600)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and so it stays until this process has ended
                held = os.fstat(file).st_size  # written, not truncated to: a hole in a full disk kills who counts in it
                os.pwrite(file, bytes(8 * self._size - held), held)
                return memoryview(mmap.mmap(file, 8 * self._size)).cast("d")
            os.close(file)
        raise AssertionError

    def count(self, name: str, value: str = "", by: int = 1) -> None:
        self._cells[self._places[name, value]] += by

    def observe(self, name: str, measured: float, value: str = "") -> None:
        place, bounds = self._series[name, value]
        cells = self._cells
        cells[place + bisect_left(bounds, measured)] += 1
        cells[place + len(bounds) + 1] += measured

    def families(self) -> Iterator[MetricFamily]:
        """The sums over all workers."""
        cells = [sum(column) for column in zip(*self._all(), strict=True)]
        for metric in METRICS:
            first = self._places[metric.name, metric.values[0]]
            yield metric.family(cells[first : first + len(metric.values) * metric.width])

    def _all(self) -> list[Sequence[float]]:
        if self._folder is None:
            return [self._cells]
        files = [file.read_bytes() for file in self._folder.glob("*.cells")]
        return [array("d", file) for file in files if len(file) == 8 * self._size]

    def publish(self, snapshot: Snapshot) -> None:
        """Tell the other workers what there is here at this moment."""
        if self._folder:
            new = self._own.with_suffix(".new")
            new.write_bytes(msgspec.json.encode(snapshot))
            new.replace(self._own.with_suffix(".json"))

    def others(self) -> list[Snapshot]:
        """What the other workers that live told last."""
        files = self._folder.glob("*.json") if self._folder else ()
        alive = [file for file in files if file.stem != self._own.stem and _is_locked(file.with_suffix(".cells"))]
        return [msgspec.json.decode(file.read_bytes(), type=Snapshot) for file in alive]


def _is_locked(path: Path) -> bool:
    """Whether a living process has this file."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


Row = asyncpg.Record | Mapping[str, Any]


class Events:
    """What happened, told by whoever did it. Rows are those of the statement that did it."""

    ENDS: ClassVar[dict[str, str]] = {
        "released": "botfarm_releases",
        "expired": "botfarm_expirations",
        "forced": "botfarm_forced_releases",
    }

    def __init__(self, tally: Tally, journal: Journal | None) -> None:
        self.tally = tally
        self.journal = journal  # none with BOTFARM_LOG=quiet

    def log(self, event: str, cause: Cause, **members: Any) -> None:
        if self.journal:
            now = datetime.now(UTC)
            self.journal.write(Entry(now, "info", event, cause.request_id, cause.trace_id, cause.client, **members))

    def _log_lock(
        self, event: str, cause: Cause, lock: Row, *, ttl: int | None = None, acquired: float | None = None,
        waited: float | None = None, held: float | None = None, cooldown: int | None = None,
    ) -> None:  # fmt: skip
        """Spelled out, because keywords that are handed on and on cost as much as the rest of it (1 us)."""
        if self.journal:
            self.journal.write(
                Entry(
                    datetime.now(UTC), "info", event, cause.request_id, cause.trace_id, cause.client, lock["holder"],
                    lock["user_id"], str(lock["lock_id"])[:8], lock["fence"], ttl, acquired, waited, held, cooldown,
                )
            )  # fmt: skip

    def batched(self, statement: str, size: int) -> None:
        """So many calls share a statement."""
        self.tally.observe("botfarm_batch_size", size, statement)

    def acquired(self, row: asyncpg.Record, cause: Cause, seconds: float, waited: bool) -> None:
        """A lock was granted. Where that ended one whose time had run out, this is told too."""
        if row["expired"]:
            self.ended("expired", msgspec.json.decode(row["expired"]))
        self.tally.count("botfarm_acquires")
        if waited:
            self.waited("granted", seconds)
            self._log_lock("lock-acquired", cause, row, ttl=row["ttl"], waited=seconds)
        else:
            self.tally.observe("botfarm_acquire_duration_seconds", seconds)
            self._log_lock("lock-acquired", cause, row, ttl=row["ttl"], acquired=seconds)

    def waited(self, outcome: str, seconds: float) -> None:
        """A call that waited ended: granted, refused, or its caller was gone."""
        self.tally.observe("botfarm_wait_duration_seconds", seconds, outcome)

    def revealed(self, row: asyncpg.Record, cause: Cause) -> None:
        """The password of a user goes out with the reply."""
        self.tally.count("botfarm_password_reveals")
        self._log_lock("password-revealed", cause, row)

    def extended(self, row: asyncpg.Record, cause: Cause) -> None:
        self.tally.count("botfarm_extensions")
        self._log_lock("lock-extended", cause, row, ttl=row["ttl"])

    def ended(self, how: str, lock: Row, cause: Cause = NOWHERE, cooldown: int | None = None) -> None:
        """A lock has ended: released, expired or forced."""
        held = lock["held_seconds"]
        self.tally.count(self.ENDS[how])
        self.tally.observe("botfarm_lock_held_duration_seconds", held)
        self._log_lock(f"lock-{how}", cause, lock, held=held, cooldown=cooldown or None)

    def user(self, event: str, user_id: uuid.UUID, cause: Cause, **members: Any) -> None:
        """A user was created, changed, deleted or freed, or its password was checked."""
        self.log(f"user-{event}", cause, user_id=user_id, **members)

    def quarantined(self, user_id: uuid.UUID, reason: str, cause: Cause) -> None:
        self.user("quarantined", user_id, cause, reason=reason)

    def imported(self, done: Imported, cause: Cause) -> None:
        """After the lines of the users that were created and changed."""
        self.log("users-imported", cause, created=done.created, updated=done.updated, unchanged=done.unchanged)

    def refused(self, reason: str) -> None:
        """A call was refused. Nothing changed, so this is only counted."""
        self.tally.count("botfarm_refusals", reason)

    def database_failed(self, told: str, fault: BaseException, cause: Cause = NOWHERE) -> None:
        self.tally.count("botfarm_database_errors")
        log.warning("%s: %s: %s", told, type(fault).__name__, fault, extra={"cause": cause})

    def count_losses(self) -> None:
        """Into the metrics with the lines that the log has lost since it was asked last."""
        if self.journal and (lost := self.journal.lost - self._lost):
            self._lost += lost
            self.tally.count("botfarm_log_lines_lost", by=lost)

    _lost = 0


def header(request: Request, name: bytes) -> str | None:
    """A header of the request. Looked up in the scope, because request.headers builds a mapping of them all first."""
    return next((value.decode("latin-1") for key, value in request.scope["headers"] if key == name), None)


CAUSE = "botfarm-cause"  # in the state of a request


REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:+/=@-]{1,128}")


# https://www.w3.org/TR/trace-context/#traceparent-header
TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


_PREFIX = secrets.token_hex(6)


_NUMBERS = itertools.count(1)


def cause_of(request: Request) -> Cause:
    """Where an event comes from: the request's own id and trace, where it brought some that are well formed."""
    state = request.scope["state"]
    cause = state.get(CAUSE)
    if cause is None:
        request_id = trace_id = None
        echo: dict[str, str] = {}
        for name, value in request.scope["headers"]:
            if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
                request_id = echo["X-Request-Id"] = value.decode()
            elif name == b"traceparent" and (found := TRACEPARENT.fullmatch(value)):
                trace_id, echo["traceparent"] = found[1].decode(), value.decode()
        request_id = request_id or f"{_PREFIX}-{next(_NUMBERS):x}"
        state[CAUSE] = cause = Cause(request_id, trace_id, caller_of(request).client, echo or None)
    return cause


def echoed(request: Request, answer: Response) -> Response:
    """With the id and the trace that the caller sent. Refusals are shared by many calls, so those are copied."""
    if echo := cause_of(request).echo:
        if isinstance(answer, Refused):
            answer = copy.copy(answer)
        answer.headers = {**answer.headers, **echo}
    return answer


def reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response[bytes]:
    return Response(
        content=msgspec.json.encode(value), status_code=status, media_type=JSON, headers=dict(headers or {})
    )


NO_STORE = {"Cache-Control": "no-store"}


def no_content() -> Response[None]:
    return Response(content=None, status_code=204)
