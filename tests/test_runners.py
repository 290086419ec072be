"""What `clients/` has for runners other than pytest: each by its own tool, from its README, against the real service.

The blocks of a README that name a file in their first line are the project that its runner is let loose on, beside what
lies in the folder `test` there. What happened is read from the history of the users.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT, command, environment, serving, settings, until

from farm.settings import Secret

CLIENTS = ROOT / "clients"
LONGER = timedelta(seconds=3.5)
pytestmark = pytest.mark.skipif("not config.getoption('--long')", reason="installs other runners: with --long")


class Pool:
    """Users of one project, and what became of them."""

    def __init__(self, http: httpx.Client, project: str) -> None:
        self.url, self.project, self._http = str(http.base_url), project, http

    def add(self, count: int, **values: Any) -> None:
        for number in range(count):
            body = {"login": f"bot-{number}", "password": f"pw-{number}", "project_id": self.project, "env": "stage"}
            assert self._http.post("/users", json=body | values).status_code == 201

    def users(self) -> list[dict[str, Any]]:
        return self._http.get("/users", params={"project_id": self.project}).json()["items"]

    def held(self) -> list[str]:
        return [user["login"] for user in self.users() if user["lock"]]

    def renewed(self) -> bool:
        """Whether a lock with the ttl of most tests here, 3 s, ends later than it did at first."""
        times = [(user["lock"]["acquired_at"], user["lock"]["expires_at"]) for user in self.users() if user["lock"]]
        return any(datetime.fromisoformat(end) - datetime.fromisoformat(begin) > LONGER for begin, end in times)

    def history(self) -> list[dict[str, Any]]:
        """All locks there were, the first one first."""
        locks = []
        for user in self.users():
            items = self._http.get(f"/users/{user['id']}/history").json()["items"]
            locks += [{"login": user["login"]} | item for item in items]
        return sorted(locks, key=lambda lock: lock["acquired_at"])

    def ends(self) -> list[str | None]:
        return [lock["ended_by"] for lock in self.history()]

    def env(self, **more: str) -> dict[str, str]:
        return environment({"BOTFARM_URL": self.url, "BOTFARM_PROJECT": self.project} | more)


@pytest.fixture
def pool(service: Any, project: str) -> Iterator[Pool]:
    with httpx.Client(base_url=service.url, timeout=30) as http:
        yield Pool(http, project)


def lay(client: str, folder: Path) -> Path:
    """A project as the README of a client shows it, and what its tests have beside."""
    shutil.copytree(CLIENTS / client / "test", folder)
    readme = (CLIENTS / client / "README.md").read_text()
    for path, text in re.findall(r"^```\w+\n(?://|#|<!--) (\S+\.\w+)(?: -->)?\n(.*?)^```$", readme, re.M | re.S):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def run(folder: Path, *command: str, status: int = 0, env: dict[str, str] | None = None) -> str:
    """What a command tells."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 300}
    done = subprocess.run(command, cwd=folder, env=env or environment(None), check=False, **options)
    assert done.returncode == status, done.stdout
    return done.stdout


@contextlib.contextmanager
def running(folder: Path, *command: str, env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, of which nothing is left."""
    with open(folder / "output", "w+") as output:
        options: dict[str, Any] = {"stdout": output, "stderr": output, "start_new_session": True}
        process = subprocess.Popen(command, cwd=folder, env=env, **options)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def stop(pool: Pool, process: subprocess.Popen[str], output: Path, number: int, whom: str, seconds: float) -> None:
    """Send a signal to what holds a user: its worker, the worker's parent or all. The user is free so soon."""
    until(lambda: "holds bot-0" in output.read_text(), 60)
    until(pool.renewed, 4)
    worker = int(re.search(r"worker (\d+) holds", output.read_text())[1])
    if whom == "group":
        os.killpg(process.pid, number)
    else:
        os.kill(worker if whom == "worker" else parent(worker), number)
    until(lambda: not pool.held(), seconds)


def parent(pid: int) -> int:
    return int(re.search(r"^PPid:\s(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.M)[1])


# JavaScript


@pytest.fixture(scope="session")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return npm("javascript", tmp_path_factory.mktemp("javascript") / "project", "javascript")


def npm(client: str, folder: Path, *packages: str) -> Path:
    """The project of a client's README, with packages of ours installed as they would be published."""
    lay(client, folder)
    for package in packages:
        run(CLIENTS / package, "npm", "pack", "--silent", "--pack-destination", str(folder))
    packed = [path.name for path in folder.glob("*.tgz")]
    run(folder, "npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--no-save", *packed)
    return folder


def test_the_javascript_client_holds_users_and_tells_when_one_is_lost(javascript: Path, pool: Pool):
    pool.add(2)
    assert "fail 0" in run(javascript, "node", "--test", "client.test.mjs", env=pool.env())
    assert "is mine until I give it back" in run(javascript, "node", "example.mjs", env=pool.env())
    assert not pool.held()


def test_the_javascript_client_has_a_token_where_one_is_asked_for(javascript: Path, project: str, empty_database: str):
    keys = {"auth": "on", "signing_keys": Secret(f"s1:{'B' * 43}=")}
    where = {"DATABASE_URL": empty_database}
    added = command("client", "add", "ci", "--scope", "users:write locks", env=where)
    client = json.loads(added.stdout)
    with serving(settings(empty_database, **keys)) as service, httpx.Client(base_url=service.url) as http:
        form = {key: client[key] for key in ("client_id", "client_secret")} | {"grant_type": "client_credentials"}
        http.headers["Authorization"] = f"Bearer {http.post('/token', data=form).json()['access_token']}"
        pool = Pool(http, project)
        pool.add(1)
        secret = {"BOTFARM_CLIENT_ID": client["client_id"], "BOTFARM_CLIENT_SECRET": client["client_secret"]}
        assert "fail 0" in run(javascript, "node", "--test", "token.test.mjs", env=pool.env(**secret))
        assert pool.ends() == ["released"]


@pytest.fixture(scope="session")
def playwright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return npm("playwright", tmp_path_factory.mktemp("playwright") / "project", "javascript", "playwright")


def of_playwright(*arguments: str) -> list[str]:
    return ["npx", "playwright", "test", "--config", "debian.config.ts", *arguments]


def test_the_types_of_playwright_hold(playwright: Path):
    run(playwright, "npx", "tsc")


def test_playwright_lends_each_worker_a_user(playwright: Path, pool: Pool):
    pool.add(4)
    told = run(playwright, *of_playwright("workers", "greeting", "--workers", "2"), env=pool.env())
    assert "5 passed" in told
    locks = pool.history()
    assert {lock["ended_by"] for lock in locks} == {"released"}
    assert len({lock["holder"] for lock in locks}) == 1
    assert locks[0]["holder"].startswith("playwright/")


def test_a_worker_of_playwright_that_a_failed_test_ends_gets_a_user_again(playwright: Path, pool: Pool):
    pool.add(1)
    told = run(playwright, *of_playwright("restart"), status=1, env=pool.env(BOTFARM_HOLDER="job 7"))
    assert "1 failed" in told
    assert "1 passed" in told
    assert [(lock["holder"], lock["ended_by"]) for lock in pool.history()] == [("job 7", "released")] * 2


def test_a_lost_lock_fails_the_test_of_playwright_at_once(playwright: Path, pool: Pool):
    pool.add(1)
    begun = time.monotonic()
    told = run(playwright, *of_playwright("lost"), status=1, env=pool.env(TEST_TTL="3"))
    assert 'LockLost: the lock on the user "bot-0" was lost: forced at 20' in told
    assert "then bot-0" in told
    assert time.monotonic() - begun < 20  # the test would wait for as long
    assert pool.ends() == ["forced", "released"]


def test_playwright_logs_in_once_for_each_worker(playwright: Path, pool: Pool):
    pool.add(1)
    assert "2 passed" in run(playwright, *of_playwright("state"), env=pool.env())
    assert pool.ends() == ["released"]


@pytest.mark.parametrize(
    ("number", "whom", "ended", "seconds"),
    [
        (signal.SIGINT, "group", "released", 10),
        (signal.SIGTERM, "runner", "released", 10),
        (signal.SIGKILL, "runner", "released", 10),
        (signal.SIGKILL, "worker", "released", 10),
        (signal.SIGKILL, "group", "expired", 4),
    ],
)
def test_a_user_is_free_again_when_playwright_is_stopped(playwright, pool, tmp_path, number, whom, ended, seconds):
    pool.add(1)
    folder = shutil.copytree(playwright, tmp_path / "project", symlinks=True)
    with running(folder, *of_playwright("hold"), env=pool.env(TEST_TTL="3")) as process:
        stop(pool, process, folder / "output", number, whom, seconds)
    assert pool.ends()[0] == ended


# JUnit 5


@pytest.fixture(scope="session")
def junit5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = lay("junit5", tmp_path_factory.mktemp("junit5") / "project")
    shutil.copytree(CLIENTS / "junit5", folder / "botfarm", ignore=shutil.ignore_patterns("test", "target"))
    run(folder, *of_maven("test-compile"))
    return folder


def of_maven(*arguments: str) -> list[str]:
    return ["mvn", "-B", "-ntp", "-f", "reactor.xml", "-Dsurefire.failIfNoSpecifiedTests=false", *arguments]


def of_junit(pool: Pool, tests: str) -> list[str]:
    return of_maven(
        "test", f"-Dtest={tests}", f"-Dbotfarm.project={pool.project}", "-Dbotfarm.ttl=3", "-Dbotfarm.wait=9"
    )


def test_junit_lends_parameters_a_user(junit5: Path, pool: Pool):
    pool.add(1, labels={"role": "seller"})
    pool.add(1, login="bot-1", password="pw-1")
    pool.add(1, login="bot-2", password="pw-2", labels={"role": "admin", "name": 'Zoë "Z"\\'})
    told = run(junit5, *of_junit(pool, "GreetingTest,ScopesTest"), status=1, env=pool.env(BOTFARM_HOLDER="job 7"))
    assert "Tests run: 6, Failures: 1, Errors: 0" in told
    assert [(lock["holder"], lock["ended_by"]) for lock in pool.history()] == [("job 7", "released")] * 8


def test_a_lost_lock_fails_the_test_of_junit_at_once(junit5: Path, pool: Pool):
    pool.add(1)
    told = run(junit5, *of_junit(pool, "LostTest"), status=1, env=pool.env())
    assert 'botfarm.junit5.LockLost: the lock on the user "bot-0" was lost: forced at 20' in told
    assert "then bot-0" in told
    assert "Tests run: 2, Failures: 1, Errors: 0" in told
    assert pool.ends() == ["forced", "released"]


@pytest.mark.parametrize(
    ("number", "whom", "ended", "seconds"),
    [
        (signal.SIGINT, "group", "released", 2),
        (signal.SIGTERM, "worker", "released", 2),
        (signal.SIGKILL, "worker", "expired", 4),
        (signal.SIGKILL, "group", "expired", 4),
    ],
)
def test_a_user_is_free_again_when_junit_is_stopped(junit5, pool, tmp_path, number, whom, ended, seconds):
    pool.add(1)
    folder = shutil.copytree(junit5, tmp_path / "project")
    with running(folder, *of_junit(pool, "HoldTest"), env=pool.env()) as process:
        stop(pool, process, folder / "output", number, whom, seconds)
    assert pool.ends() == [ended]


# Robot Framework


@pytest.fixture(scope="session")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = lay("robot", tmp_path_factory.mktemp("robot") / "project")
    run(folder, sys.executable, "-m", "venv", ".venv")
    ours = [shutil.copytree(CLIENTS / name, folder / "packages" / name) for name in ("python", "robot")]
    run(folder, ".venv/bin/pip", "install", "-q", "-r", "requirements.txt", *map(str, ours))
    return folder


ROBOT = [".venv/bin/robot", "--output", "NONE", "--log", "NONE", "--report", "NONE"]


def test_robot_lends_its_tests_and_suites_users(robot: Path, pool: Pool):
    pool.add(1, labels={"role": "admin"})
    pool.add(1, login="bot-1", password="pw-1", labels={"role": "buyer"})
    told = run(robot, *ROBOT, "scopes.robot", status=1, env=pool.env(BOTFARM_HOLDER="job 7"))
    assert "2 tests, 1 passed, 1 failed" in told
    assert "nobody" in told
    locks = pool.history()
    assert [(lock["login"], lock["holder"], lock["ended_by"]) for lock in locks] == [
        ("bot-0", "job 7", "released"),
        *[("bot-1", "job 7", "released")] * 3,
    ]
    assert locks[0]["ended_at"] == max(lock["ended_at"] for lock in locks)


def test_processes_of_pabot_do_not_touch_the_users_of_each_other(robot: Path, pool: Pool):
    pool.add(3, labels={"role": "buyer"})
    for number in range(2):
        shutil.copy(robot / "greeting.robot", robot / f"pabot-{number}.robot")
    pabot = [".venv/bin/pabot", "--processes", "2", "--outputdir", "told", "pabot-0.robot", "pabot-1.robot"]
    assert "4 tests, 4 passed, 0 failed" in run(
        robot, *pabot, env=pool.env(PATH=f"{robot}/.venv/bin:{os.environ['PATH']}")
    )
    assert pool.ends() == ["released"] * 6
    assert len({lock["holder"] for lock in pool.history()}) == 2


def test_a_lost_lock_fails_the_test_of_robot_when_its_keyword_ends(robot: Path, pool: Pool):
    pool.add(1)
    told = run(robot, *ROBOT, "lost.robot", status=1, env=pool.env())
    assert "the lock on bot-0 was lost: " in told
    assert "then bot-0" in told
    assert "2 tests, 1 passed, 1 failed" in told
    assert pool.ends() == ["forced", "released"]


@pytest.mark.parametrize(
    ("number", "ended", "seconds"),
    [(signal.SIGINT, "released", 2), (signal.SIGTERM, "released", 2), (signal.SIGKILL, "expired", 4)],
)
def test_a_user_is_free_again_when_robot_is_stopped(robot, pool, tmp_path, number, ended, seconds):
    pool.add(1)
    folder = shutil.copytree(robot, tmp_path / "project", symlinks=True, ignore=shutil.ignore_patterns(".venv"))
    with running(folder, str(robot / ROBOT[0]), *ROBOT[1:], "hold.robot", env=pool.env()) as process:
        stop(pool, process, folder / "output", number, "group", seconds)
    assert pool.ends() == [ended]
