"""Test accounts of a BotFarm for Robot Framework: a library that is its own listener.

What is acquired in a test ends with the test, what is acquired in a suite's set-up with the suite. Under pabot each
process has a library, and with it locks, of its own: none touches those of another.
"""

from __future__ import annotations

import os
from collections import defaultdict
from socket import gethostname
from typing import Any

from botfarm_client import BotfarmError, Farm, Lock
from robot.api import logger
from robot.api.deco import keyword, library
from robot.libraries.BuiltIn import BuiltIn


@library(scope="GLOBAL", listener="SELF")
class BotFarm:
    """Lends test accounts: `Acquire Bot`, and at the end of the test, or of the suite, they are given back.

    The service is named by BOTFARM_URL, and where it asks who calls, by BOTFARM_CLIENT_ID and BOTFARM_CLIENT_SECRET,
    or by BOTFARM_ID_TOKEN.
    """

    ROBOT_LISTENER_API_VERSION = 3

    def __init__(
        self, project: str = "", env: str | None = None, domain: str | None = None, ttl: int = 60, wait: int = 300
    ) -> None:
        """What all bots have in common; `ttl` and `wait` in seconds."""
        self._filter: dict[str, Any] = {"project_id": project or None, "env": env, "domain": domain}
        self._times = {"ttl": ttl, "wait": wait}
        self._held: dict[str, list[Lock]] = defaultdict(list)  # by the name of the test, or of the suite
        self._told: list[Lock] = []  # lost, and a keyword has failed of it
        self._why = ""  # a keyword of the test has failed
        self._farm: Farm | None = None

    @keyword
    def acquire_bot(self, *, user_id: str | None = None, **labels: str) -> Lock:
        """A user with these labels, or the one of that id: `${bot.login}`, `${bot.password}`, `${bot.labels}`.

        | ${admin}=    Acquire Bot    role=admin
        """
        chosen: dict[str, Any] = {"user_id": user_id} if user_id else self._filter
        return self._keep([self.farm.acquire(**chosen, labels=labels, **self._times)])[0]

    @keyword
    def acquire_bots(self, count: int, **labels: str) -> list[Lock]:
        """Several users with these labels, all or none.

        | ${one}    ${two}=    Acquire Bots    2    role=buyer
        """
        wish = {**self._filter, "labels": labels, "count": count}
        wishes = [{name: value for name, value in wish.items() if value is not None}]
        return self._keep(self.farm.acquire_set(wishes, **self._times))

    @keyword
    def release_bot(
        self, bot: Lock, cooldown: int = 0, quarantine: str | None = None, outcome: str | None = None
    ) -> None:
        """Give it back before the end. It rests for `cooldown` seconds; `quarantine` says why it is broken.

        `outcome` is `passed`, `failed`, or `bad-login` where the account itself did not work.
        """
        bot.release(cooldown=cooldown, quarantine=quarantine, outcome=outcome)

    @property
    def farm(self) -> Farm:
        """Made when it is first wanted, so that a library that nobody uses needs no service."""
        if self._farm is None:
            holder = os.environ.get("BOTFARM_HOLDER") or f"robot/{gethostname()}/{os.getpid()}"
            self._farm = Farm(holder=holder)
        return self._farm

    def _keep(self, locks: list[Lock]) -> list[Lock]:
        values = BuiltIn().get_variables()
        suite, test = values["${SUITE NAME}"], values.get("${TEST NAME}")
        self._held[f"{suite}.{test}" if test else suite] += locks
        return locks

    # The listener

    def end_keyword(self, data: Any, result: Any) -> None:
        """Fail what runs when a user is lost: Robot lets nothing end a keyword before it has ended."""
        if lost := self._lost():
            result.status, result.message, self._why = "FAIL", lost, lost

    def end_test(self, data: Any, result: Any) -> None:
        self._judge(result)
        # Of a skipped test nothing is told, nor of what a suite has: it is there for several tests.
        self._release(result.full_name, {"PASS": "passed", "FAIL": "failed"}.get(result.status))
        self._judge(result)  # of what turned out only now
        self._why = ""

    def end_suite(self, data: Any, result: Any) -> None:
        self._release(result.full_name)
        self._why = ""

    def _judge(self, result: Any) -> None:
        self._why = self._lost() or self._why
        if self._why not in result.message:  # also where a keyword around the one that failed has caught it
            result.status, result.message = "FAIL", self._why

    def close(self) -> None:
        for name in list(self._held):
            self._release(name)

    def _lost(self) -> str:
        """Why users are lost of which nothing has failed yet."""
        lost = [lock for locks in self._held.values() for lock in locks if lock.lost and lock not in self._told]
        self._told += lost
        return "\n".join(str(lock.lost) for lock in lost)

    def _release(self, name: str, outcome: str | None = None) -> None:
        for lock in self._held.get(name, []):
            try:
                lock.release(outcome=outcome)
            except BotfarmError as fault:
                logger.warn(f"BotFarm: {lock.name} is not given back, its ttl frees it: {fault}")
        self._why = self._lost() or self._why
        self._held.pop(name, None)
