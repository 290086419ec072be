"""clients/robot: by Robot Framework and pabot."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import long_chapter
from runners import CLIENTS, Pool, lay, run, running, stop

long_chapter("installs what Robot Framework runs on")


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
    assert "3 tests, 1 passed, 1 failed, 1 skipped" in told
    assert "nobody" in told
    locks = pool.history()
    assert {(lock["holder"], lock["ended_by"]) for lock in locks} == {("job 7", "released")}
    assert [(lock["login"], lock["outcome"]) for lock in locks] == [
        ("bot-0", None),
        *[("bot-1", outcome) for outcome in ("failed", None, "bad-login", "passed", None)],
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
    begun = time.monotonic()
    told = run(robot, *ROBOT, "lost.robot", status=3, env=pool.env())
    assert told.count("the lock on bot-0 was lost: ") == 3
    assert "then bot-0" in told
    assert "4 tests, 1 passed, 3 failed" in told
    assert pool.ends() == ["forced", "forced", "forced", "released"]
    assert time.monotonic() - begun < 30  # its keywords would last as long


@pytest.mark.parametrize(
    ("number", "ended", "seconds"),
    [(signal.SIGINT, "released", 2), (signal.SIGTERM, "released", 2), (signal.SIGKILL, "expired", 4)],
)
def test_a_user_is_free_again_when_robot_is_stopped(robot, pool, tmp_path, number, ended, seconds):
    pool.add(1)
    with running(robot, tmp_path / "output", *ROBOT, "hold.robot", env=pool.env()) as process:
        stop(pool, process, tmp_path / "output", number, "group", seconds)
    assert pool.ends() == [ended]
