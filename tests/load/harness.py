"""What the benchmark drives: services on fresh databases, wrk, and pgbench with the service's own statements."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import resource
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOAD = Path(__file__).resolve().parent
ROOT = LOAD.parent.parent
sys.path[:0] = [str(ROOT), str(LOAD.parent)]

import asyncpg  # noqa: E402
import conftest  # noqa: E402
import httpx  # noqa: E402

import farm.database  # noqa: E402
import farm.locks  # noqa: E402
import farm.passwords  # noqa: E402
from farm import embedded  # noqa: E402

TICK = os.sysconf("SC_CLK_TCK")
HOLDER = "bench"  # whoever holds what the load has taken; users that are locked beforehand are held by another


class BenchError(Exception):
    """The benchmark can't go on."""


@dataclass
class Run:
    """One round on one path; times in ms, `cpu` in microseconds of the server process per request, `memory` in MB.

    The run of a command is one request.
    """

    requests: float  # a second
    cycles: float | None  # acquire and release, a second
    p50: float
    p99: float
    cpu: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Checkout:
    """A copy of the project, and the Python that runs it. The side of the clients is always that of this copy."""

    name: str
    root: Path
    python: str = sys.executable

    @classmethod
    def of(cls, name: str, root: Path) -> Checkout:
        """One that runs in its own virtual environment."""
        python = root.resolve() / ".venv/bin/python"
        for needed in (root / "botfarm.py", python):
            if not needed.exists():
                raise BenchError(f"{needed} is missing: {root} is to be a checkout with its own environment in .venv")
        return cls(name, root.resolve(), str(python))

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """What its processes are given: `env`, no other setting of BotFarm, and its Python as the first `python`."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("BOTFARM_", "DATABASE_"))}
        return inherited | {"PATH": f"{Path(self.python).parent}:{os.environ['PATH']}"} | dict(env)

    def version(self) -> str:
        """Its commit, where it is a clone and git is there; else its folder."""
        with contextlib.suppress(OSError):
            words = ["git", "-C", str(self.root), "describe", "--always", "--dirty"]
            return subprocess.run(words, capture_output=True, text=True).stdout.strip() or self.root.name
        return self.root.name

    def health_check(self) -> list[str]:
        """The command by which the container's health is checked, as the Dockerfile has it."""
        found = re.search(r"^HEALTHCHECK .*?CMD (\[.*?\])$", (self.root / "Dockerfile").read_text(), re.M | re.S)
        if not found:
            raise BenchError(f"{self.root}/Dockerfile has no line HEALTHCHECK with a CMD in brackets")
        return json.loads(found[1])

    def run(self, words: list[str], env: Mapping[str, str]) -> Run:
        """A command run to its end."""
        before, begin = children_cpu(), time.perf_counter()
        done = subprocess.run(words, env=self.environment(env), cwd=self.root, capture_output=True, text=True)
        taken, used = time.perf_counter() - begin, children_cpu() - before
        if done.returncode:
            raise BenchError(f"{' '.join(words)} failed in {self.root}:\n{done.stdout[-500:]}{done.stderr[-1000:]}")
        return Run(1 / taken, None, taken * 1e3, taken * 1e3, used * 1e6)


HERE = Checkout("here", ROOT)


def project(pool: int) -> str:
    """The project of a pool, as report.lua names it too."""
    return f"{pool:08d}-0000-4000-8000-000000000000"


def say(text: str) -> None:
    """A line of progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def backend_cpu(url: str) -> float:
    """Seconds of CPU that the connections of a database have used on this machine."""
    query = "select pid from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    return sum(cpu_of(row["pid"]) for row in sql(url, query))


def cpu_of(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICK


def children_cpu() -> float:
    """Seconds of CPU of the processes that have ended and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def sql(url: str, *statements: str) -> list[Any]:
    return asyncio.run(conftest.execute(url, *statements))


# ---- PostgreSQL --------------------------------------------------------------------------------------------


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The server of DATABASE_URL, else an embedded one with default durability."""
    if url := os.environ.get("DATABASE_URL"):
        yield url
        return
    embedded.SETTINGS["max_connections"] = "400"  # room for pgbench with 256
    server = embedded.start(folder / "home")
    try:
        yield server.dsn
    finally:
        server.stop()


@contextmanager
def snapshot(url: str) -> Iterator[None]:
    """A REPEATABLE READ transaction that is held open and has taken its snapshot, as a backup does."""
    with asyncio.Runner() as runner:
        connection = runner.run(asyncpg.connect(url))
        try:
            runner.run(connection.execute("begin isolation level repeatable read"))
            runner.run(connection.fetch("select count(*) from locks"))
            yield
            runner.run(connection.execute("commit"))
        finally:
            runner.run(connection.close())


def lock_by_sql(url: str, count: int) -> None:
    """Lock that many users for a day, as acquires would have."""
    sql(
        url,
        f"""
        update locks
        set fence = fence + 1, lock_id = gen_random_uuid(), holder = 'parked', ttl = 86400,
            acquired_at = clock_timestamp(), expires_at = clock_timestamp() + interval '1 day',
            ready_at = clock_timestamp() + interval '1 day'
        where user_id in (select user_id from locks order by user_id limit {count})""",
        "select",
    )


def keep_sessions_by_sql(url: str, size: int) -> None:
    """A session of that many bytes for every user, good for a day, as PUT would have stored it."""
    sql(
        url,
        "update locks set session_until = clock_timestamp() + interval '1 day'",
        f"""
        insert into user_sessions (user_id, key_id, sealed, stored_at, ends_at)
        select user_id, 'k1', convert_to(repeat('x', {size}), 'utf8'), clock_timestamp(), session_until
        from locks""",
        "vacuum analyze locks",
        "checkpoint",
        "select",
    )


# ---- Services ----------------------------------------------------------------------------------------------


class Service:
    """A process that serves on a port; its log goes down a pipe, as in a container, and its end is kept."""

    def __init__(
        self, command: list[str], port: int, env: dict[str, str], folder: Path, checkout: Checkout = HERE
    ) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.database = env.get("DATABASE_URL", "")
        self.headers: dict[str, str] = {}  # of every request, see authorize()
        self._log = folder / f"{port}.log"
        self.process = subprocess.Popen(
            [checkout.python, *command],
            env=checkout.environment(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=checkout.root,
        )  # fmt: skip
        with self._log.open("wb") as log:
            self._reader = subprocess.Popen(["tail", "-c", "2000"], stdin=self.process.stdout, stdout=log)
        assert self.process.stdout
        self.process.stdout.close()

    def _last_words(self) -> str:
        """The end of the log. Stops what still runs, because only then there is one."""
        self.stop()
        return self._log.read_text(errors="replace")

    def wait(self, path: str = "/readyz") -> Service:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException, BenchError):
                self.call("GET", path, timeout=5)
                return self
            if self.process.poll() is not None or time.monotonic() > end:
                raise BenchError(f"{self.process.args} does not serve:\n{self._last_words()}")
            time.sleep(0.01)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.wait(20)

    def cpu(self) -> float:
        """Seconds of CPU that the process has used."""
        if self.process.poll() is not None:
            raise BenchError(f"{self.process.args} has ended:\n{self._last_words()}")
        return cpu_of(self.process.pid)

    def memory(self, what: str = "VmRSS") -> int:
        """Bytes of memory: VmRSS now, VmHWM at its peak."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(rf"^{what}:\s+(\d+) kB", status, re.MULTILINE)[0]) * 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 1800
    ) -> bytes:
        """The body of a 2xx answer. A file is streamed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout, blocksize=1 << 16)
        try:
            connection.request(
                method, path, body, {"Content-Type": "application/json"} | self.headers | (headers or {})
            )
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status // 100 != 2:
            raise BenchError(f"{method} {path} was answered with {answer.status} {content[:300]!r}")
        return content

    def authorize(self) -> None:
        """Send a token from now on: that of a new client, which may do all that the load does."""
        added = conftest.command("client", "add", "load", "--scope", "admin", env={"DATABASE_URL": self.database})
        client = json.loads(added.stdout)
        form = {"grant_type": "client_credentials"} | {k: client[k] for k in ("client_id", "client_secret")}
        answer = httpx.post(f"{self.url}/token", data=form, timeout=10).raise_for_status()
        self.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"

    def send(self, file: Path) -> float:
        """Import a file; how many seconds it took."""
        begin = time.perf_counter()
        with file.open("rb") as lines:
            headers = {"Content-Type": "application/x-ndjson", "Content-Length": str(file.stat().st_size)}
            self.call("POST", "/users/import", lines, headers)
        return time.perf_counter() - begin

    def fill(self, folder: Path, users: int, pools: int = 1) -> Service:
        """Import so many users, evenly over the pools."""
        file = users_file(folder, users, pools)
        self.send(file)
        file.unlink()
        return self

    def release_all(self) -> None:
        """Give back what the last round left; a grant whose client had gone may come a moment late."""
        for _ in range(100):
            self.call("DELETE", f"/locks?holder={HOLDER}")
            if not sql(self.database, f"select from locks where lock_id is not null and holder = '{HOLDER}' limit 1"):
                return
            time.sleep(0.05)
        raise BenchError("locks of the load can't be released")


def users_file(folder: Path, users: int, pools: int = 1) -> Path:
    """NDJSON for an import, made beforehand."""
    file = folder / f"{secrets.token_hex(8)}.ndjson"
    with file.open("w") as lines:
        for number in range(users):
            place = project(number % pools + 1)
            lines.write(f'{{"login":"bot-{number}","password":"pw-{number}","project_id":"{place}","env":"stage"}}\n')
    return file


# ---- wrk ---------------------------------------------------------------------------------------------------


def wrk(service: Service, connections: int, seconds: int, script: str, *arguments: object) -> Run:
    """A round of wrk; any failed request ends the benchmark."""
    options = ["-t", min(2, connections), "-c", connections, "-d", f"{seconds}s", "--timeout", "30s", "-s", script]
    options += [word for name, value in service.headers.items() for word in ("-H", f"{name}: {value}")]
    command = [str(word) for word in ["wrk", *options, service.url, "--", *arguments]]
    before = service.cpu()
    done = subprocess.run(command, cwd=LOAD, capture_output=True, text=True, timeout=seconds + 60)
    used = service.cpu() - before
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines or not (told := json.loads(lines[-1]))["requests"]:
        raise BenchError(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    if told["failures"]:
        raise BenchError(f"{script}: {told['failures']} of {told['requests']} requests failed, first: {told['first']}")
    rate = told["requests"] / told["seconds"]
    return Run(rate, None, told["p50"], told["p99"], used / told["requests"] * 1e6)


def cycle(service: Service, connections: int, seconds: int, pools: int = 1, keyed: bool = False) -> Run:
    """Acquires and releases over HTTP."""
    arguments = [pools, secrets.randbelow(1 << 30), *(["keyed"] if keyed else [])]
    run = wrk(service, connections, seconds, "cycle.lua", *arguments)
    service.release_all()
    run.cycles = run.requests / 2
    return run


def livez(service: Service, connections: int, seconds: int) -> Run:
    return wrk(service, connections, seconds, "expect.lua", 200, "GET", "/livez")


def refused(service: Service, connections: int, seconds: int) -> Run:
    """Acquires from a pool that has no free user."""
    body = json.dumps({"project_id": project(1), "holder": HOLDER})
    return wrk(service, connections, seconds, "expect.lua", 409, "POST", "/locks", body)


def renew(service: Service, connections: int, seconds: int, paths: Path) -> Run:
    return wrk(service, connections, seconds, "expect.lua", 200, "PATCH", f"@{paths}", '{"ttl":600}')


# ---- pgbench: the same statements without the service ------------------------------------------------------


def filled_in(name: str, values: list[str]) -> str:
    """A statement of sql/ for pgbench: values instead of parameters, and no comments (a colon names a variable)."""
    text = re.sub(r"--.*", "", farm.database.SQL[name])
    found = {int(number) for number in re.findall(r"\$(\d+)", text)}
    if found != set(range(1, len(values) + 1)):
        raise BenchError(f"{name}.sql has the parameters {sorted(found)}; harness.py fills in {len(values)}")
    return re.sub(r"\$(\d+)", lambda match: values[int(match[1]) - 1], text).strip()


def direct_script(url: str) -> str:
    """What cycle.lua does, one statement a transaction: release what is held, else acquire.

    `request` is a column of a granted row, so it tells whether a lock is held; a claim that got none is repeated.
    """
    pool, version = sql(url, "select min(id), current_setting('server_version_num')::int from pools")[0]
    lock_id = "uuidv7()" if version >= 180000 else "gen_random_uuid()"  # the service's ids are of version 7, too
    since = f":since::timestamptz - interval '{farm.locks.STRAGGLERS.total_seconds()} seconds'"
    none = [f"array[null]::{kind}[]" for kind in ("uuid", "text", "text", "jsonb")]
    wish = [none[0], f"array['{project(1)}']::uuid[]", *none[1:], "array[1]::int[]"]
    cursor = ["array[1]::bigint[]", f"array[{pool}]::int[]", f"array[{since}]::timestamptz[]"]
    claim = ["array[1]::bigint[]", f"array[{lock_id}]::uuid[]", f"array['{HOLDER}']::text[]", "array[3600]::int[]"]
    nobody = "array[null]::uuid[]"
    acquire = filled_in("acquire_locks", [*wish, *cursor, *claim, nobody, nobody, "array['']::text[]"])
    untold = "array[null]::text[]"
    release = filled_in("release_locks", ["array[:lock_id]::uuid[]", "array[0]::int[]", untold, nobody, untold, "3"])
    return f"\\if :request\n\\set request 0\n{release};\n\\else\n{acquire}\n\\aset\n\\endif\n"


async def hot_settings(url: str) -> str:
    """PGOPTIONS with the planner settings of the connections that the service uses for locks."""
    async with farm.database.open_pool(url, 1, "force_generic_plan", 10) as pool:
        rows = await pool.fetch("select name, setting from pg_settings where source = 'client'")
    skipped = ("application_name", "client_encoding")
    settings = {row["name"]: row["setting"].replace(" ", "\\ ") for row in rows if row["name"] not in skipped}
    return " ".join(f"-c {name}={setting}" for name, setting in settings.items())


def direct(service: Service, connections: int, seconds: int, folder: Path) -> Run:
    """A round of pgbench on the tables of a service that is idle; cycles are counted by the locks that ended."""
    script, prefix = folder / "direct.sql", folder / secrets.token_hex(8)
    script.write_text(direct_script(service.database))
    options = ["-n", "-M", "prepared", "-c", connections, "-j", min(2, connections), "-T", seconds, "-f", script]
    variables = ["-D", "request=0", "-D", "since=-infinity", "-D", f"lock_id={project(0)}"]
    command = ["pgbench", *options, *variables, "-l", f"--log-prefix={prefix}", service.database]
    environment = os.environ | {"PGOPTIONS": asyncio.run(hot_settings(service.database))}
    before = ended(service.database)
    done = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=seconds + 60
    )
    cycles = ended(service.database) - before
    if done.returncode or "aborted" in done.stderr:
        raise BenchError(f"pgbench failed:\n{done.stdout[-500:]}{done.stderr[-1500:]}")
    rate = float(re.findall(r"^tps = ([0-9.]+)", done.stdout, re.MULTILINE)[0])
    taken = int(re.findall(r"actually processed: (\d+)", done.stdout)[0]) / rate
    service.release_all()
    times = logged_times(prefix)
    return Run(rate, cycles / taken, times[len(times) // 2] / 1e3, times[int(len(times) * 0.99)] / 1e3)


def ended(url: str) -> int:
    return sql(url, "select count(*) from history")[0][0]


def logged_times(prefix: Path) -> list[int]:
    """Microseconds of each transaction, sorted, from the logs that pgbench has written."""
    files = list(prefix.parent.glob(prefix.name + "*"))
    times = sorted(int(line.split(b" ", 3)[2]) for file in files for line in file.read_bytes().splitlines())
    for file in files:
        file.unlink()
    return times


# ---- Rounds ------------------------------------------------------------------------------------------------

Drive = Callable[[int], Run]  # a round of so many seconds


def alternate(paths: Mapping[str, Drive], rounds: int, seconds: int) -> dict[str, list[Run]]:
    """A round on each path in turn, and again the other way round, so that what else the machine does falls on all."""
    runs: dict[str, list[Run]] = {name: [] for name in paths}
    for number in range(rounds):
        for name in reversed(list(paths)) if number % 2 else paths:
            run = paths[name](seconds)
            runs[name].append(run)
            say(f"  round {number + 1} of {rounds}: {name}: {run.requests:,.0f} requests/s, p99 {run.p99:.1f} ms")
    return runs


def ratio(ones: list[Run], others: list[Run], of: Callable[[Run], float | None] = lambda run: run.requests) -> float:
    """The median of the ratios of rounds that followed each other."""
    return statistics.median((of(one) or 0) / (of(other) or 1) for one, other in zip(ones, others, strict=True))
