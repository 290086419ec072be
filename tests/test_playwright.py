"""clients/playwright: by Playwright Test and Debian's Chromium."""

from __future__ import annotations

import functools
import signal
import time
from pathlib import Path

import httpx
import pytest
from conftest import KEY, free_port, process, until, wait_ready
from runners import Pool, npm, run, running, stop

pytestmark = pytest.mark.skipif("not config.getoption('--long')", reason="installs what it runs on: with --long")


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
    with running(playwright, tmp_path / "output", *of_playwright("hold"), env=pool.env(TEST_TTL="3")) as process:
        stop(pool, process, tmp_path / "output", number, whom, seconds)
    assert pool.ends()[0] == ended
