"""clients/k6: by k6, which is built from the Go module proxy where it is not installed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from conftest import free_port, long_chapter, until
from gate import gate
from runners import CLIENTS, Pool, lay, run, running

VERSION = "v1.8.1"
long_chapter("builds k6, which takes two minutes")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = lay("k6", tmp_path_factory.mktemp("k6") / "project")
    shutil.copy(CLIENTS / "k6" / "botfarm.js", folder)
    return folder


@pytest.fixture(scope="session")
def k6(folder: Path) -> str:
    if installed := shutil.which("k6"):
        return installed
    go = shutil.which("go", path=f"{os.environ['PATH']}:/usr/local/go/bin")
    if go is None:
        pytest.skip("k6 is not installed, nor is Go, to build it")
    run(folder, go, "install", f"go.k6.io/k6@{VERSION}", env=dict(os.environ) | {"GOBIN": str(folder / "bin")})
    return str(folder / "bin" / "k6")


def test_k6_lends_each_virtual_user_one(k6: str, folder: Path, pool: Pool):
    pool.add(11)
    env = pool.env(BOTFARM_HOLDER="job 7") | {"SHOP_URL": f"{pool.url}/livez"}
    options = ["--quiet", "--throw", "--discard-response-bodies"]  # they are for the requests of the run
    told = run(folder, k6, "run", *options, "load.js", env=env)
    assert "had been lost" not in told
    locks = pool.history()
    assert [(lock["holder"], lock["ended_by"]) for lock in locks] == [("job 7", "released")] * 10
    assert len({lock["login"] for lock in locks}) == 10


def test_a_run_of_k6_without_enough_users_says_so_and_holds_none(k6: str, folder: Path, pool: Pool):
    pool.add(150)
    told = run(folder, k6, "run", "--quiet", "hold.js", status=107, env=pool.env() | {"TEST_COUNT": "160"})
    assert "BotFarm: POST /locks/sets: " in told
    assert pool.ends() == ["released"] * 100


def test_a_service_that_k6_does_not_reach_is_told_of_before_setup_is_out_of_time(k6: str, folder: Path, pool: Pool):
    env = pool.env(BOTFARM_URL=f"http://127.0.0.1:{free_port()}")
    told = run(folder, k6, "run", "--quiet", "--throw", "load.js", status=107, env=env)
    assert "BotFarm: POST /locks/sets: not reached: " in told


def test_users_whose_return_k6_learns_of_by_a_second_try_are_not_said_to_be_lost(k6, folder, pool, tmp_path):
    pool.add(10)
    with gate(pool.url) as way:
        env = pool.env(BOTFARM_URL=way.url) | {"SHOP_URL": f"{pool.url}/livez"}
        with running(folder, tmp_path / "output", k6, "run", "load.js", env=env) as process:
            until(lambda: len(pool.held()) == 10, 20)
            way.loses = 1
            assert process.wait(20) == 0, (tmp_path / "output").read_text()
    assert [request[:6] for request in way.sent] == [b"POST /", b"DELETE", b"DELETE"]
    assert "had been lost" not in (tmp_path / "output").read_text()


class Guard(BaseHTTPRequestHandler):
    """A service that is away when it is first asked for a token."""

    tokens: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/token":
            self.tokens.append(self.path)
            return self.answer(200 if len(self.tokens) > 1 else 503, b'{"access_token": "t"}')
        return self.answer(422 if self.headers["Authorization"] else 401, b'{"detail": "enough"}')

    do_DELETE = do_POST

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_k6_asks_again_for_a_token_that_can_not_be_had_now(k6: str, folder: Path, pool: Pool):
    with ThreadingHTTPServer(("127.0.0.1", 0), Guard) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        secret = {"BOTFARM_URL": url, "BOTFARM_CLIENT_ID": "ci", "BOTFARM_CLIENT_SECRET": "s"}
        told = run(folder, k6, "run", "--quiet", "load.js", status=107, env=pool.env(**secret))
        server.shutdown()
    assert "BotFarm: POST /locks/sets: enough" in told


def test_a_service_that_sends_k6_on_is_told_of_and_not_followed(k6: str, folder: Path, pool: Pool):
    pool.add(10)
    with gate(pool.url) as way:
        way.says = f"HTTP/1.1 307 Moved\r\nLocation: {pool.url}/locks/sets\r\nContent-Length: 0\r\n\r\n".encode()
        told = run(folder, k6, "run", "--quiet", "load.js", status=107, env=pool.env(BOTFARM_URL=way.url))
    assert ": status 307" in told
    assert pool.ends() == []


def test_a_virtual_user_of_k6_beyond_those_that_were_acquired_ends_the_run(k6: str, folder: Path, pool: Pool):
    pool.add(2)
    told = run(folder, k6, "run", "--quiet", "hold.js", status=108, env=pool.env() | {"TEST_COUNT": "1"})
    assert "BotFarm: 1 users were acquired, and this is virtual user 2" in told
    assert pool.ends() == ["released"]


@pytest.mark.parametrize(
    ("number", "ended", "seconds"),
    [(signal.SIGINT, "released", 2), (signal.SIGTERM, "released", 2), (signal.SIGKILL, "expired", 4)],
)
def test_users_are_free_again_when_k6_is_stopped(k6, folder, pool, tmp_path, number, ended, seconds):
    pool.add(2)
    with running(folder, tmp_path / "output", k6, "run", "hold.js", env=pool.env()) as process:
        until(lambda: (tmp_path / "output").read_text().count("holds bot-") == 2, 20)
        os.killpg(process.pid, number)
        until(lambda: not pool.held(), seconds)
    assert pool.ends() == [ended] * 2


def test_who_waits_in_k6_goes_on_when_a_proxy_cuts_the_wait_off(k6: str, folder: Path, pool: Pool, tmp_path: Path):
    """Later than the client would try a service that is away."""
    pool.add(2)
    (user, _) = pool.users()
    with gate(pool.url) as way:
        env = pool.env(BOTFARM_URL=way.url) | {"TEST_WAIT": "100"}
        ours = httpx.put(f"{pool.url}/users/{user['id']}/lock").raise_for_status().json()
        with running(folder, tmp_path / "output", k6, "run", "hold.js", env=env):
            until(lambda: len(way.sent) == 1, 20)
            time.sleep(41)
            way.cut()
            until(lambda: len(way.sent) == 2, 10)
            assert re.search(rb'"wait":5\d', way.sent[1])
            httpx.delete(f"{pool.url}/locks/{ours['id']}").raise_for_status()
            until(lambda: (tmp_path / "output").read_text().count("holds bot-") == 2, 20)
