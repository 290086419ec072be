"""clients/playwright: by Playwright Test and Debian's Chromium."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest
from conftest import KEY, free_port, long_chapter, process, serving, settings, until, wait_ready
from gate import gate
from runners import Pool, npm, run, running, stop

long_chapter("installs what Playwright Test runs on")


@pytest.fixture(scope="session")
def playwright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return npm("playwright", tmp_path_factory.mktemp("playwright") / "project", "javascript", "playwright")


def of_playwright(*arguments: str) -> list[str]:
    return ["npx", "playwright", "test", "--config", "debian.config.ts", *arguments]


def test_the_types_of_playwright_hold(playwright: Path):
    run(playwright, "npx", "tsc")


def test_the_configuration_of_the_readme_is_one_in_a_project_of_modules_too(playwright: Path, tmp_path: Path):
    project = shutil.copytree(playwright, tmp_path / "project", ignore=shutil.ignore_patterns("node_modules"))
    (project / "node_modules").symlink_to(playwright / "node_modules")
    (project / "package.json").write_text('{"type": "module"}')
    assert "a bot is greeted" in run(project, "npx", "playwright", "test", "--list", "greeting")


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


def test_a_run_of_playwright_that_ends_at_the_first_failure_gives_its_user_back(playwright: Path, pool: Pool):
    pool.add(1)
    told = run(playwright, *of_playwright("restart", "-x"), status=1, env=pool.env())
    assert "1 failed" in told
    assert "1 did not run" in told
    assert pool.ends() == ["released"]


def test_a_lost_lock_fails_the_test_of_playwright_at_once(playwright: Path, pool: Pool):
    pool.add(1)
    begun = time.monotonic()
    told = run(playwright, *of_playwright("lost"), status=1, env=pool.env(TEST_TTL="3"))
    assert 'LockLost: the lock on the user "bot-0" was lost: forced at 20' in told
    assert "then bot-0" in told
    assert "3 failed" in told
    assert re.search(r"\d\) tests/lost.spec.ts:\d+:1 . loses one as it gives it back", told)  # and not the next one
    assert "1 error was not a part of any test" in told  # but of the last worker
    assert time.monotonic() - begun < 90  # the tests would wait for twice as long
    assert pool.ends() == ["forced"] * 4


class Shop(BaseHTTPRequestHandler):
    """A system under test that takes 2 s to log in."""

    server: Any
    form = "<form method=post><label>Name <input name=n></label><label>Password <input name=p></label><button>Log in"

    def do_GET(self) -> None:
        name = re.search(r"name=([\w-]+)", self.headers["Cookie"] or "")
        self.answer(self.form if self.path == "/login" else f"<h1>Hello, {name[1] if name else 'stranger'}</h1>")

    def do_POST(self) -> None:
        body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        (name,), (password,) = body["n"], body["p"]
        assert password == name.replace("bot", "pw")
        time.sleep(2)
        self.server.logins.append(name)
        self.answer(f"<h1>Hello, {name}</h1>", f"name={name}")

    def answer(self, html: str, cookie: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        if cookie:
            self.send_header("Set-Cookie", cookie)
        self.end_headers()
        self.wfile.write(html.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def shop() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Shop) as server:
        server.logins, server.url = [], f"http://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()


def test_a_user_logs_in_once_for_all_workers_and_runs_of_playwright(playwright: Path, pool: Pool, shop: Any):
    """Also after the `kill -9` of a worker: the next one takes what came free, and the end of the run the rest."""
    pool.add(4)
    killed = {"TEST_KILLED": "7", "TEST_TTL": "10"}
    for more, status, result in (({}, 0, "20 passed"), ({}, 0, "20 passed"), (killed, 1, "19 passed")):
        env = pool.env(SHOP_URL=shop.url, **more)
        told = run(playwright, *of_playwright("session", "--workers", "4"), status=status, env=env)
        assert result in told, told
        assert sorted(shop.logins) == ["bot-0", "bot-1", "bot-2", "bot-3"]
    assert pool.held() == []


def test_a_session_that_does_not_work_or_is_not_kept_costs_a_login_and_no_test(playwright: Path, pool: Pool):
    pool.add(4)
    large: dict[str, str] = {"TEST_LARGE": str(300 * 1024)}
    for more, logins in ((large, 1), ({}, 1), ({}, 0), ({"TEST_STALE": "1"}, 1)):
        told = run(playwright, *of_playwright("unkept"), env=pool.env(**more))
        assert "2 passed" in told
        assert told.count(" logs in\n") == logins, more
        assert ("is not kept: PUT " in told) == (more is large), told


def test_where_only_hashes_are_stored_playwright_logs_in_each_worker_and_says_why(playwright, project, empty_database):
    with serving(settings(empty_database, keys=None)) as alone, httpx.Client(base_url=alone.url, timeout=30) as http:
        pool = Pool(http, project)
        pool.add(1)
        for _ in range(2):
            told = run(playwright, *of_playwright("unkept"), env=pool.env())
            assert "2 passed" in told
            assert told.count("bot-0 logs in") == 1
            assert told.count("BotFarm: no session is kept. Hashes alone are stored here") == 1


@pytest.mark.parametrize("way", ["terminate", "kill"])
def test_a_restart_of_the_service_loses_no_user_of_playwright(playwright, project, empty_database, tmp_path, way):
    port = free_port()
    started = functools.partial(process, "--port", str(port), env={"DATABASE_URL": empty_database, "BOTFARM_KEYS": KEY})
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
        pool = Pool(http, project)
        with started() as service:
            wait_ready(pool.url)
            pool.add(1)
            env = pool.env(TEST_TTL="6", TEST_SECONDS="12")
            with running(playwright, tmp_path / "output", *of_playwright("hold"), env=env) as run:
                until(lambda: "holds bot-0" in (tmp_path / "output").read_text(), 60)
                getattr(service, way)()
                service.wait(20)
                with started():
                    assert run.wait(60) == 0
                    assert pool.ends() == ["released"]


def test_a_network_that_is_away_for_20_s_fails_no_test_of_playwright(playwright: Path, pool: Pool, tmp_path: Path):
    pool.add(1)
    with gate(pool.url) as way:
        env = pool.env(BOTFARM_URL=way.url, TEST_TTL="24", TEST_SECONDS="34", TEST_TIMEOUT="60")
        with running(playwright, tmp_path / "output", *of_playwright("hold"), env=env) as process:
            until(lambda: "holds bot-0" in (tmp_path / "output").read_text(), 60)
            sent = len(way.sent)
            until(lambda: len(way.sent) > sent, 15)  # it has been renewed
            way.silent = True
            time.sleep(20)
            way.silent = False
            assert process.wait(60) == 0, (tmp_path / "output").read_text()
    assert pool.ends() == ["released"]


def test_a_test_of_playwright_that_slept_past_the_end_of_its_lock_fails_on_waking(playwright, pool, tmp_path):
    """As the machine does: here all processes of the run are stopped."""
    pool.add(1)
    with running(playwright, tmp_path / "output", *of_playwright("hold"), env=pool.env(TEST_TTL="3")) as process:
        until(lambda: "holds bot-0" in (tmp_path / "output").read_text(), 60)
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(4)
        os.killpg(process.pid, signal.SIGCONT)
        assert process.wait(8) == 1
    assert 'LockLost: the lock on the user "bot-0" was lost: ' in (tmp_path / "output").read_text()
    assert pool.ends() == ["expired"]


@pytest.mark.parametrize(
    ("number", "whom", "ended", "seconds"),
    [
        (signal.SIGINT, "group", "released", 10),
        (signal.SIGINT, "runner", "released", 10),
        (signal.SIGTERM, "runner", "released", 10),
        (signal.SIGKILL, "runner", "released", 10),
        (signal.SIGKILL, "worker", "released", 10),
        (signal.SIGKILL, "group", "expired", 4),
    ],
)
def test_a_user_is_free_again_when_playwright_is_stopped(playwright, pool, tmp_path, number, whom, ended, seconds):
    pool.add(1)
    with running(playwright, tmp_path / "output", *of_playwright("hold"), env=pool.env(TEST_TTL="3")) as process:
        stop(pool, process, tmp_path / "output", number, whom, seconds)
    assert pool.ends()[0] == ended
