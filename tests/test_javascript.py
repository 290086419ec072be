"""clients/javascript: by node's test runner, with a proxy before the service that loses what it is told to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, command, long_chapter, serving, settings
from runners import CLIENTS, Pool, npm, run

from farm.settings import Secret

long_chapter("installs what JavaScript's client runs on")


@pytest.fixture(scope="session")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return npm("javascript", tmp_path_factory.mktemp("javascript") / "project", "javascript")


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


@pytest.mark.parametrize("client", ["javascript", "cypress", "playwright"])
def test_the_line_of_a_readme_installs_a_client_from_a_checkout(client: str, tmp_path: Path):
    """With what it stands on. It is tried in a folder elsewhere, from which nothing leads back."""
    package = json.loads((CLIENTS / client / "package.json").read_text())["name"]
    (line,) = re.findall(r"^npm install .*$", (CLIENTS / client / "README.md").read_text(), re.M)
    (tmp_path / "package.json").write_text("{}")
    run(tmp_path, *line.replace("path/to/botfarm", str(ROOT)).split(), "--no-audit", "--no-fund", "--ignore-scripts")
    run(tmp_path, "node", "-e", f"require('{package}')")
