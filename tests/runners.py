"""What the chapters of clients/ share: each client runs by its own tool, from its README, against the real service.

The blocks of a README that name a file in their first line are the project that its runner is let loose on, beside what
lies in the folder `test` there. What happened is read from the history of the users.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from conftest import ROOT, environment, until

CLIENTS = ROOT / "clients"
LONGER = timedelta(seconds=3.5)


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
def running(folder: Path, output: Path, *command: str, env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, of which nothing is left."""
    with open(output, "w") as file:
        options: dict[str, Any] = {"stdout": file, "stderr": file, "start_new_session": True}
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


def npm(client: str, folder: Path, *packages: str) -> Path:
    """The project of a client's README, with packages of ours installed as they would be published."""
    lay(client, folder)
    for package in packages:
        run(CLIENTS / package, "npm", "pack", "--silent", "--pack-destination", str(folder))
    packed = [path.name for path in folder.glob("*.tgz")]
    # No scripts: what they bring, as Cypress's browser, is neither wanted nor to be had everywhere.
    quiet = ["--no-audit", "--no-fund", "--no-package-lock", "--no-save", "--ignore-scripts"]
    run(folder, "npm", "install", *quiet, *packed)
    return folder
