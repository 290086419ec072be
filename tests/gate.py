"""For the tests of clients/: users by plain calls, a gate before the service that shuts and loses replies, and a
service that restarts."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
from conftest import PACKAGE, environment, free_port, process, until, wait_ready

# The Python that the package runs on here: it keeps to 3.8, the service to 3.11.
PYTHON = os.environ.get("BOTFARM_TEST_CLIENT_PYTHON", sys.executable)


def around(url: str, **more: str) -> dict[str, str]:
    """The environment of a process that uses the package, with the service at that URL."""
    return environment({}) | {"PYTHONPATH": str(PACKAGE), "BOTFARM_URL": url, "COLUMNS": "200"} | more


def create(url: str, project: str, count: int = 1, **values: Any) -> list[dict[str, Any]]:
    made = []
    for number in range(count):
        body = {"login": f"bot-{number}", "password": f"pw-{number}", "project_id": project, "env": "stage"}
        made.append(httpx.post(f"{url}/users", json=body | values).raise_for_status().json())
    return made


def users(url: str, project: str) -> dict[str, dict[str, Any]]:
    """Login -> user, as the service has them now."""
    page = httpx.get(f"{url}/users", params={"project_id": project}).raise_for_status().json()
    return {user["login"]: user for user in page["items"]}


def held(url: str, project: str) -> list[str]:
    return [login for login, user in users(url, project).items() if user["state"] == "locked"]


def seconds_until_free(url: str, project: str, most: float) -> float:
    started = time.monotonic()
    until(lambda: not held(url, project), most)
    return time.monotonic() - started


def ends(url: str, user: dict[str, Any]) -> list[str]:
    """How the locks of a user ended, the oldest first."""
    return [lock["ended_by"] for lock in history(url, user)]


def outcomes(url: str, user: dict[str, Any]) -> list[str | None]:
    return [lock["outcome"] for lock in history(url, user)]


def history(url: str, user: dict[str, Any]) -> list[dict[str, Any]]:
    page = httpx.get(f"{url}/users/{user['id']}/history").raise_for_status().json()
    return page["items"][::-1]


def force(url: str, user: dict[str, Any]) -> None:
    httpx.delete(f"{url}/users/{user['id']}/lock").raise_for_status()


class Gate:
    """A port before a service. It keeps what callers `sent`; `says` is answered instead of the service, b"" is a reset.

    `loses` so many of the next replies, after the service has done what was asked; `late`: seconds of each.
    """

    def __init__(self, behind: str) -> None:
        self._behind = behind.removeprefix("http://").split(":")
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent: list[bytes] = []
        self._callers: set[socket.socket] = set()
        self.says: bytes | None = None
        self.silent = False
        self.loses = 0
        self.late: list[float] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        with caller, contextlib.suppress(OSError):
            self._callers.add(caller)
            request = caller.recv(65536)
            while b"\r\n\r\n" not in request or len(request.partition(b"\r\n\r\n")[2]) < _length(request):
                request += caller.recv(65536)
            self.sent.append(request)
            request = re.sub(rb"(?i)\r\nconnection: keep-alive", b"", request)
            request = request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
            while self.silent:
                time.sleep(0.02)
            if self.says is not None:
                return caller.sendall(self.says)
            with socket.create_connection((self._behind[0], int(self._behind[1]))) as service:
                service.sendall(request)
                reply = b"".join(iter(lambda: service.recv(65536), b""))
            time.sleep(self.late.pop(0) if self.late else 0)
            if self.loses:
                self.loses -= 1
                return None
            return caller.sendall(reply)

    def cut(self) -> None:
        """As a service that is stopped does it to those who wait."""
        for caller in self._callers:
            with contextlib.suppress(OSError):
                caller.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.silent = False
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _length(request: bytes) -> int:
    head = request.partition(b"\r\n\r\n")[0].lower()
    return int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)


@contextlib.contextmanager
def gate(behind: str) -> Iterator[Gate]:
    opened = Gate(behind)
    try:
        yield opened
    finally:
        opened.close()


@contextlib.contextmanager
def restartable(database: str) -> Iterator[tuple[str, Callable[[float], None]]]:
    """The URL of a service, and what stops it and starts another one in its place after so many seconds."""
    port = str(free_port())
    url, start = f"http://127.0.0.1:{port}", partial(process, "--port", port, env={"DATABASE_URL": database})
    with contextlib.ExitStack() as running:
        running.enter_context(start())
        wait_ready(url)

        def restart(seconds: float) -> None:
            running.close()
            time.sleep(seconds)
            running.enter_context(start())
            wait_ready(url)

        yield url, restart
