"""The command `botfarm`: run a command with a user of its own, or acquire, renew, release and look by hand."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import sys
from typing import Any, NoReturn

from botfarm_client.errors import BotfarmError, LockLost, Misconfigured, NoneFree, Refused
from botfarm_client.farm import TTL, WAIT, Farm, Lock

TAKEN_OUT = re.compile(rb"BOTFARM_(CLIENT_SECRET|ID_TOKEN|TOKEN|(USER|LOCK|LABEL)_.*)")  # ours, and an outer exec's
USAGE = "botfarm exec [filters] [options] -- COMMAND …"
ENDS = "exit status: the command's, or 128+n; 64 usage, 65 no such user, 69 not reached, 75 none free in time, "
ENDS += "77 not allowed, 78 configuration, 124 the lock was lost, 126 and 127 as in a shell"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        say(message)
        sys.exit(Refused.exit_status)


class Stopped(Exception):
    """A signal came while no command runs yet."""


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it; users are given back all the same
        os.write(2, f"botfarm: {text}\n".encode(errors="backslashreplace"))


def seconds(text: str) -> int:
    found = re.fullmatch(r"(\d+)([smh]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 90, 90s, 30m or 2h")
    return int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def exit_status(text: str) -> int:
    if not re.fullmatch(r"\d{1,3}", text) or int(text) > 255:
        raise argparse.ArgumentTypeError(f"{text!r} is no exit status: write 0 to 255")
    return int(text)


def label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no label: write KEY=VALUE")
    return key, value


def users(text: str) -> list[dict[str, Any]]:
    try:
        wanted = json.loads(text)
    except ValueError as fault:
        raise argparse.ArgumentTypeError(f"it is no JSON: {fault}") from None
    if not (isinstance(wanted, list) and wanted and all(isinstance(wish, dict) for wish in wanted)):
        raise argparse.ArgumentTypeError('it is no list of wishes: write [{"project_id": "…", "count": 2}]')
    return wanted


def add_by_hand(commands: Any, service: Parser) -> None:
    """The commands that take a lock which is there."""
    for name, does in (("renew", "let a lock end its ttl from now"), ("release", "give a user back"),
                       ("status", "print a lock as JSON, without password")):  # fmt: skip
        added = commands.add_parser(name, parents=[service], help=does)
        added.add_argument("lock", metavar="LOCK", help="the id of the lock", nargs="?" if name == "release" else None)
        if name == "renew":
            added.add_argument("--ttl", type=seconds, help="seconds; else as before")
            added.add_argument("--holder", help="who has it from now on")
            added.add_argument("--note", help="why, or where")
        if name == "release":
            added.add_argument("--holder", help="instead of a lock: give back all that this holder has")
            added.add_argument("--cooldown", type=seconds, help="how long the user rests")
            added.add_argument("--quarantine", metavar="REASON", help="take the user out")
            added.add_argument("--outcome", choices=["passed", "failed", "bad-login"], help="how it went")


def parser() -> Parser:
    top = Parser("botfarm", description="Borrow test accounts from BotFarm.", epilog=ENDS)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    commands.required = True
    service = Parser(add_help=False)
    service.add_argument("--url", help="of BotFarm; else BOTFARM_URL")
    filters = Parser(add_help=False, parents=[service])
    filters.add_argument("--project", metavar="UUID")
    filters.add_argument("--env")
    filters.add_argument("--domain")
    filters.add_argument("--label", metavar="KEY=VALUE", type=label, action="append", default=[])
    filters.add_argument("--user", metavar="UUID", help="this very user")
    filters.add_argument("--ttl", type=seconds, default=TTL, help="seconds that the lock lasts unless it is renewed")
    filters.add_argument("--wait", type=seconds, default=WAIT, help="seconds to wait for a user to come free")
    filters.add_argument("--holder", help="who asks; else BOTFARM_HOLDER, else this machine and process")
    filters.add_argument("--note", help="why, or where: shown with the lock, as the holder is")
    filters.add_argument("--prefer", choices=["any", "session"], help="session: one that is logged in comes first")

    run = commands.add_parser("exec", parents=[filters], usage=USAGE, help="run a command with a user", epilog=ENDS)
    run.add_argument("--count", type=int, default=1, help="so many users under these filters, all or none")
    run.add_argument("--set", type=users, metavar="JSON", help="users under several filters, all or none")
    run.add_argument("--file", metavar="PATH", help="write the lock there (JSON, mode 0600), not the password into env")
    run.add_argument("-E", metavar="STATUS", type=exit_status, default=NoneFree.exit_status, help="when none came free")
    run.add_argument(
        "--keep-on-failure", type=seconds, metavar="TIME", help="as 30m: keep the user so long for a person"
    )
    commands.add_parser("acquire", parents=[filters], help="acquire a user, and print its lock as JSON")
    add_by_hand(commands, service)
    return top


def main() -> NoReturn:
    ours, command, top = sys.argv[1:], [], parser()
    top.usage = USAGE if ours[:1] == ["exec"] else None  # also of what is found wrong later
    if ours[:1] == ["exec"] and "--" in ours:
        cut = ours.index("--")
        ours, command = ours[:cut], ours[cut + 1 :]
    asked = top.parse_args(ours)
    try:
        farm = Farm(asked.url)
        status = execute(top, farm, asked, command) if asked.command == "exec" else by_hand(top, farm, asked)
    except BotfarmError as fault:
        say(str(fault))
        status = fault.exit_status
    except Stopped as stop:
        status = 128 + stop.args[0]
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(status)


def by_hand(top: Parser, farm: Farm, asked: argparse.Namespace) -> int:
    if asked.command == "release":
        if bool(asked.lock) == bool(asked.holder):
            top.error("name one lock, or --holder and no lock")
        told = {name: getattr(asked, name) for name in ("cooldown", "quarantine", "outcome")}
        given = {name: value for name, value in told.items() if value is not None}
        if asked.lock:
            farm.release(asked.lock, **given)
        elif given:
            top.error("--cooldown, --quarantine and --outcome go with a lock, not with --holder")
        else:
            say(f"{farm.release_holder(asked.holder)} given back")
        return 0
    if asked.command == "acquire":
        lock = farm.acquire(**wish_of(top, asked), **terms_of(asked))
        try:
            show(lock.data)
        except Misconfigured:  # so nobody knows its id
            give_back([lock])
            raise
    elif asked.command == "renew":
        show(farm.renew(asked.lock, asked.ttl, holder=asked.holder, note=asked.note))
    else:
        show(farm.status(asked.lock))
    return 0


def show(value: Any) -> None:
    """As JSON in UTF-8, which is what JSON is in, whatever the encoding of the output."""
    rest = json.dumps(value, ensure_ascii=False).encode() + b"\n"
    try:
        while rest:
            rest = rest[os.write(1, rest) :]  # not by sys.stdout, which would try it again at the end
    except OSError as fault:
        raise Misconfigured(f"standard output can't be written: {fault.strerror}") from None


def terms_of(asked: argparse.Namespace) -> dict[str, Any]:
    return {"heartbeat": False, **{name: getattr(asked, name) for name in ("ttl", "wait", "holder", "note")}}


def wish_of(top: Parser, asked: argparse.Namespace) -> dict[str, Any]:
    """The filters, as `Farm.acquire` takes them."""
    filters = {"project_id": asked.project, "env": asked.env, "domain": asked.domain, "labels": dict(asked.label)}
    given = {name: value for name, value in filters.items() if value}
    if bool(asked.user) == bool(asked.project) or (asked.user and given):
        top.error("name the project (--project UUID) with further filters, or one user (--user UUID) and no filters")
    if len(filters["labels"]) < len(asked.label):
        top.error("a --label is there twice: a user has one value of each")
    return {**given, "prefer": asked.prefer, "user_id": asked.user}


# ---- exec --------------------------------------------------------------------------------------------------


def execute(top: Parser, farm: Farm, asked: argparse.Namespace, words: list[str]) -> int:
    from botfarm_client.run import HANDED_ON, Run

    if not words or not words[0]:
        top.error("there is no command: write it behind --, as in botfarm exec --project UUID -- pytest")
    for number in HANDED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    locks: list[Lock] = []
    try:
        locks = acquire(top, farm, asked)
        run, kept = Run(), False
    except NoneFree as fault:
        say(str(fault))
        return asked.E
    except Stopped:
        give_back(locks)
        raise
    try:
        run.start(words, environment(locks, asked))
        for lock in locks:
            lock.keep(lambda lost: run.tell_lost())
        status = run.wait()
        kept = bool(run.outcome == "failed" and asked.keep_on_failure) and keep(farm, locks, asked, words[0], status)
    except OSError as fault:
        say(f"{words[0]}: {fault.strerror}")
        status = 127 if isinstance(fault, FileNotFoundError) else 126
    finally:
        run.close()
        if not kept:
            give_back(locks, run.outcome)
        if asked.file:
            remove(asked.file)
    return LockLost.exit_status if any(lock.lost for lock in locks) else status


def _stop(number: int, frame: Any) -> NoReturn:
    raise Stopped(number)


def acquire(top: Parser, farm: Farm, asked: argparse.Namespace) -> list[Lock]:
    if asked.set is not None:
        if asked.project or asked.user or asked.env or asked.domain or asked.label or asked.prefer or asked.count != 1:
            top.error("--set names all filters itself: it goes with none of the others, and with no --count")
        return farm.acquire_set(asked.set, **terms_of(asked))
    wish = wish_of(top, asked)
    if asked.count == 1:
        return [farm.acquire(**wish, **terms_of(asked))]
    if asked.user or asked.prefer or asked.count < 1:
        top.error("--count is 1 or more, and goes neither with --user nor with --prefer")
    kept = {name: value for name, value in wish.items() if value}
    return farm.acquire_set([{**kept, "count": asked.count}], **terms_of(asked))


def environment(locks: list[Lock], asked: argparse.Namespace) -> dict[bytes, bytes]:
    """Ours, without secrets, and then the users; with --file their passwords go there instead."""
    env = {name: value for name, value in os.environb.items() if not TAKEN_OUT.fullmatch(name)}
    several = asked.set is not None or len(locks) > 1
    for number, lock in enumerate(locks, 1):
        mark = f"{number}_" if several else ""
        told: dict[str, Any] = {f"USER_{mark}LOGIN": lock.login, f"USER_{mark}ID": lock.user_id}
        told.update({f"LOCK_{mark}ID": lock.id, f"LOCK_{mark}FENCE": lock.fence})
        for key, value in sorted(lock.labels.items()):
            name = f"LABEL_{mark}{re.sub('[^A-Z0-9_]', '_', key.upper())}"
            if name in told:
                say(f"the label {key} of {lock.name} is not told: another one comes to BOTFARM_{name}, too")
            told.setdefault(name, value)
        if not asked.file and lock.password is not None:  # null where the deployment stores only hashes
            told[f"USER_{mark}PASSWORD"] = lock.password
        env.update({f"BOTFARM_{name}".encode(): str(value).encode() for name, value in told.items()})
    if asked.file:
        write(asked.file, {"locks": [lock.data for lock in locks]} if several else locks[0].data)
    return env


def write(path: str, value: Any) -> None:
    """All of it or nothing, and nobody else can read it at any time."""
    fresh = f"{path}.{os.getpid()}"
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(value, file, ensure_ascii=False)
        os.replace(fresh, path)
    except OSError as fault:
        remove(fresh)
        raise Misconfigured(f"--file {path} can't be written: {fault.strerror}") from None


def remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def keep(farm: Farm, locks: list[Lock], asked: argparse.Namespace, word: str, status: int) -> bool:
    """Hand the locks over to a holder that no sweep of ours ends, and say how a person gets the users and ends that.

    The note names the command and none of its arguments, which may be secret.
    """
    told = f"{word} ended with {status}"
    note = "".join(c if c.isprintable() else "?" for c in (f"{asked.note}: {told}" if asked.note else told))
    try:
        for lock in locks:
            lock.renew(asked.keep_on_failure, holder=f"kept/{lock.data['holder']}"[:200], note=note[:500])
    except BotfarmError as fault:
        say(f"no user is kept: {fault}")
        return False
    for lock in locks:
        say(f"{lock.name} is kept until {lock.data['expires_at']}, for a person to look")
    token = ['-H "Authorization: Bearer $TOKEN"'] if farm.wire.authenticated else []
    first = locks[0].asked
    again = [farm.url + first.path, "-H", "Content-Type: application/json", "-H", f"Idempotency-Key: {first.key}"]
    curl = ["curl -s -X", first.method, *token, *map(shlex.quote, [*again, "-d", json.dumps(first.body)])]
    say("to get it, with its password:\n" + " ".join(curl))
    ends = [
        " ".join(["curl -s -X DELETE", *token, shlex.quote(f"{farm.url}/locks/{lock.id}?outcome=failed")])
        for lock in locks
    ]
    say("to end that:\n" + "\n".join(ends))
    return True


def give_back(locks: list[Lock], outcome: str | None = None) -> None:
    for lock in locks:
        try:
            if not lock.release(outcome=outcome):
                say(str(lock.lost))
        except BotfarmError as fault:
            say(f"{lock.name} could not be given back, and comes free at {lock.data['expires_at']}: {fault}")


if __name__ == "__main__":
    main()
