"""clients/cypress: its logic by node's test runner, its types by TypeScript. (Cypress's own browser is a download.)"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from conftest import long_chapter
from runners import Pool, npm, run

long_chapter("installs what Cypress runs on")


@pytest.fixture(scope="session")
def cypress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return npm("cypress", tmp_path_factory.mktemp("cypress") / "project", "javascript", "cypress")


def test_cypress_lends_each_test_users(cypress: Path, pool: Pool):
    pool.add(1)
    pool.add(1, login="bot-1", password="pw-1", labels={"role": "buyer"})
    assert "fail 0" in run(cypress, "node", "--test", "cypress.test.js", env=pool.env())
    locks = pool.history()
    assert sorted(lock["ended_by"] for lock in locks) == ["forced", *["released"] * 7]
    told = Counter(lock["outcome"] for lock in locks if lock["ended_by"] == "released")
    assert told == {"passed": 2, "failed": 1, "bad-login": 1, None: 3}
    assert {lock["holder"].split("/")[0] for lock in locks} == {"cypress"}


def test_the_types_of_cypress_hold(cypress: Path):
    run(cypress, "npx", "tsc")
