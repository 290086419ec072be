"""`python botfarm.py ...` without the wait for its imports, which are most of the time that a short command takes.

A process that has them stands ready and forks what is asked for: a process of its own, with arguments, environment
and output of its own, which runs botfarm.py from its first line. Here are the half of the tests, `fork`, and the
half that forks.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
WORD = 12  # bytes of a number on the way back
ASKING = threading.Lock()


@functools.cache
def _ready() -> socket.socket:
    """Where the process that stands ready is asked; it ends with the tests."""
    ours, theirs = socket.socketpair()
    with theirs:
        standing = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    atexit.register(standing.wait)
    atexit.register(ours.close)
    return ours


def fork(
    arguments: Sequence[str],
    env: dict[str, str],
    *files: IO[Any] | int,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Forked:
    """Start `python botfarm.py` with these arguments; the files are its input, its output and its errors.

    `changes` are constants of the rooms that are others for it, as `farm.waiting.POLL`.
    """
    ours, theirs = socket.socketpair()
    with theirs, tempfile.TemporaryFile() as request:
        request.write(json.dumps([arguments, env, dict(changes)]).encode())
        request.seek(0)
        with ASKING:
            numbers = [file if isinstance(file, int) else file.fileno() for file in (theirs, *files, request)]
            socket.send_fds(_ready(), [b"fork"], numbers)
        return Forked(ours, files[1])


class Forked:
    """As much of `subprocess.Popen` as the tests want of it."""

    returncode: int | None = None

    def __init__(self, news: socket.socket, stdout: Any) -> None:
        self._news = news
        self.stdout = stdout
        self.pid = int(news.recv(WORD))

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._news], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("botfarm.py", timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(int(self._news.recv(WORD)))
            self._news.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it has written, once it has ended."""
        self.wait(timeout)
        return read(self.stdout), None


def read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


# ---- The process that stands ready -------------------------------------------------------------------------


def _import_all() -> None:
    sys.path[0] = str(ROOT)
    for name in ["botfarm", *(f"farm.{room.name}" for room in pkgutil.iter_modules([str(ROOT / "farm")]))]:
        importlib.import_module(name)
    gc.freeze()


def _serve(control: socket.socket) -> None:
    """Fork for each request. Returns in the processes that are to become what was asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        word, files, _, _ = socket.recv_fds(control, 4, 5)
        if not word:
            sys.exit()
        if not os.fork():
            control.close()
            return _follow(*files)
        for file in files:
            os.close(file)


def _follow(news: int, stdin: int, stdout: int, stderr: int, request: int) -> None:
    """Fork once more, to tell how it ends. Returns in that process, which is set up as it was asked to be."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        for file in (stdin, stdout, stderr, request):
            os.close(file)
        os.write(news, b"%*d" % (WORD, pid))
        os.write(news, b"%*d" % (WORD, os.waitpid(pid, 0)[1]))
        os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with os.fdopen(request) as file:
        arguments, environment, changes = json.load(file)
    for number, file in enumerate((stdin, stdout, stderr)):
        os.dup2(file, number)
    for file in (news, stdin, stdout, stderr):
        os.close(file)
    for name, value in changes.items():
        assert pkgutil.resolve_name(name) is not None  # it is still called so
        place, _, constant = name.rpartition(".")
        setattr(pkgutil.resolve_name(place), constant, value)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(ROOT / "botfarm.py"), *arguments]


if __name__ == "__main__":
    os.chdir(ROOT)
    _import_all()
    _serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_path(str(ROOT / "botfarm.py"), run_name="__main__")
