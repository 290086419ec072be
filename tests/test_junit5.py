"""clients/junit5: by Maven."""

from __future__ import annotations

import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from conftest import long_chapter, until
from gate import force, gate
from runners import CLIENTS, Pool, lay, run, running, stop

long_chapter("installs what JUnit 5 runs on")


@pytest.fixture(scope="session")
def junit5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = lay("junit5", tmp_path_factory.mktemp("junit5") / "project")
    shutil.copytree(CLIENTS / "junit5", folder / "botfarm", ignore=shutil.ignore_patterns("test", "target"))
    run(folder, *of_maven("test-compile"))
    return folder


def of_maven(*arguments: str) -> list[str]:
    return ["mvn", "-B", "-ntp", "-f", "reactor.xml", "-Dsurefire.failIfNoSpecifiedTests=false", *arguments]


def of_junit(pool: Pool, tests: str, ttl: int = 3, wait: int | str = 9) -> list[str]:
    terms = [f"-Dbotfarm.project={pool.project}", f"-Dbotfarm.ttl={ttl}", f"-Dbotfarm.wait={wait}"]
    return of_maven("test", f"-Dtest={tests}", *terms)


def test_junit_lends_parameters_a_user(junit5: Path, pool: Pool):
    pool.add(1, labels={"role": "seller"})
    pool.add(1, login="bot-1", password="pw-1")
    pool.add(1, login="bot-2", password="pw-2", labels={"role": "admin", "name": 'Zoë "Z"\\'})
    told = run(junit5, *of_junit(pool, "GreetingTest,ScopesTest"), status=1, env=pool.env(BOTFARM_HOLDER="job 7"))
    assert "Tests run: 8, Failures: 1, Errors: 0, Skipped: 1" in told
    locks = pool.history()
    assert {(lock["holder"], lock["ended_by"]) for lock in locks} == {("job 7", "released")}
    assert Counter(lock["outcome"] for lock in locks) == {"passed": 6, "failed": 1, "bad-login": 1, None: 2}


def test_an_account_of_a_constructor_is_its_tests_and_what_ci_sets_to_nothing_is_not_set(junit5: Path, pool: Pool):
    pool.add(1)
    env = pool.env(BOTFARM_HOLDER="", BOTFARM_CLIENT_SECRET="")
    assert "Tests run: 2, Failures: 0, Errors: 0" in run(junit5, *of_junit(pool, "ConstructorTest"), env=env)
    locks = pool.history()
    assert [(lock["ended_by"], lock["outcome"]) for lock in locks] == [("released", "passed")] * 2
    assert all(lock["holder"].startswith("junit5/") for lock in locks)


def test_what_junit_is_told_wrongly_is_named(junit5: Path, pool: Pool):
    told = run(junit5, *of_junit(pool, "WrongTest", wait="soon"), status=1, env=pool.env())
    assert 'the label "role" of @Bot has to be name=value' in told
    assert 'botfarm.wait is "soon": it has to be a number of seconds' in told


def test_a_reply_whose_json_is_none_ends_no_heartbeat_of_junit(junit5: Path, pool: Pool, tmp_path: Path):
    pool.add(1)
    with gate(pool.url) as way:
        env = pool.env(BOTFARM_URL=way.url)
        with running(junit5, tmp_path / "output", *of_junit(pool, "HoldTest"), env=env):
            until(lambda: "holds bot-0" in (tmp_path / "output").read_text(), 60)
            asked = len(way.sent)
            way.says = b"HTTP/1.1 503 Away\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n"
            until(lambda: len(way.sent) >= asked + 2, 5)


def test_a_lost_lock_fails_the_test_of_junit_at_once(junit5: Path, pool: Pool):
    pool.add(2)
    begun = time.monotonic()
    told = run(junit5, *of_junit(pool, "LostTest"), status=1, env=pool.env())
    assert told.count('botfarm.junit5.LockLost: the lock on the user "bot-') >= 2
    assert "then bot-" in told
    assert "Tests run: 3, Failures: 2, Errors: 0" in told
    assert time.monotonic() - begun < 60  # the first test would sleep for as long
    assert pool.ends() == ["forced", "released", "forced", "released"]


def test_a_lock_that_is_lost_behind_the_test_of_junit_fails_it_too(junit5: Path, pool: Pool, tmp_path: Path):
    pool.add(1)
    with running(junit5, tmp_path / "output", *of_junit(pool, "EndTest"), env=pool.env()) as process:
        until(lambda: "holds bot-0" in (tmp_path / "output").read_text(), 60)
        force(pool.url, pool.users()[0])
        assert process.wait(60) == 1
    assert "Tests run: 1, Failures: 1, Errors: 0" in (tmp_path / "output").read_text()
    assert (tmp_path / "output").read_text().count('LockLost: the lock on the user "bot-0" was lost: forced') >= 1


def test_a_lock_that_runs_out_while_the_service_does_not_hear_of_its_release_was_not_lost_to_junit(
    junit5: Path, pool: Pool, tmp_path: Path
):
    pool.add(1)
    with gate(pool.url) as way:
        env = pool.env(BOTFARM_URL=way.url)
        with running(junit5, tmp_path / "output", *of_junit(pool, "EndTest"), env=env) as process:
            until(lambda: any(request.startswith(b"PATCH") for request in way.sent), 60)
            way.says = b""
            until(lambda: any(request.startswith(b"DELETE") for request in way.sent), 5)
            time.sleep(3)
            way.says = None
            assert process.wait(60) == 0, (tmp_path / "output").read_text()
    assert pool.ends() == ["expired"]


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
    with running(junit5, tmp_path / "output", *of_junit(pool, "HoldTest"), env=pool.env()) as process:
        stop(pool, process, tmp_path / "output", number, whom, seconds)
    assert pool.ends() == [ended]


def test_who_waits_in_junit_goes_on_when_a_reply_is_lost_or_the_wait_is_cut_off(junit5, pool, tmp_path):
    """Here by a proxy that allows a minute, which is as long as the client tries a service that is away."""
    pool.add(1)
    (user,) = pool.users()
    junit = of_junit(pool, "GreetingTest#aBotLogsIn", ttl=60, wait=300)
    with gate(pool.url) as way:
        way.late, way.loses = [2], 1
        with running(junit5, tmp_path / "output", *junit, env=pool.env(BOTFARM_URL=way.url)) as process:
            until(pool.held, 60)
            force(pool.url, user)
            ours = httpx.put(f"{pool.url}/users/{user['id']}/lock").raise_for_status().json()
            until(lambda: len(way.sent) == 3, 10)  # the second call has learnt that the lock of its key has ended
            for seconds in (0, 61):
                asked = len(way.sent)
                time.sleep(seconds)
                way.cut()
                until(lambda asked=asked: len(way.sent) == asked + 1, 10)
            httpx.delete(f"{pool.url}/locks/{ours['id']}").raise_for_status()
            assert process.wait(60) == 0, (tmp_path / "output").read_text()
    assert pool.ends() == ["forced", "released", "released"]
