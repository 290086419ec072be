"""BotFarm for those who run tests: borrow a test account, keep it while it is used, give it back.

    from botfarm_client import Farm

    farm = Farm("https://botfarm.example")                     # or BOTFARM_URL
    with farm.user("22222222-2222-4222-8222-222222222222", env="stage") as bot:
        log_in(bot.login, bot.password)

A *user* is a test account of the system under test; a *lock* is the right to use it alone for `ttl` seconds, which a
thread renews; the *holder* names who asked, for people and for giving everything back at once.

    errors.py           what can go wrong, with the exit status of each
    wire.py             one request: proxies, TLS, tokens, and what a reply means
    farm.py             `Farm` and `Lock`: acquiring, the heartbeat, sessions and codes, giving back
    run.py              a command in a process group of its own, with signals and the terminal
    command.py          the command `botfarm`
    pytest_plugin.py    the fixtures `bot`, `bot_session`, `worker_bot`, `bots`, `bot_filter`

It is imported wherever pytest is: `http.client` and what comes with it are loaded by the first request.
"""

from botfarm_client.errors import (
    BotfarmError,
    LockLost,
    Misconfigured,
    NoMatch,
    NoneFree,
    NotAllowed,
    Refused,
    Unreachable,
)
from botfarm_client.farm import Farm, Lock

__version__ = "0.1.0"
__all__ = [
    "BotfarmError",
    "Farm",
    "Lock",
    "LockLost",
    "Misconfigured",
    "NoMatch",
    "NoneFree",
    "NotAllowed",
    "Refused",
    "Unreachable",
]
