"""A command in a process group of its own: signals, the terminal, its end when the lock is lost. POSIX alone."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time

HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
TERM_AFTER, KILL_AFTER = 7.0, 5.0  # seconds from the first signal to TERM, and from TERM to KILL
REST = 2.0  # seconds that what a stopped command leaves behind has, so that the lock is free within 3
LOST = 0  # no signal's number: what the heartbeat writes between theirs


class Run:
    """One command, from start to end. Signals arrive as bytes in a pipe, so that none falls between two lines."""

    def __init__(self) -> None:
        self.lost = False
        self.stopped = False  # whether it was sent a signal from outside
        self.outcome: str | None = None  # how it went, once it has ended by itself
        self._due: list[tuple[float, int]] = []  # what its group is sent, and when
        self._news, self._teller = os.pipe()
        os.set_blocking(self._news, False)
        os.set_blocking(self._teller, False)
        signal.set_wakeup_fd(self._teller, warn_on_full_buffer=False)
        for number in (*HANDED_ON, signal.SIGTSTP, signal.SIGCHLD):
            if number == signal.SIGCHLD or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # we take the terminal back, and speak, from the background
        self._terminal, self._gave = _terminal(), False

    def tell_lost(self) -> None:
        """From any thread: the lock is lost."""
        os.write(self._teller, bytes([LOST]))

    def start(self, words: list[str], env: dict[bytes, bytes]) -> None:
        """Before any thread runs, so that what the child does between fork and exec is safe. OSError if it can't."""
        # Not where a pager or the like reads its output: that one may want the terminal, and ours gets it when it asks.
        self._gave = os.isatty(0) and os.isatty(1) and self._in_front()
        foreground = self._terminal if self._gave else None

        def apart() -> None:
            os.setpgid(0, 0)
            if foreground is not None:
                os.tcsetpgrp(foreground, os.getpid())
            signal.signal(signal.SIGTTOU, signal.SIG_DFL)

        # Files that were inherited are handed on, a make's job server for one.
        child = subprocess.Popen(words, env=env, close_fds=False, preexec_fn=apart)
        self._pid = child.pid
        child.returncode = 0  # it is waited for below

    def wait(self) -> int:
        """Its exit status, or 128 and the number of the signal that ended it, as a shell has it."""
        status = self._wait()
        self._clear()
        if not self.stopped and not self.lost:
            self.outcome = "failed" if status else "passed"
        return status

    def _wait(self) -> int:
        while True:
            pause = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            select.select([self._news], [], [], pause)
            with contextlib.suppress(BlockingIOError):
                for number in os.read(self._news, 512):
                    self._hear(number)
            pid, status = os.waitpid(self._pid, os.WNOHANG | os.WUNTRACED)
            if pid and not os.WIFSTOPPED(status):
                return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            if pid:
                self._suspended(os.WSTOPSIG(status))
            while self._due and self._due[0][0] <= time.monotonic():
                self._send(self._due.pop(0)[1])

    def _hear(self, number: int) -> None:
        if number == LOST:
            self.lost = True
            self._plan(0)
        elif number == signal.SIGTSTP:
            self._send(number)
        elif number in HANDED_ON:
            self._send(number)
            if not self.stopped and not self.lost:
                self._plan(TERM_AFTER)
            self.stopped = True

    def _plan(self, seconds: float) -> None:
        """TERM after so many seconds, and KILL after that."""
        when = time.monotonic() + seconds
        self._due = [(when, signal.SIGTERM), (when, signal.SIGCONT), (when + KILL_AFTER, signal.SIGKILL)]

    def _send(self, number: int) -> bool:
        """Whether there is still something in the group that can be sent a signal."""
        try:
            os.killpg(self._pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def _clear(self) -> None:
        """What a command that was to stop has left behind ends, too: the user may be another's soon.

        What one leaves behind that ended by itself stays, as behind any command: a build's daemon, say.
        """
        if not self._due:  # it had its KILL
            return
        end = self._due[-1][0] if self.lost else time.monotonic() + REST
        while self._send(0) and time.monotonic() < end:
            time.sleep(0.02)
        self._send(signal.SIGKILL)

    # The terminal

    def _in_front(self) -> bool:
        """Whether it is ours to give."""
        return self._terminal is not None and os.tcgetpgrp(self._terminal) == os.getpgrp()

    def _give(self) -> None:
        self._gave = self._in_front()
        if self._terminal is not None and self._gave:
            os.tcsetpgrp(self._terminal, self._pid)

    def close(self) -> None:
        """Take the terminal back."""
        if self._terminal is not None and self._gave:
            with contextlib.suppress(OSError):  # it may have been closed meanwhile
                os.tcsetpgrp(self._terminal, os.getpgrp())
        self._gave = False

    def _suspended(self, number: int) -> None:
        """It has stopped. For Ctrl-Z we stop as well, so that the shell takes over; its lock may run out meanwhile.

        All of our group does, as the terminal would have it: a script that runs us, what is at the end of a pipe. Where
        no shell looks after that group the system ignores it, and so do we.
        """
        if number == signal.SIGSTOP or self._terminal is None:
            return
        if number == signal.SIGTSTP or not self._in_front():  # else it asks for the terminal, which it can have
            self.close()
            before = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            os.killpg(0, signal.SIGTSTP)
            signal.signal(signal.SIGTSTP, before)
        self._give()
        self._send(signal.SIGCONT)


def _terminal() -> int | None:
    try:
        return os.open("/dev/tty", os.O_RDWR)
    except OSError:
        return None
