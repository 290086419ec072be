"""clients/webdriverio: by its own runner, with Debian's Chromium and driver."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from conftest import long_chapter
from runners import Pool, npm, run, running, stop

long_chapter("installs what WebdriverIO runs on")


@pytest.fixture(scope="session")
def webdriverio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return npm("webdriverio", tmp_path_factory.mktemp("webdriverio") / "project", "javascript", "webdriverio")


def of_wdio(*specs: str) -> list[str]:
    return ["npx", "wdio", "run", "debian.conf.js", *(f"--spec=tests/{name}.spec.js" for name in specs)]


def test_webdriverio_lends_each_session_a_user(webdriverio: Path, pool: Pool):
    pool.add(2)
    told = run(webdriverio, *of_wdio("greeting", "fails"), status=1, env=pool.env())
    assert "1 passed, 1 failed" in told
    locks = pool.history()
    assert sorted((lock["ended_by"], lock["outcome"]) for lock in locks) == [
        ("released", "failed"),
        ("released", "passed"),
    ]
    assert {lock["holder"].split("/")[0] for lock in locks} == {"webdriverio"}
    assert len({lock["holder"] for lock in locks}) == 1


def test_where_there_is_no_user_a_test_of_webdriverio_says_so(webdriverio: Path, pool: Pool):
    told = run(webdriverio, *of_wdio("greeting"), status=1, env=pool.env())
    assert "Refused: POST " in told
    assert "No user at all matches project_id=" in told


def test_where_no_service_is_named_webdriverio_says_that_alone(webdriverio: Path, pool: Pool):
    told = run(webdriverio, *of_wdio("greeting"), status=1, env=pool.env(BOTFARM_URL=""))
    assert "BOTFARM_URL is not set" in told
    assert "TypeError" not in told


def test_a_lost_lock_fails_the_test_of_webdriverio_at_once(webdriverio: Path, pool: Pool):
    pool.add(1)
    begun = time.monotonic()
    told = run(webdriverio, *of_wdio("lost"), status=1, env=pool.env(TEST_TTL="3"))
    assert 'the lock on the user "bot-0" was lost: forced at 20' in told
    assert time.monotonic() - begun < 40
    assert pool.ends() == ["forced"]


@pytest.mark.parametrize(
    ("number", "whom", "ended", "seconds"),
    [
        (signal.SIGINT, "group", "expired", 10),
        (signal.SIGKILL, "worker", "released", 10),
        (signal.SIGKILL, "group", "expired", 4),
    ],
)
def test_a_user_is_free_again_when_webdriverio_is_stopped(webdriverio, pool, tmp_path, number, whom, ended, seconds):
    pool.add(1)
    with running(webdriverio, tmp_path / "output", *of_wdio("hold"), env=pool.env(TEST_TTL="3")) as process:
        stop(pool, process, tmp_path / "output", number, whom, seconds)
    assert pool.ends() == [ended]
