"""What can go wrong, a class an outcome, with the status that the command `botfarm` ends with."""

from __future__ import annotations


class BotfarmError(Exception):
    """The base of them all."""

    exit_status = 69
    retry_after: float | None = None  # seconds after which the service wants to be asked again
    slug: str | None = None  # the kind of problem that the service told, as `no-totp`


class Unreachable(BotfarmError):
    """The service can't be reached, or can't serve now. It may be there in a moment: no lock is lost by it."""


class NoneFree(BotfarmError):
    """Users match, and none came free in time."""

    exit_status = 75


class NoMatch(BotfarmError):
    """No user at all matches, so waiting would not help."""

    exit_status = 65


class NotAllowed(BotfarmError):
    """No token, a bad one, or one that does not reach so far."""

    exit_status = 77
    unknown = False  # whether it is the token that is not known, and a new one may be


class Refused(BotfarmError):
    """The service does not take what was asked."""

    exit_status = 64


class Misconfigured(BotfarmError):
    """Something that is needed is not set, or set to what can't be."""

    exit_status = 78


class LockLost(BotfarmError):
    """The lock has ended before it was given back: the user may be another's by now."""

    exit_status = 124
    ended_by: str | None = None  # `expired`, `forced`, `released`, where known
