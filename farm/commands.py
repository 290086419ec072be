from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import secrets
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import asyncpg
import httpx
import msgspec
from litestar import Litestar
from rich.console import Console
from rich.progress import Progress, TextColumn

from farm import embedded
from farm.clients import SCOPES
from farm.database import SQL, open_pool
from farm.migrations import SchemaError, database, migrate
from farm.passwords import HASHER, KeyFault, check_keys, generate_key, keyring_of, load_keys, reseal
from farm.server import serve
from farm.settings import SECRET_SETTINGS, SETTING_TYPES, BadSettings, Settings
from farm.telemetry import log_as_lines, tell
from farm.words import CSV, NDJSON


def migrate_command(settings: Settings, rollback: bool, rest: int | None) -> int:
    with database(settings) as url:
        names = migrate(url, rollback)
        verb = "taken back" if rollback else "applied"
        print("\n".join(f"{verb}: {name}" for name in names) or "nothing to do")
        if rest is not None:
            users = asyncio.run(_rest(url, settings.pooler, rest))
            tell("users-rested", users)
            print(f"{users} users rest for {rest} seconds, and their fences have moved ahead")
    return 0


async def _rest(url: str, pooler: str, seconds: int) -> int:
    async with open_pool(url, 1, "force_custom_plan", 3600, pooler) as pool:
        return await pool.fetchval(SQL["rest_after_restore"], seconds)


def check_command(settings: Settings, url: str | None) -> int:
    """Exit status 0 when the service is ready, else 1: for container health checks."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)  # noqa: S104
    address = url or f"http://{host}:{settings.port}"
    try:
        answer = httpx.get(f"{address}/readyz", timeout=5)
    except httpx.HTTPError as error:
        print(f"{address} does not answer: {error}", file=sys.stderr)
        return 1
    print(answer.text)
    return 0 if answer.status_code == 200 else 1


def _token_headers(url: str) -> dict[str, str]:
    """A token of the client that BOTFARM_CLIENT_ID and BOTFARM_CLIENT_SECRET name, where they are set."""
    client = os.environ.get("BOTFARM_CLIENT_ID", ""), os.environ.get("BOTFARM_CLIENT_SECRET", "")
    if not all(client):
        return {}
    answer = httpx.post(f"{url}/token", data={"grant_type": "client_credentials"}, auth=client, timeout=60)
    if answer.status_code != 200:
        raise BadSettings(f"BOTFARM_CLIENT_ID: no token of {url}: {answer.status_code} {answer.text[:300]}")
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


def import_command(url: str, name: str, media: str | None) -> int:
    """Send a file with a progress bar. Exit status 1 when it is refused, with the errors by line."""
    media = media or (CSV if name.endswith(".csv") else NDJSON)
    with contextlib.ExitStack() as stack:
        file = sys.stdin.buffer if name == "-" else stack.enter_context(open(name, "rb"))
        size = None if name == "-" else os.path.getsize(name)
        bar = stack.enter_context(Progress(console=Console(stderr=True)))
        task = bar.add_task("import", total=size)

        def parts() -> Iterator[bytes]:
            while part := file.read(1 << 16):
                bar.advance(task, len(part))
                yield part

        headers = {"Content-Type": media} | _token_headers(url)
        answer = httpx.post(f"{url}/users/import", content=parts(), headers=headers, timeout=3600)
    print(
        answer.text if answer.status_code == 200 else _told(answer),
        file=sys.stdout if answer.is_success else sys.stderr,
    )
    return 0 if answer.status_code == 200 else 1


def _told(answer: httpx.Response) -> str:
    """A refused import, an error a line."""
    try:
        problem = answer.json()
    except ValueError:
        return f"{answer.status_code}: {answer.text[:200]}"
    errors = [f"line {e.get('line')}: {e.get('field') or ''}: {e['message']}" for e in problem.get("errors", [])]
    return "\n".join([f"{problem['status']} {problem['detail']}", *errors])


def export_command(url: str) -> int:
    """All users as NDJSON to standard output."""
    with Progress(TextColumn("{task.completed} users"), console=Console(stderr=True)) as bar:
        task = bar.add_task("export", total=None)
        with httpx.stream("GET", f"{url}/users/export", headers=_token_headers(url), timeout=3600) as answer:
            if answer.status_code != 200:
                answer.read()
                print(_told(answer), file=sys.stderr)
                return 1
            for line in answer.iter_lines():
                print(line)
                bar.advance(task)
    return 0


def reseal_command(settings: Settings) -> int:
    keyring = keyring_of(load_keys(settings))
    if keyring is None:
        raise BadSettings("reseal needs BOTFARM_KEYS: the new key first, then the old ones.")

    async def run(url: str, bar: Progress) -> int:
        task = bar.add_task("reseal", total=None)
        async with open_pool(url, 1, "force_custom_plan", 600, settings.pooler) as pool:
            await check_keys(pool, keyring)
            return await reseal(pool, keyring, lambda done: bar.update(task, completed=done))

    with database(settings) as url, Progress(TextColumn("{task.completed}"), console=Console(stderr=True)) as bar:
        migrate(url)
        total = asyncio.run(run(url, bar))
    tell("passwords-resealed", total)
    print(f"{total} passwords are now sealed under the key {keyring.first!r}")
    return 0


def client_command(settings: Settings, arguments: argparse.Namespace) -> int:
    """Add, list, rotate or remove a client: a JSON line for each. Exit status 1 when it is refused."""
    secret = secrets.token_urlsafe(32)
    name = getattr(arguments, "name", None)
    match arguments.action:
        case "add":
            values: tuple[Any, ...] = (uuid.uuid4(), name, HASHER.hash(secret), arguments.scope, arguments.project)
        case "rotate":
            values = (name, HASHER.hash(secret), arguments.keep)
        case "remove":
            values = (name,)
        case _:
            values = ()
    with database(settings) as url:
        migrate(url)
        rows = asyncio.run(_clients(url, settings.pooler, arguments.action, values))
    for row in rows:
        print(_client_line(row, secret if arguments.action in ("add", "rotate") else None))
    if not rows and name:
        reason = "exists already: choose another name" if arguments.action == "add" else "does not exist"
        print(f"The client {name!r} {reason}.", file=sys.stderr)
        return 1
    return 0


async def _clients(url: str, pooler: str, action: str, values: Sequence[Any]) -> list[asyncpg.Record]:
    statements = {"add": "add_client", "list": "list_clients", "rotate": "rotate_client", "remove": "remove_client"}
    async with open_pool(url, 1, "force_custom_plan", 60, pooler) as pool:
        return await pool.fetch(SQL[statements[action]], *values)


def _client_line(row: asyncpg.Record, secret: str | None) -> str:
    """A client in JSON; its secret is shown this once."""
    line = {"client_id": row["id"], "client_secret": secret, "scope": " ".join(row["scopes"])}
    line |= {"projects": row["projects"], "name": None if secret else row["name"], "created_at": row.get("created_at")}
    line |= {"old_secret_valid_until": row.get("previous_until")}
    shown = {key: value for key, value in line.items() if value is not None or key == "projects"}
    return msgspec.json.encode(shown).decode()


def _scopes(text: str) -> list[str]:
    scopes = list(dict.fromkeys(text.split()))
    if unknown := [scope for scope in scopes if scope not in SCOPES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(SCOPES)}")
    if not scopes:
        raise argparse.ArgumentTypeError(f"name at least one of {', '.join(SCOPES)}")
    return scopes


def _client_name(text: str) -> str:
    if not re.fullmatch(r"[^\x00-\x1f\x7f-\x9f]{1,100}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 to 100 characters without control characters")
    return text


def _seconds(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,7}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return int(text)


def _add_client_commands(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    adding = actions.add_parser("add", help="add a client and print its secret, this once")
    adding.add_argument("--scope", type=_scopes, required=True, help=f"some of {' '.join(SCOPES)}")
    adding.add_argument("--project", type=uuid.UUID, action="append", metavar="UUID", help="limit it to projects")
    actions.add_parser("list", help="list the clients")
    rotating = actions.add_parser("rotate", help="give a client a new secret and print it, this once")
    rotating.add_argument(
        "--keep", type=_seconds, default=3600, metavar="SECONDS",
        help="for how long the old secret stays valid (default: %(default)s)",
    )  # fmt: skip
    removing = actions.add_parser("remove", help="remove a client; its tokens end within a minute")
    for action in (adding, rotating, removing):
        action.add_argument("name", metavar="NAME", type=_client_name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="botfarm.py", description="A pool of test users that tests lock.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    serving = commands.add_parser("serve", help="serve (the default)")
    migrating = commands.add_parser("migrate", help="bring the database's schema up to date")
    migrating.add_argument("--rollback", action="store_true", help="take the last migration back instead")
    migrating.add_argument(
        "--after-restore", metavar="SECONDS", type=int, nargs="?", const=-1,
        help="a backup was restored: let every user rest, because locks taken since are unknown (default: the longest "
        "ttl), and move the fences ahead",
    )  # fmt: skip
    checking = commands.add_parser("check", help="exit status 0 when the service is ready, else 1")
    importing = commands.add_parser("import", help="send a file of users to a service")
    importing.add_argument("file", metavar="FILE|-", help="NDJSON, or CSV when the name ends in .csv")
    importing.add_argument("--type", dest="media", choices=[NDJSON, CSV], help="what it is, for standard input")
    exporting = commands.add_parser("export", help="print all users of a service as NDJSON")
    commands.add_parser("keygen", help="print a new key for BOTFARM_KEYS or BOTFARM_SIGNING_KEYS")
    resealing = commands.add_parser("reseal", help="seal all passwords under the first of BOTFARM_KEYS")
    clients = commands.add_parser("client", help="add, list, rotate or remove the clients that may call")
    _add_client_commands(clients)
    commands.add_parser("openapi", help="print the OpenAPI document")
    checking.add_argument("--url", help="the service (default: BOTFARM_HOST and BOTFARM_PORT)")
    for sending in (importing, exporting):
        sending.add_argument("--url", default="http://127.0.0.1:8000", help="the service (default: %(default)s)")
    for command, fields in (
        (serving, None),
        (migrating, {"home", "max_ttl"}),
        (resealing, {"home"}),
        (checking, {"host", "port"}),
    ):
        _add_setting_flags(command, fields)
    return parser


def _add_setting_flags(parser: argparse.ArgumentParser, fields: set[str] | None) -> None:
    """A flag for each setting but the secrets, which everybody on the machine could read off the process list."""
    for field, variable in Settings.variables().items():
        if field not in SECRET_SETTINGS and (fields is None or field in fields):
            text = next(part for part in get_args(SETTING_TYPES[field]) if isinstance(part, str)) if field not in (
                "envs", "domains") else f"allowed values of {field[:-1]}, comma-separated"  # fmt: skip
            parser.add_argument(f"--{field.replace('_', '-')}", dest=f"set_{variable}", help=f"{text} ({variable})")


def _rest_of(settings: Settings, seconds: int | None) -> int | None:
    """How long users rest after a restore; the longest ttl where no seconds were given."""
    if seconds is not None and not -1 <= seconds <= 86400 * 365:
        raise BadSettings(f"--after-restore: {seconds} is not 0 to {86400 * 365} seconds")
    return settings.max_ttl if seconds == -1 else seconds


def _run(arguments: argparse.Namespace, create_app: Callable[[Settings], Litestar]) -> int:
    match arguments.command:
        case "keygen":
            print(generate_key())
            return 0
        case "import":
            return import_command(arguments.url, arguments.file, arguments.media)
        case "export":
            return export_command(arguments.url)
    settings = Settings.load()
    match arguments.command:
        case "migrate":
            return migrate_command(settings, arguments.rollback, _rest_of(settings, arguments.after_restore))
        case "check":
            return check_command(settings, arguments.url)
        case "reseal":
            return reseal_command(settings)
        case "client":
            return client_command(settings, arguments)
        case "openapi":
            print(json.dumps(create_app(settings).state.openapi(), indent=2))
            return 0
    return serve(settings, create_app)


def main(argv: Sequence[str], create_app: Callable[[Settings], Litestar]) -> int:
    """Exit status 0: done; 1: refused; 2: bad flags or settings; 3: the service could not start."""
    log_as_lines()
    words = list(argv) if argv and (not argv[0].startswith("-") or argv[0] in ("-h", "--help")) else ["serve", *argv]
    arguments = _parser().parse_args(words)
    for name, value in vars(arguments).items():
        if name.startswith("set_") and value is not None:
            os.environ[name.removeprefix("set_")] = value
    try:
        return _run(arguments, create_app)
    except BadSettings as error:
        print(error, file=sys.stderr)
        return 2
    except (SchemaError, KeyFault, embedded.EmbeddedError, httpx.HTTPError, OSError) as error:
        print(error, file=sys.stderr)
        return 3 if arguments.command == "serve" else 1
