"""What the tests share: a real PostgreSQL, a service over real HTTP, and short words for both."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import hypothesis
import pytest
import ready
import uvicorn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "clients" / "python"
sys.path[:0] = [str(ROOT), str(PACKAGE)]

import botfarm  # noqa: E402
import farm.migrations  # noqa: E402
import farm.server  # noqa: E402
import farm.settings  # noqa: E402
import farm.telemetry  # noqa: E402
from farm import embedded  # noqa: E402

KEY = "k1:" + "A" * 43 + "="

# No test speaks TLS, and each client of httpx would read 140 certificates first, which takes 25 ms.
os.environ["SSL_CERT_DIR"] = str(ROOT / "tests")
os.environ.pop("SSL_CERT_FILE", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="storms and random input in their long form: minutes more")
    parser.addoption("--screenshots", metavar="FOLDER", help="keep the pictures that tests/test_page.py takes there")


def pytest_configure(config: pytest.Config) -> None:
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:  # behind `nohup` or `&`, and then by all that tests start, too
            signal.signal(number, lambda *_: None)  # by this process alone
    config.addinivalue_line("markers", "long: has a long form, for --long")
    for name, count in (("short", 25), ("long", 100)):
        hypothesis.settings.register_profile(name, max_examples=count)
    hypothesis.settings.load_profile("long" if config.getoption("--long") else "short")


def examples(count: int) -> int:
    """So many examples of random input in the long form, a quarter of them in the short one."""
    return count * hypothesis.settings().max_examples // 100


def long_chapter(reason: str) -> None:
    """Called by a chapter that takes a minute or more: it is left out, and says why, unless with --long."""
    if examples(100) < 100:
        pytest.skip(f"{reason}: with --long", allow_module_level=True)


@pytest.hookimpl(tryfirst=True)  # before pytest looks at marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is longer with --long: it asks for that, has random input, or stands in a chapter left out without."""
    for test in items:
        if isinstance(test, pytest.Function) and (
            "long" in test.fixturenames
            or getattr(test.obj, "is_hypothesis_test", False)
            or hasattr(test.module, long_chapter.__name__)
        ):
            test.add_marker("long")


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether tests that provoke races and faults take their time."""
    return request.config.getoption("--long")


@pytest.fixture(autouse=True)
def whole_log() -> Iterator[None]:
    """What a test makes a service tell is written, and so kept with it, before the next one begins."""
    yield
    farm.telemetry.JOURNAL.flush()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """A PostgreSQL server: the one of DATABASE_URL, else an embedded one."""
    if url := os.environ.get("DATABASE_URL"):
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="bf-") as folder:
        os.chmod(folder, 0o755)
        running = embedded.start(Path(folder) / "home")
        # Nobody pulls the plug of this server. (Those of test_faults.py, which crash, are others.)
        asyncio.run(execute(running.dsn, "alter system set fsync = off", "select pg_reload_conf()"))
        yield running.dsn
        running.stop()


@contextmanager
def fresh_database(server: str, template: str = "template1") -> Iterator[str]:
    """The URL of a new database, dropped afterwards."""
    name = f"botfarm_test_{uuid.uuid4().hex[:12]}"
    asyncio.run(execute(server, f"create database {name} template {template}"))
    try:
        yield urlunsplit(urlsplit(server)._replace(path=f"/{name}"))
    finally:
        asyncio.run(execute(server, f"drop database {name} with (force)"))


@pytest.fixture(scope="session")
def template(server: str) -> Iterator[str]:
    """The name of a database with our schema, to copy: that is quicker than the migrations are."""
    with fresh_database(server) as url:
        farm.migrations.migrate(url)
        yield urlsplit(url).path[1:]


async def execute(url: str, *statements: str) -> list[Any]:
    """Run statements on a connection of their own; the rows of the last one."""
    connection = await asyncpg.connect(url)
    try:
        for statement in statements[:-1]:
            await connection.execute(statement)
        return await connection.fetch(statements[-1])
    finally:
        await connection.close()


async def pass_time(url: str, user_id: str, seconds: int = 3600) -> None:
    """Let a user's lock or its rest be so many seconds further on, as if the database's clock were."""
    times = ", ".join(f"{t} = {t} - interval '{seconds} seconds'" for t in ("acquired_at", "expires_at", "ready_at"))
    await execute(url, f"update locks set {times} where user_id = '{user_id}'")


async def blocked(url: str, count: int = 1) -> None:
    """Until so many statements wait for what others have locked."""
    waiting = "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    end = time.monotonic() + 10
    while len(await execute(url, waiting)) < count:
        assert time.monotonic() < end, "nobody waited"
        await asyncio.sleep(0.01)


@pytest.fixture(scope="session")
def database(server: str) -> Iterator[str]:
    """The database of the shared service."""
    with fresh_database(server) as url:
        yield url


@pytest.fixture
def empty_database(server: str, template: str) -> Iterator[str]:
    """One that has our tables, and nothing in them."""
    with fresh_database(server, template) as url:
        yield url


@pytest.fixture
def bare_database(server: str) -> Iterator[str]:
    """One that nobody has migrated."""
    with fresh_database(server) as url:
        yield url


def _place(url: str) -> str:
    """Host and port, also of a URL that is none."""
    return urlsplit(url).netloc.rpartition("@")[2]


def pooled(env: dict[str, str]) -> dict[str, str]:
    """The environment of a service, by way of the PgBouncer of BOTFARM_TEST_POOLER (host:port) where there is one."""
    pooler, url = os.environ.get("BOTFARM_TEST_POOLER"), env.get("DATABASE_URL", "")
    if not pooler or _place(url) != _place(os.environ["DATABASE_URL"]):
        return env
    by_pooler = urlunsplit(urlsplit(url)._replace(netloc=f"botfarm@{pooler}"))
    return env | {"DATABASE_URL": by_pooler, "BOTFARM_POOLER": "on"}


def settings(url: str, **changes: Any) -> farm.settings.Settings:
    env = pooled({"DATABASE_URL": url})
    values: dict[str, Any] = {
        "database_url": farm.settings.Secret(env["DATABASE_URL"]),
        "keys": farm.settings.Secret(KEY),
    }
    return farm.settings.Settings(**(values | {"pooler": env.get("BOTFARM_POOLER", "off")} | changes))


@contextmanager
def serving(configured: farm.settings.Settings) -> Iterator[Any]:
    """A service in a thread of its own, on a free port: its `url`, its `server`, its `app` and its `farm`."""
    app = botfarm.create_app(configured)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    options: dict[str, Any] = {"access_log": False, "log_config": None, "ws": "none", "lifespan": "on"}
    options["timeout_keep_alive"] = 75  # as `serve` has it
    options["headers"] = farm.server.HEADERS
    config = uvicorn.Config(app, backlog=2048, http=farm.server.Protocol, **options)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: running.started or not thread.is_alive(), 30)
        assert running.started, "the service did not start"
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield SimpleNamespace(url=url, server=running, farm=app.state.farm, app=app)
    finally:
        running.should_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive()


def until(condition: Any, seconds: float) -> None:
    """Wait for a condition, bounded."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def service(database: str) -> Iterator[Any]:
    with serving(settings(database)) as running:
        yield running


@pytest.fixture
async def api(service: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with client(service.url) as opened:
        yield opened


def client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=300, max_keepalive_connections=300)
    return httpx.AsyncClient(base_url=url, timeout=30, limits=limits)


@pytest.fixture
def project() -> str:
    """A project of its own for each test, so that tests share a service and never users."""
    return str(uuid.uuid4())


@pytest.fixture
def pool(service: Any, project: str) -> Iterator[Any]:
    """The project's users as the chapters of clients/ see them."""
    from runners import Pool

    with httpx.Client(base_url=service.url, timeout=30) as http:
        yield Pool(http, project)


async def make_users(api: httpx.AsyncClient, project: str, count: int = 1, **values: Any) -> list[dict[str, Any]]:
    users = []
    for number in range(count):
        body = {"login": f"bot-{number}", "password": f"pw-{number}", "project_id": project, "env": "stage"}
        answer = await api.post("/users", json=body | values)
        assert answer.status_code == 201, answer.text
        users.append(answer.json())
    return users


async def acquire(api: httpx.AsyncClient, project: str, **values: Any) -> httpx.Response:
    headers = {"Idempotency-Key": str(values.pop("key"))} if "key" in values else {}
    return await api.post("/locks", json={"project_id": project} | values, headers=headers)


def slug(answer: httpx.Response) -> str:
    """The kind of a problem, after a look at its form."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert problem["title"]
    assert problem["detail"]
    return problem["type"].removeprefix("urn:botfarm:")


def environment(env: dict[str, str] | None) -> dict[str, str]:
    """The environment of a process: ours, with other settings of BotFarm."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("BOTFARM_", "DATABASE_"))}
    return inherited | pooled(env or {})


@contextmanager
def process(
    *arguments: str, env: dict[str, str] | None = None, cold: bool = False, changes: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """`python botfarm.py ...` as a process of its own, stopped by its own handle.

    `cold` is one of a Python of its own, with its imports; `changes` as `ready.fork` has them.
    """
    with open(os.devnull) as nothing, tempfile.TemporaryFile() as output:
        if cold:
            words = [sys.executable, str(ROOT / "botfarm.py"), *arguments]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started: Any = subprocess.Popen(words, env=environment(env), stdin=nothing, cwd=ROOT, **pipes)
        else:
            started = ready.fork(arguments, environment(env), nothing, output, output, changes=changes or {})
        try:
            yield started
        finally:
            started.terminate()
            try:
                started.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                started.kill()
                started.communicate()


def command(*arguments: str, env: dict[str, str] | None = None, text: str = "") -> subprocess.CompletedProcess[str]:
    """`python botfarm.py ...` run to its end."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as warned:
        given.write(text.encode())
        given.seek(0)
        running = ready.fork(arguments, environment(env), given, told, warned)
        try:
            status = running.wait(120)
        finally:
            running.kill()
        return subprocess.CompletedProcess(arguments, status, ready.read(told), ready.read(warned))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_ready(url: str, seconds: float = 60) -> None:
    def ready() -> bool:
        try:
            return httpx.get(f"{url}/readyz", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    until(ready, seconds)


def raw(url: str, *parts: bytes, pause: float = 0, seconds: float = 10) -> bytes:
    """What comes back over a connection of its own, until the service closes it; b"" where it is reset."""
    answer = b""
    with connect(url) as connection, contextlib.suppress(ConnectionError):
        connection.settimeout(seconds)
        for part in parts:
            connection.sendall(part)
            while select.select([connection], [], [], pause)[0]:
                if not (chunk := connection.recv(65536)):
                    return answer
                answer += chunk
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)))
