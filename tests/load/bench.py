"""The benchmark: what BotFarm does under load, as ratios that hold on any machine.

    .venv/bin/python tests/load/bench.py                    about 30 minutes
    .venv/bin/python tests/load/bench.py --short            everything once, in under one minute: it works
    .venv/bin/python tests/load/bench.py --rows 1,2 --json raw.json
    .venv/bin/python tests/load/bench.py --from-json raw.json --plot rate.png
    .venv/bin/python tests/load/bench.py --against ../old   another checkout with its own .venv: new to old, 15 minutes

It starts its own PostgreSQL (or makes databases of its own on the server of DATABASE_URL) and its own
services. Compared paths take turns, and a ratio is the median of the ratios of neighbouring rounds; so
take ratios from it, never absolute figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import harness
import offered
import waiting
from harness import HERE, BenchError, Checkout, Drive, Run, Service, alternate, cycle, direct, livez, ratio, say

CONNECTIONS = 64
CURVE = (1, 4, 16, 64, 256)
WISH = json.dumps({"project_id": harness.project(1), "holder": harness.HOLDER, "ttl": 3600}).encode()
TOOLS = {"wrk": "wrk", "pgbench": "postgresql (or postgresql-contrib)"}  # program -> Debian package
HTTP, DIRECT, SINGLE = "BotFarm", "direct (pgbench)", "batch limited to one"


@dataclass(frozen=True)
class Target:
    """A figure and what it must and should be; lower is better where the aim is below the must."""

    text: str
    must: float
    aim: float | None
    unit: str = ""
    at_most: bool = False

    @property
    def lower(self) -> bool:
        return self.at_most or (self.aim is not None and self.aim < self.must)

    def verdict(self, value: float) -> str:
        def reached(goal: float) -> bool:
            return value <= goal if self.lower else value >= goal

        if self.aim is not None and reached(self.aim):
            return "aim"
        return "must" if reached(self.must) else "MISSED"


@dataclass(frozen=True)
class Row:
    targets: tuple[Target, ...]
    measure: Callable[[Bench], Sequence[float]]
    paths: tuple[str, ...]


ROWS: dict[int, Row] = {}


def row(number: int, *targets: Target, paths: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Register a row: its function answers with a figure for each target. `paths` are those of Bench.core it uses."""

    def register(measure: Callable[[Bench], Sequence[float]]) -> Callable[[Bench], Sequence[float]]:
        ROWS[number] = Row(targets, measure, paths)
        return measure

    return register


@dataclass(frozen=True)
class Comparison:
    """A path of which both checkouts serve a round in turn, and the figures of a Run whose ratios are told."""

    path: str
    rounds: int
    targets: dict[str, Target]
    make: Callable[[Bench, ExitStack, Checkout], Drive]


COMPARISONS: dict[int, Comparison] = {}
UNITS = {"requests": "/s", "p50": " ms", "p99": " ms", "cpu": " us", "memory": " MB"}


def compared(number: int, path: str, rounds: int = 10, **targets: Target) -> Callable[[Any], Any]:
    """Register a row of `--against`: its function makes the drive for a checkout."""

    def register(make: Callable[[Bench, ExitStack, Checkout], Drive]) -> Callable[..., Drive]:
        COMPARISONS[number] = Comparison(path, rounds, targets, make)
        return make

    return register


# ---- What the rows share -----------------------------------------------------------------------------------


@dataclass
class Bench:
    """The server, the lengths of the rounds, the services that several rows use, and the results so far."""

    server: str
    folder: Path
    stack: ExitStack
    short: bool
    chosen: list[int]
    raw: dict[str, list[Run]] = field(default_factory=dict)
    plain: dict[Checkout, Service] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        return 1 if self.short else 5

    @property
    def seconds(self) -> int:
        return 1 if self.short else 5

    def length(self, full: int, short: int) -> int:
        return short if self.short else full

    def start(self, stack: ExitStack, checkout: Checkout = HERE, **settings: int | str) -> Service:
        """A service on a fresh database; it has not finished starting: `wait` for it."""
        url = stack.enter_context(harness.conftest.fresh_database(self.server))
        env = {f"BOTFARM_{name.upper()}": str(value) for name, value in settings.items()}
        return self.serve(stack, checkout, env | {"DATABASE_URL": url, "BOTFARM_KEYS": harness.conftest.KEY})

    def serve(self, stack: ExitStack, checkout: Checkout, env: dict[str, str]) -> Service:
        port = harness.conftest.free_port()
        service = Service(["botfarm.py", "serve", "--port", str(port)], port, env, self.folder, checkout)
        stack.callback(service.stop)
        return service

    def start_beside(self, stack: ExitStack, other: Service) -> Service:
        """Another replica on the database of a service."""
        env = {"DATABASE_URL": other.database, "BOTFARM_KEYS": harness.conftest.KEY}
        return self.serve(stack, HERE, env).wait()

    @property
    def main(self) -> Service:
        return self.main_of(HERE)

    def main_of(self, checkout: Checkout) -> Service:
        """One worker, 1000 users in one pool; it serves to the end."""
        if checkout not in self.plain:
            self.plain[checkout] = self.fill(self.start(self.stack, checkout))
        return self.plain[checkout]

    @cached_property
    def single(self) -> Service:
        """The same, but each statement serves one call."""
        return self.fill(self.start(self.stack, batch=1))

    @cached_property
    def bare(self) -> Service:
        port = harness.conftest.free_port()
        service = Service([str(harness.LOAD / "bare.py"), str(port)], port, {}, self.folder)
        self.stack.callback(service.stop)
        return service.wait("/livez")

    def fill(self, service: Service, users: int = 1000, pools: int = 1, locked: int = 0) -> Service:
        """Users for a service that starts, some of them locked beforehand, and a little traffic to warm up."""
        service.wait().fill(self.folder, users, pools)
        if locked:
            harness.lock_by_sql(service.database, locked)
        harness.sql(service.database, "vacuum analyze", "select")
        if users - locked > CONNECTIONS and not self.short:
            cycle(service, CONNECTIONS, 2, pools)
        return service

    def alternate(self, paths: Mapping[str, Drive], rounds: int | None = None) -> list[list[Run]]:
        """Rounds in turn, kept for the table of raw figures."""
        runs = alternate(paths, rounds or self.rounds, self.seconds)
        self.raw |= runs
        return list(runs.values())

    @cached_property
    def core(self) -> dict[str, list[Run]]:
        """Rounds on those of the simple paths that the chosen rows need."""
        say("the simple paths, in turn")
        paths: dict[str, Callable[[], Drive]] = {
            "GET /livez": lambda: partial(livez, self.main, CONNECTIONS),
            "bare ASGI application": lambda: partial(livez, self.bare, CONNECTIONS),
            "cycle": lambda: partial(cycle, self.main, CONNECTIONS),
            "direct": lambda: partial(direct, self.main, CONNECTIONS, folder=self.folder),
            "batch limited to one": lambda: partial(cycle, self.single, CONNECTIONS),
        }
        needed = {name for number in self.chosen for name in ROWS[number].paths}
        self.alternate({name: make() for name, make in paths.items() if name in needed})
        return self.raw


# ---- The rows ----------------------------------------------------------------------------------------------


@row(1, Target("cycle requests/s to GET /livez, 64 connections", 0.45, 0.65),
     paths=("GET /livez", "bare ASGI application", "cycle"))  # fmt: skip
def to_the_ceiling(bench: Bench) -> Sequence[float]:
    return [ratio(bench.core["cycle"], bench.core["GET /livez"])]


@compared(1, "cycle", requests=Target("cycle requests/s, 64 connections", 0.9, 1.0),
          cpu=Target("CPU of the service per cycle request", 1.1, None, at_most=True))  # fmt: skip
def cycles_compared(bench: Bench, _: ExitStack, checkout: Checkout) -> Drive:
    return partial(cycle, bench.main_of(checkout), CONNECTIONS)


@row(2, Target("cycles/s over HTTP to the same statements by pgbench, 64 connections", 0.7, 1.0),
     paths=("cycle", "direct"))  # fmt: skip
def to_direct_access(bench: Bench) -> Sequence[float]:
    return [ratio(bench.core["cycle"], bench.core["direct"], lambda run: run.cycles)]


@row(3, Target("CPU of the service per cycle request to per GET /livez", 2.0, 1.5),
     paths=("GET /livez", "bare ASGI application", "cycle"))  # fmt: skip
def cpu_to_the_ceiling(bench: Bench) -> Sequence[float]:
    return [ratio(bench.core["cycle"], bench.core["GET /livez"], lambda run: run.cpu)]


@row(4, Target("coalescing to the batch limited to one, 64 connections", 1.5, 2.0),
     paths=("cycle", "batch limited to one"))  # fmt: skip
def coalescing(bench: Bench) -> Sequence[float]:
    return [ratio(bench.core["cycle"], bench.core["batch limited to one"])]


@row(5, Target("rate after 60 s beside an open REPEATABLE READ transaction to the fresh rate", 0.7, 0.9),
     Target("rate 90 s after it ended to the fresh rate", 0.9, 1.0))  # fmt: skip
def old_snapshot(bench: Bench) -> Sequence[float]:
    """Traffic runs all the time, in rounds; compared are the medians of the last ones of each phase."""
    with ExitStack() as stack:
        service = bench.fill(bench.start(stack))

        def phase(name: str, seconds: int) -> float:
            end, runs = time.monotonic() + seconds, []
            while time.monotonic() < end:
                runs.append(cycle(service, CONNECTIONS, bench.seconds))
                say(f"  {name}: {runs[-1].requests:,.0f} requests/s")
            bench.raw[f"cycle {name}"] = runs
            return statistics.median(run.requests for run in runs[-3:])

        fresh = phase("before the snapshot", bench.length(20, 1))
        with harness.snapshot(service.database):
            beside = phase("beside the snapshot", bench.length(60, 1))
        after = phase("after the snapshot", bench.length(90, 1))
    return [beside / fresh, after / fresh]


@row(6, Target("1,000,000 users in the pool to 1,000", 0.8, 0.95), Target("99 % locked to all free", 0.7, 0.95),
     Target("over 200 pools to one", 0.6, 0.95))  # fmt: skip
def size_and_shape(bench: Bench) -> Sequence[float]:
    million, many, pools = bench.length(1_000_000, 5_000), bench.length(100_000, 6_400), bench.length(200, 20)
    with ExitStack() as stack:
        small, large, free, locked, spread = (bench.start(stack) for _ in range(5))
        say(f"importing {1000 + million + 3 * many:,} users")
        bench.fill(small)
        bench.fill(large, million)
        bench.fill(free, many)
        bench.fill(locked, many, locked=many - 1000)
        bench.fill(spread, many, pools)
        runs = bench.alternate({
            "cycle, 1,000 users": partial(cycle, small, CONNECTIONS),
            f"cycle, {million:,} users": partial(cycle, large, CONNECTIONS),
            f"cycle, {many:,} users": partial(cycle, free, CONNECTIONS),
            f"cycle, {many:,} users, 99 % locked": partial(cycle, locked, CONNECTIONS),
            f"cycle, {many:,} users in {pools} pools": partial(cycle, spread, CONNECTIONS, pools=pools),
        })  # fmt: skip
    return [ratio(runs[1], runs[0]), ratio(runs[3], runs[2]), ratio(runs[4], runs[2])]


@row(7, Target("409 pool-exhausted/s of an empty pool to cycle requests/s", 0.8, 1.3))
def refusals(bench: Bench) -> Sequence[float]:
    with ExitStack() as stack:
        runs = bench.alternate({
            "409 pool-exhausted": refusing(bench, stack),
            "cycle, beside the 409": partial(cycle, bench.main, CONNECTIONS),
        })  # fmt: skip
    return [ratio(runs[0], runs[1])]


@compared(7, "409 pool-exhausted", requests=Target("409 pool-exhausted/s of an empty pool", 0.9, 1.0))
def refusing(bench: Bench, stack: ExitStack, checkout: Checkout = HERE) -> Drive:
    empty = bench.fill(bench.start(stack, checkout), locked=1000)
    return partial(harness.refused, empty, CONNECTIONS)


@row(8, Target("renewals/s of 1,000 held locks to cycle requests/s", 1.0, 1.3),
     Target("share of HOT updates of renewals", 95, 99, "%"))  # fmt: skip
def renewals(bench: Bench) -> Sequence[float]:
    with ExitStack() as stack:
        service = bench.fill(bench.start(stack))
        path = renewing(bench, service)
        before = updates(service)
        runs = bench.alternate({
            "renewal": path,
            "cycle, beside the renewals": partial(cycle, bench.main, CONNECTIONS),
        })  # fmt: skip
        after = updates(service, before[0])
    return [ratio(runs[0], runs[1]), 100 * (after[1] - before[1]) / (after[0] - before[0])]


def renewing(bench: Bench, service: Service) -> Drive:
    """Renewals of 1,000 locks that are taken now."""
    paths = bench.folder / f"renewals-{service.port}"
    wish = json.dumps({"project_id": harness.project(1), "ttl": 600})
    ids = [json.loads(service.call("POST", "/locks", wish))["id"] for _ in range(bench.length(1000, 200))]
    paths.write_text("".join(f"/locks/{id}\n" for id in ids))
    return partial(harness.renew, service, CONNECTIONS, paths=paths)


@compared(8, "renewal", requests=Target("renewals/s of 1,000 held locks", 0.9, 1.0))
def renewals_compared(bench: Bench, stack: ExitStack, checkout: Checkout) -> Drive:
    return renewing(bench, bench.fill(bench.start(stack, checkout)))


def updates(service: Service, above: int = -1) -> tuple[int, int]:
    """Updates of `locks` and how many were HOT, once the statistics have passed `above` and stand still."""
    query = "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = 'locks'"
    end, seen, still = time.monotonic() + 20, (-1, -1), 0
    while time.monotonic() < end:
        now = tuple(harness.sql(service.database, query)[0])
        still = still + 1 if now == seen and now[0] > above else 0
        if still == 5:
            return now
        seen = now
        time.sleep(0.25)
    raise BenchError(f"the statistics of the table locks do not settle: {seen}, looked for more than {above} updates")


@row(9, Target("p50 of an acquire on one connection to that with the batch limited to one", 1.1, 1.0))
def alone(bench: Bench) -> Sequence[float]:
    def path(service: Service, seconds: int) -> Run:
        times = sorted(offered.run(offered.alternate(service.port, WISH, seconds)))
        p50, p99 = offered.at(times, 0.5) * 1e3, offered.at(times, 0.99) * 1e3
        return Run(2 * len(times) / seconds, len(times) / seconds, p50, p99)

    runs = bench.alternate({
        "one connection: acquires": partial(path, bench.main),
        "one connection, batch limited to one: acquires": partial(path, bench.single),
    })  # fmt: skip
    return [ratio(runs[0], runs[1], lambda run: run.p50)]


@row(10, Target("soak of 10 minutes with Idempotency-Key: rate of the last minute to the first", 0.9, 1.0))
def soak(bench: Bench) -> Sequence[float]:
    minutes, seconds = bench.length(10, 2), bench.length(60, 1)
    with ExitStack() as stack:
        service = bench.fill(bench.start(stack))
        runs, samples = [], []
        for minute in range(minutes):
            runs.append(cycle(service, CONNECTIONS, seconds, keyed=True))
            samples.append({"": service.memory()} | relation_sizes(service))
            say(f"  minute {minute + 1} of {minutes}: {runs[-1].requests:,.0f} requests/s")
        bench.raw["cycle with Idempotency-Key (soak)"] = runs
        bench.notes += growth(samples, sum((run.cycles or 0) * seconds for run in runs[1:]))
    return [runs[-1].requests / runs[0].requests]


def relation_sizes(service: Service) -> dict[str, int]:
    """Bytes of each table and index, named `table` or `table: index`."""
    rows = harness.sql(
        service.database,
        """
        select coalesce(indrelid::regclass || ': ', '') || relname as name, pg_relation_size(pg_class.oid) as size
        from pg_class
        left join pg_index on indexrelid = pg_class.oid
        where relnamespace = 'public'::regnamespace and relkind in ('r', 'i')
        order by 1""",
    )
    return {row["name"]: row["size"] for row in rows}


def growth(samples: list[dict[str, int]], cycles: float) -> list[str]:
    """What grew after the first minute: records by the lock, all else by its highest marks.

    What is emptied by vacuum keeps the size of its fullest moment, so a mark may rise once more; growth that goes
    on raises it in each third.
    """
    first, last = samples[0], samples[-1]
    third = max(len(samples) // 3, 1)
    lines = [f"Soak: memory of the process {first['']:,} B after the first minute, {last['']:,} B at the end."]
    records = [name for name in last if name.startswith(("history", "idempotency_keys"))]
    for name in records:
        lines.append(f"Soak: {name}: {(last[name] - first[name]) / max(cycles, 1):.0f} bytes per lock.")
    for name in sorted(last.keys() - {"", *records}):
        thirds = [samples[:third], samples[third:-third] or samples[:third], samples[-third:]]
        marks = [max(sample[name] for sample in part) for part in thirds]
        if marks[2] > first[name]:
            lines.append(f"Soak: {name}: at most {marks[0]:,} B, {marks[1]:,} B and {marks[2]:,} B in its thirds.")
    return lines


@row(11, Target("p99 of an acquire under a constant load of 300 cycles/s", 15, 5, " ms"))
def constant_load(bench: Bench) -> Sequence[float]:
    path = partial(steady, bench.main, bench.length(20, 1))
    (runs,) = bench.alternate({"constant load of 300 cycles/s: acquires": path}, bench.length(3, 1))
    return [statistics.median(run.p99 for run in runs)]


def steady(service: Service, length: int, _: int) -> Run:
    """Acquires under a constant load of 300 cycles/s, for a length of its own."""
    told = offered.run(offered.offer(service.port, WISH, 300, length))
    return Run(600, 300, told["p50"], told["p99"])


@compared(11, "constant load of 300 cycles/s: acquires",
          p99=Target("p99 of an acquire under a constant load of 300 cycles/s", 1.1, None, at_most=True))  # fmt: skip
def constant_load_compared(bench: Bench, _: ExitStack, checkout: Checkout) -> Drive:
    return partial(steady, bench.main_of(checkout), bench.length(10, 1))


@row(12, Target("import of 1,000,000 users, a second", 20_000, 60_000),
     Target("growth of the service's memory meanwhile", 100, None, " MB", at_most=True))  # fmt: skip
def importing(bench: Bench) -> Sequence[float]:
    run = import_once(bench, HERE, bench.length(1_000_000, 10_000))
    return [run.requests, run.memory or 0]


def import_once(bench: Bench, checkout: Checkout, users: int, _: int = 0) -> Run:
    """Users a second into a fresh service, and by how much its memory grew."""
    file = harness.users_file(bench.folder, users)
    with ExitStack() as stack:
        service = bench.start(stack, checkout).wait()
        service.forget_peak()
        before = service.memory()
        taken = service.send(file)
        grown = service.memory("VmHWM") - before
    file.unlink()
    say(f"  {users:,} users in {taken:.1f} s")
    return Run(users / taken, None, taken * 1e3, taken * 1e3, memory=grown / 1e6)


@compared(12, "import", rounds=4, requests=Target("import of 200,000 users, a second", 0.9, 1.0))
def importing_compared(bench: Bench, _: ExitStack, checkout: Checkout) -> Drive:
    return partial(import_once, bench, checkout, bench.length(200_000, 10_000))


@row(13, Target("p99 from a release to the answer of who waits at the same replica", 20, None, " ms", at_most=True),
     Target("and of who waits at another replica", 300, None, " ms", at_most=True))  # fmt: skip
def handovers(bench: Bench) -> Sequence[float]:
    wish, patient = ({"project_id": harness.project(1), "wait": seconds} for seconds in (0, 60))
    figures = []
    with ExitStack() as stack:
        here = bench.fill(bench.start(stack), 1)
        there = bench.start_beside(stack, here)
        for name, ports in (("same replica", (here.port, here.port)), ("another replica", (here.port, there.port))):
            count = bench.length(300, 20)
            coming = waiting.handovers(ports, json.dumps(wish).encode(), json.dumps(patient).encode(), count)
            taken = asyncio.run(coming)
            p50, p99 = offered.at(taken, 0.5) * 1e3, offered.at(taken, 0.99) * 1e3
            say(f"  {name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
            bench.raw[f"release to the waiter's answer, {name}"] = [Run(len(taken) / sum(taken), None, p50, p99)]
            figures.append(p99)
    return figures


@row(14, Target("memory of 5,000 waiting calls", 150, None, " MB", at_most=True),
     Target("CPU of the service while they wait and nothing changes", 5, None, "%", at_most=True),
     Target("slowest GET /livez meanwhile", 50, None, " ms", at_most=True))  # fmt: skip
def crowd(bench: Bench) -> Sequence[float]:
    run, used = crowd_once(bench, HERE, bench.length(20, 2))
    return [run.memory or 0, used, run.p99]


def crowd_once(bench: Bench, checkout: Checkout, seconds: int) -> tuple[Run, float]:
    """What 5,000 waiting calls cost a fresh service, with the times of GET /livez (the slowest as p99); % of CPU."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    patient = json.dumps({"project_id": harness.project(1), "wait": 120}).encode()
    with ExitStack() as stack:
        service = bench.fill(bench.start(stack, checkout), 1)
        service.call("POST", "/locks", json.dumps({"project_id": harness.project(1), "ttl": 600}))
        idle = service.memory()

        async def measure() -> tuple[float, float, list[float]]:
            look: asyncio.Queue[str] = asyncio.Queue()
            coming = asyncio.create_task(waiting.crowd(service.port, patient, bench.length(5000, 200), seconds, look))
            done, _ = await asyncio.wait(
                (coming, first := asyncio.create_task(look.get())), return_when="FIRST_COMPLETED"
            )
            if first not in done:
                await coming
            before, grown = service.cpu(), service.memory() - idle
            await look.get()
            return grown / 1e6, 100 * (service.cpu() - before) / seconds, await coming

        memory, used, taken = asyncio.run(measure())
    p50 = offered.at(taken, 0.5) * 1e3
    say(f"  {memory:.0f} MB, {used:.1f} % CPU, /livez p50 {p50:.1f} ms")
    return Run(len(taken) / seconds, None, p50, taken[-1] * 1e3, memory=memory), used


@compared(14, "5,000 waiting calls: GET /livez", rounds=4,
          memory=Target("memory of 5,000 waiting calls", 1.1, None, at_most=True))  # fmt: skip
def crowd_compared(bench: Bench, _: ExitStack, checkout: Checkout) -> Drive:
    return lambda _: crowd_once(bench, checkout, bench.length(2, 1))[0]


@row(15, Target("cycle requests/s with authentication on to off", 0.9, 0.95))
def authentication(bench: Bench) -> Sequence[float]:
    with ExitStack() as stack:
        guarded = bench.start(stack, auth="on", signing_keys=harness.farm.passwords.generate_key()).wait()
        guarded.authorize()
        bench.fill(guarded)
        runs = bench.alternate({
            "cycle, authentication on": partial(cycle, guarded, CONNECTIONS),
            "cycle, authentication off": partial(cycle, bench.main, CONNECTIONS),
        })  # fmt: skip
    return [ratio(runs[0], runs[1])]


@row(16, Target("cycle requests/s with the log to `BOTFARM_LOG=quiet`", 0.9, 0.95))
def logging(bench: Bench) -> Sequence[float]:
    with ExitStack() as stack:
        quiet = bench.fill(bench.start(stack, log="quiet"))
        runs = bench.alternate({
            "cycle, with the log": partial(cycle, bench.main, CONNECTIONS),
            "cycle, quiet": partial(cycle, quiet, CONNECTIONS),
        })  # fmt: skip
    return [ratio(runs[0], runs[1])]


@row(20, Target("p50 of a GET /overview that looks at the database: 1,000,000 users, 300 pools, 5,000 locks", 100, None,
                " ms", at_most=True),
     Target("CPU of the service for 500 pages, while locks come and go", 15, None, "%", at_most=True),
     Target("cycle requests/s beside 500 pages to alone", 0.95, None))  # fmt: skip
def pages(bench: Bench) -> Sequence[float]:
    """The first look of all counts every user, and is not among those that are timed."""
    pools, count = bench.length(300, 20), bench.length(500, 50)
    with ExitStack() as stack:
        many = bench.length(1_000_000, 6_000)
        service = bench.fill(bench.start(stack), many, pools, locked=bench.length(5000, 200))
        service.call("GET", "/overview")
        looks = [look(service) for _ in range(bench.length(20, 2))]
        say(f"  looks: p50 {statistics.median(looks):.0f} ms, slowest {max(looks):.0f} ms")
        used = busy_with_pages(service, count, bench.length(20, 2))
        runs = bench.alternate({
            "cycle, 1,000,000 users in 300 pools, beside 500 pages": partial(cycle_beside, service, pools, count),
            "cycle, 1,000,000 users in 300 pools": partial(cycle, service, CONNECTIONS, pools=pools),
        }, bench.length(8, 1))  # fmt: skip
    return [statistics.median(looks), used, ratio(runs[0], runs[1])]


def look(service: Service) -> float:
    """Milliseconds of the answer that looks at the database, because the one before is over a second old."""
    time.sleep(1.1)
    begin = time.perf_counter()
    service.call("GET", "/overview")
    return (time.perf_counter() - begin) * 1e3


@contextmanager
def looked_at(service: Service, count: int, seconds: float) -> Iterator[None]:
    """So many pages look on for so long; BenchError where one was refused."""
    command = [sys.executable, str(harness.LOAD / "pages.py"), str(service.port), str(count), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as looking:
        time.sleep(2)  # all have looked once
        yield
        answers = json.loads(looking.communicate()[0] or "{}")
    say(f"  {count} pages were answered with {answers}")
    if not answers or answers.keys() - {"200", "304"}:
        raise BenchError(f"the pages were answered with {answers}")


def busy_with_pages(service: Service, count: int, seconds: int) -> float:
    """% of a core that the service uses while pages look on and four locks a second come and go."""
    wish = json.dumps({"project_id": harness.project(1), "holder": harness.HOLDER})
    with looked_at(service, count, seconds + 2):
        before, end = service.cpu(), time.monotonic() + seconds
        while time.monotonic() < end:
            lock = json.loads(service.call("POST", "/locks", wish))
            time.sleep(0.25)
            service.call("DELETE", f"/locks/{lock['id']}")
        return 100 * (service.cpu() - before) / seconds


def cycle_beside(service: Service, pools: int, count: int, seconds: int) -> Run:
    with looked_at(service, count, seconds + 3):
        return cycle(service, CONNECTIONS, seconds, pools=pools)


@row(21, Target("cycle requests/s of 10,000 users who all have a session of 256 KiB to without", 0.97, 1.0))
def sessions(bench: Bench) -> Sequence[float]:
    """Takes 6 GB of disk."""
    many = bench.length(10_000, 200)
    with ExitStack() as stack:
        plain, kept = bench.fill(bench.start(stack), many), bench.fill(bench.start(stack), many)
        harness.keep_sessions_by_sql(kept.database, 256 * 1024)
        runs = bench.alternate({
            f"cycle, {many:,} users with sessions": partial(cycle, kept, CONNECTIONS),
            f"cycle, {many:,} users without": partial(cycle, plain, CONNECTIONS),
        }, bench.length(20, 1))  # fmt: skip
    return [ratio(runs[0], runs[1])]


# ---- Against another checkout alone ------------------------------------------------------------------------


@compared(17, "--help", p50=Target("time of `python botfarm.py --help`", 0.6, None, at_most=True))
def help_page(_: Bench, __: ExitStack, checkout: Checkout) -> Drive:
    return lambda _: checkout.run([checkout.python, "botfarm.py", "--help"], {})


@compared(18, "health check", cpu=Target("CPU of the container's health check", 0.25, None, at_most=True))
def health_check(bench: Bench, _: ExitStack, checkout: Checkout) -> Drive:
    service = bench.main_of(checkout)
    env = {"DATABASE_URL": service.database, "BOTFARM_PORT": str(service.port)}
    return lambda _: checkout.run(checkout.health_check(), env)


@compared(19, "serve, embedded",
          p50=Target("`serve` on an existing embedded database until ready", 1.0, None, at_most=True))  # fmt: skip
def start_embedded(bench: Bench, _: ExitStack, checkout: Checkout) -> Drive:
    """The first start, which makes the database, is not among the rounds."""
    env = {"BOTFARM_HOME": str(bench.folder / f"home-{checkout.name}")}

    def start(_: int) -> Run:
        with ExitStack() as stack:
            begin = time.perf_counter()
            service = bench.serve(stack, checkout, env).wait()
            taken = time.perf_counter() - begin
            return Run(1 / taken, None, taken * 1e3, taken * 1e3, service.cpu() * 1e6)

    start(0)
    return start


# ---- Without a number --------------------------------------------------------------------------------------


def database_cpu(bench: Bench) -> None:
    before = harness.backend_cpu(bench.main.database)
    run = cycle(bench.main, CONNECTIONS, bench.seconds)
    used = harness.backend_cpu(bench.main.database) - before
    bench.notes.append(
        f"CPU of the database per request of a cycle: {1e6 * used / (run.requests * bench.seconds):.0f} us."
    )


def two_workers(bench: Bench) -> None:
    with ExitStack() as stack:
        service = bench.fill(bench.start(stack, workers=2))
        runs = bench.alternate({
            "cycle, 2 workers": partial(cycle, service, CONNECTIONS),
            "cycle, 1 worker beside them": partial(cycle, bench.main, CONNECTIONS),
        })  # fmt: skip
    for run in runs[0]:
        run.cpu = None  # of the parent process alone
    bench.notes.append(f"Requests/s of 2 workers to 1: {ratio(runs[0], runs[1]):.2f}.")


def curve(bench: Bench) -> dict[str, list[dict[str, float]]]:
    """Cycles/s and p99 against the number of connections."""
    paths = {
        HTTP: partial(cycle, bench.main),
        DIRECT: partial(direct, bench.main, folder=bench.folder),
        SINGLE: partial(cycle, bench.single),
    }
    most = int(harness.sql(bench.server, "show max_connections")[0][0]) - 50
    points: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
    for connections in (1, 64) if bench.short else CURVE:
        say(f"{connections} connections")
        able = {n: partial(p, connections) for n, p in paths.items() if n != DIRECT or connections <= most}
        for name, runs in alternate(able, bench.length(2, 1), bench.length(4, 1)).items():
            cycles, p99 = statistics.median(r.cycles or 0 for r in runs), statistics.median(r.p99 for r in runs)
            points[name].append({"connections": connections, "cycles": cycles, "p99": p99})
    return points


# ---- What is told ------------------------------------------------------------------------------------------


def figure(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}") + unit


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def target_table(results: dict[str, Any]) -> str:
    return table(["", "what", *results["figures"], "must", "aim", "reached"], results["targets"])


RAW = {"requests": "requests/s", "cycles": "cycles/s", "p50": "p50 ms", "p99": "p99 ms", "cpu": "CPU us/request",
       "memory": "memory MB"}  # fmt: skip


def raw_table(results: dict[str, Any]) -> str:
    def cells(runs: list[dict[str, float | None]]) -> list[Any]:
        return [len(runs), *(figure(middle([run[key] for run in runs])) for key in RAW)]

    return table(["path", "rounds", *RAW.values()], [[name, *cells(runs)] for name, runs in results["raw"].items()])


def middle(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def show(results: dict[str, Any]) -> None:
    print(f"\n{results['about']}\n\n{target_table(results)}\n\n{raw_table(results)}\n")
    print("Medians; p50 and p99 are of single requests (of pgbench: of single statements).\n")
    print("".join(f"- {note}\n" for note in results["notes"]), end="")


def plot(points: dict[str, list[dict[str, float]]], name: str) -> None:
    """Two panels: the rate and the 99th percentile against the number of connections."""
    try:
        import matplotlib as mpl  # pyright: ignore[reportMissingImports]
    except ImportError:
        say("no plot: matplotlib is not installed")
        return
    mpl.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    drawing, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, key, label in zip(
        panels, ("cycles", "p99"), ("acquire and release, cycles/s", "p99 of a request, ms"), strict=True
    ):
        for path, series in points.items():
            panel.plot([p["connections"] for p in series], [p[key] for p in series], marker="o", label=path)
        panel.set(xlabel="connections", ylabel=label, xscale="log")
        panel.set_xticks(CURVE, [str(number) for number in CURVE])
        panel.grid(alpha=0.3)
    panels[0].set(ylim=(0, None))
    panels[1].set(yscale="log")
    panels[1].yaxis.set_major_formatter("{x:g}")
    panels[0].legend()
    drawing.savefig(name, dpi=150)
    say(f"plotted to {name}")


# ---- The command -------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace, chosen: list[int]) -> dict[str, Any]:
    """All results, as the JSON file has them."""
    begin = time.monotonic()
    places = {"new": harness.ROOT, "old": Path(arguments.against)} if arguments.against else {}
    checkouts = [Checkout.of(name, root) for name, root in places.items()]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bf-load-")))
        folder.chmod(0o755)  # PostgreSQL's own user has to reach it
        server = stack.enter_context(harness.postgres(folder))
        bench = Bench(server, folder, stack, arguments.short, chosen)
        if checkouts:
            targets = [line for number in chosen for line in compare_row(bench, number, checkouts)]
        else:
            targets = [line for number in chosen for line in measure_row(bench, number)]
        every = not arguments.rows and not checkouts
        if every:
            say("two workers")
            database_cpu(bench)
            two_workers(bench)
        points = {}
        if every or arguments.plot:
            say("the curve")
            points = curve(bench)
        about = describe(bench, time.monotonic() - begin, checkouts)
    raw = {name: [asdict(run) for run in runs] for name, runs in bench.raw.items()}
    heads = [checkout.name for checkout in checkouts] + ["new to old"] if checkouts else ["measured"]
    return {
        "about": about, "figures": heads, "targets": targets, "raw": raw, "curve": points, "notes": bench.notes
    }  # fmt: skip


def measure_row(bench: Bench, number: int) -> list[list[Any]]:
    targets = ROWS[number].targets
    say(f"row {number}: {targets[0].text}")
    figures = ROWS[number].measure(bench)
    return [told(number, target, value) for target, value in zip(targets, figures, strict=True)]


def compare_row(bench: Bench, number: int, checkouts: Sequence[Checkout]) -> list[list[Any]]:
    row = COMPARISONS[number]
    say(f"row {number}: {row.path}")
    with ExitStack() as stack:
        paths = {f"{row.path}, {checkout.name}": row.make(bench, stack, checkout) for checkout in checkouts}
        new, old = bench.alternate(paths, bench.length(row.rounds, 1))
    lines = []
    for key, target in row.targets.items():
        medians = [figure(middle([getattr(run, key) for run in runs]), UNITS[key]) for runs in (new, old)]
        lines.append(told(number, target, ratio(new, old, attrgetter(key)), *medians))
    return lines


def told(number: int, target: Target, value: float, *before: str) -> list[Any]:
    """A line of the table: what was measured (and what stands before it), and what it must and should be."""
    say(f"  {target.text}: {figure(value, target.unit)}")
    bound = "<= " if target.lower else ">= "
    must, aim = (bound + figure(goal, target.unit) if goal is not None else "-" for goal in (target.must, target.aim))
    return [number, target.text, *before, figure(value, target.unit), must, aim, target.verdict(value)]


def describe(bench: Bench, seconds: float, checkouts: Sequence[Checkout]) -> str:
    version = harness.sql(bench.server, "show server_version")[0][0]
    how = f"Alternating rounds of {bench.seconds} s"
    compared = "".join(f" {checkout.name}: {checkout.version()}." for checkout in checkouts)
    short = (
        " This was a short run, with times and numbers of users far below those that the rows name: it shows that "
        "all works, its figures say nothing."
        if bench.short
        else ""
    )
    return (
        f"{how}, ratios are medians of neighbouring rounds; {os.cpu_count()} cores, PostgreSQL {version}, "
        f"Python {platform.python_version()}; took {seconds:.0f} s.{compared}{short}"
    )


def parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure BotFarm under load, as ratios.")
    parser.add_argument("--short", action="store_true", help="everything once, in under one minute")
    parser.add_argument("--rows", metavar="1,2,5", help="only those rows")
    parser.add_argument("--against", metavar="PATH", help="compare this checkout with another one, which has a .venv")
    parser.add_argument("--json", metavar="FILE", help="write the raw results")
    parser.add_argument("--plot", metavar="FILE.png", help="draw rate and p99 against connections (matplotlib)")
    parser.add_argument("--from-json", metavar="FILE", help="measure nothing, show what --json wrote")
    arguments = parser.parse_args(words)
    if arguments.against and arguments.plot:
        parser.error("--plot draws no comparison: leave --against or --plot out")
    return arguments


def main(words: Sequence[str]) -> int:
    """Exit status 0: measured; 1: a request failed or a service did not start; 2: a tool or a row is missing."""
    arguments = parsed(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is stopped
    rows = COMPARISONS if arguments.against else ROWS
    if arguments.from_json:
        results = json.loads(Path(arguments.from_json).read_text())
    else:
        chosen = [int(number) for number in arguments.rows.split(",")] if arguments.rows else sorted(rows)
        lacking = [f"{tool} is missing: Debian has it in {TOOLS[tool]}." for tool in TOOLS if not shutil.which(tool)]
        lacking += [f"There is no row {number}: {sorted(rows)}." for number in chosen if number not in rows]
        if lacking:
            print("\n".join(lacking), file=sys.stderr)
            return 2
        try:
            results = measure(arguments, chosen)
        except (BenchError, offered.LoadError) as error:
            print(f"The benchmark was given up: {error}", file=sys.stderr)
            return 1
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(results, indent=1))
    if arguments.plot:
        plot(results["curve"], arguments.plot)
    show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
