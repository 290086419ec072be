"""The command line: `python botfarm.py --help`, or `botfarm-server` where it is installed.

A command imports what it needs inside itself, so that `--help` is there at once, and what only calls a service does
so without the framework. The application comes by its name, and is imported by the commands that run it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pkgutil
import re
import secrets
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TextIO, TypeVar, get_args

import click
import msgspec

from farm.check import address, check, here, service, shown
from farm.settings import SECRET_SETTINGS, SETTING_TYPES, BadSettings, Settings

if TYPE_CHECKING:
    import httpx

    from farm.passwords import Keyring

VARIABLES = Settings.variables()
FLAGS = [field for field in VARIABLES if field not in SECRET_SETTINGS]  # all users of a machine see its command lines
HELP = ["-h", "--help"]
NDJSON, CSV = "application/x-ndjson", "text/csv"
PART = 1 << 16  # bytes of a file that are sent at once

Command = TypeVar("Command", bound=Callable[..., Any])


def setting_flags(*fields: str) -> Callable[[Command], Command]:
    """A flag for each of these settings. It wins over the variable, by setting it."""

    def keep(context: click.Context, option: click.Parameter, value: str | None) -> None:
        if value is not None:
            os.environ[VARIABLES[str(option.name)]] = value

    def add(command: Command) -> Command:
        for field in reversed(fields):
            text = next(part for part in get_args(SETTING_TYPES[field]) if isinstance(part, str))
            flag, text = f"--{field.replace('_', '-')}", f"{text} ({VARIABLES[field]})"
            command = click.option(flag, callback=keep, expose_value=False, metavar="VALUE", help=text)(command)
        return command

    return add


@click.group(context_settings={"help_option_names": HELP})
def commands() -> None:
    """A pool of test users that tests lock."""


@commands.command("serve")
@setting_flags(*FLAGS)
def serve_command() -> int:
    """Serve (the default)."""
    settings = Settings.load()
    from farm.server import serve
    from farm.telemetry import log_as_lines

    log_as_lines(settings.log == "events")
    return serve(settings)


# -- What the database is needed for ---------------------------------------------------------------------


def _database(settings: Settings) -> AbstractContextManager[str]:
    """The URL of the database; an embedded one that does not run is started for that. What happens is logged."""
    from farm import embedded
    from farm.telemetry import log_as_lines

    log_as_lines()
    given = settings.database_url
    return contextlib.nullcontext(given.reveal()) if given else embedded.database(settings.home)


async def _rows(settings: Settings, url: str, statement: str, *values: Any) -> Sequence[Any]:
    from farm.database import SQL, open_pool

    async with open_pool(url, 1, "force_custom_plan", 3600, settings.pooler) as pool:
        return await pool.fetch(SQL[statement], *values)


@commands.command("migrate")
@click.option("--rollback", is_flag=True, help="take the last migration back instead")
@click.option(
    "--after-restore", "rest", metavar="[SECONDS]", type=click.IntRange(-1, 86400 * 365), is_flag=False, flag_value=-1,
    help="a backup was restored: let every user rest, because locks taken since are unknown (default: the longest "
    "ttl), and move the fences ahead",
)  # fmt: skip
@setting_flags("home", "max_ttl")
def migrate_command(rollback: bool, rest: int | None) -> None:
    """Bring the database's schema up to date."""
    settings = Settings.load()
    if rollback and rest is not None:
        raise click.UsageError("--rollback and --after-restore do not go together: a restore needs the whole schema.")
    from farm.migrations import migrate
    from farm.telemetry import tell

    with _database(settings) as url:
        names = migrate(url, rollback)
        verb = "taken back" if rollback else "applied"
        print("\n".join(f"{verb}: {name}" for name in names) or "nothing to do")
        if rest is not None:
            seconds = settings.max_ttl if rest == -1 else rest
            ((users,),) = asyncio.run(_rows(settings, url, "rest_after_restore", seconds))
            tell("users-rested", users)
            print(f"{users} users rest for at least {seconds} seconds, and their fences have moved ahead")


@commands.command("reseal")
@setting_flags("home")
def reseal_command() -> None:
    """Seal all passwords, sessions and secrets of codes under the first of BOTFARM_KEYS."""
    settings = Settings.load()
    from farm.migrations import migrate
    from farm.passwords import keyring_of, load_keys
    from farm.telemetry import tell

    keyring = keyring_of(load_keys(settings))
    if keyring is None:
        raise BadSettings("reseal needs BOTFARM_KEYS: the new key first, then the old ones.")
    with _database(settings) as url:
        migrate(url)
        total = asyncio.run(_reseal(settings, url, keyring))
    tell("passwords-resealed", total)
    print(f"{total} secrets are now sealed under the key {keyring.first!r}")


async def _reseal(settings: Settings, url: str, keyring: Keyring) -> int:
    from farm.database import open_pool
    from farm.passwords import check_keys, reseal

    async with open_pool(url, 1, "force_custom_plan", 600, settings.pooler) as pool:
        await check_keys(pool, keyring)
        total = 0
        async for total in reseal(pool, keyring):
            click.echo(f"\r{total} secrets", nl=False, err=True)
        click.echo(err=True)
        return total


# -- Clients, for BOTFARM_AUTH=on: a JSON line for each ---------------------------------------------------


def _name(context: click.Context, argument: click.Parameter, text: str) -> str:
    if not re.fullmatch(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,100}", text):
        raise click.BadParameter(f"{text!r} is not 1 to 100 characters in UTF-8 without control characters")
    return text


def _scopes(context: click.Context, option: click.Parameter, text: str) -> list[str]:
    from farm.clients import SCOPES

    scopes = list(dict.fromkeys(text.split()))
    if unknown := [scope for scope in scopes if scope not in SCOPES]:
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(SCOPES)}")
    if not scopes:
        raise click.BadParameter(f"name at least one of {', '.join(SCOPES)}")
    return scopes


named = click.argument("name", callback=_name)


@commands.group("client")
def client_commands() -> None:
    """Add, list, rotate or remove the clients that may call."""


@client_commands.command("add")
@named
@click.option("--scope", "scopes", required=True, callback=_scopes, help="some of users:read users:write locks admin")
@click.option("--project", "projects", type=click.UUID, multiple=True, help="limit it to projects")
@setting_flags("home")
def add_client(name: str, scopes: list[str], projects: tuple[uuid.UUID, ...]) -> int:
    """Add a client and print its secret, this once."""
    secret, hashed = _new_secret()
    rows = _clients("add_client", uuid.uuid4(), name, hashed, scopes, projects or None)
    return _shown(rows, f"The client {name!r} exists already: choose another name.", client_secret=secret)


@client_commands.command("list")
@setting_flags("home")
def list_clients() -> int:
    """List the clients."""
    return _shown(_clients("list_clients"))


@client_commands.command("rotate")
@named
@click.option(
    "--keep", metavar="SECONDS", type=click.IntRange(0, 9_999_999), default=3600, show_default=True,
    help="for how long the old secret stays valid",
)  # fmt: skip
@setting_flags("home")
def rotate_client(name: str, keep: int) -> int:
    """Give a client a new secret and print it, this once."""
    secret, hashed = _new_secret()
    rows = _clients("rotate_client", name, hashed, keep)
    return _shown(rows, f"The client {name!r} does not exist.", client_secret=secret)


@client_commands.command("remove")
@named
@setting_flags("home")
def remove_client(name: str) -> int:
    """Remove a client; its tokens end within a minute."""
    return _shown(_clients("remove_client", name), f"The client {name!r} does not exist.")


def _new_secret() -> tuple[str, str]:
    """A secret and its hash."""
    from farm.passwords import HASHER

    secret = secrets.token_urlsafe(32)
    return secret, HASHER.hash(secret)


def _clients(statement: str, *values: Any) -> Sequence[Any]:
    settings = Settings.load()
    from farm.migrations import migrate

    with _database(settings) as url:
        migrate(url)
        return asyncio.run(_rows(settings, url, statement, *values))


def _shown(rows: Sequence[Any], refusal: str = "", **more: str) -> int:
    """Print clients. Exit status 1 where there is none and should be."""
    for row in rows:  # a shell may look for the id and the secret at the beginning of the line
        print(msgspec.json.encode({"client_id": row["client_id"]} | more | dict(row)).decode())
    if rows or not refusal:
        return 0
    print(refusal, file=sys.stderr)
    return 1


# -- What calls a service --------------------------------------------------------------------------------


def _service(context: click.Context, option: click.Parameter, text: str) -> str:
    """As people write it. BadParameter where nothing can be there."""
    import httpx

    try:
        url = httpx.URL(service(text))
        url.raw_host.decode().encode("idna")
    except (httpx.InvalidURL, UnicodeError) as fault:
        raise click.BadParameter(f"{text!r} is not an address: {fault}") from None
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise click.BadParameter(f"{text!r} is not an address as http://127.0.0.1:8000")
    return service(text)


of_service = click.option(
    "--url", default=here, show_default="BOTFARM_HOST and BOTFARM_PORT", help="the service", callback=_service
)


@commands.command("check")
@click.option("--url", help="the service (default: BOTFARM_HOST and BOTFARM_PORT)")
@setting_flags("host", "port")
def check_command(url: str | None) -> int:
    """Exit status 0 when the service is ready, else 1."""
    settings = Settings.load()
    return check(url or address(settings.host, settings.port))


@commands.command("import")
@click.argument("file", metavar="FILE|-")
@click.option("--type", "media", type=click.Choice([NDJSON, CSV]), help="what it is, for standard input")
@of_service
def import_command(file: str, media: str | None, url: str) -> int:
    """Send a file of users to a service.

    NDJSON, or CSV when the name ends in .csv. When it is refused, the errors are told by line.
    """
    media = media or (CSV if file.lower().endswith(".csv") else NDJSON)
    name = file if os.path.exists(file) else os.path.expanduser(file)  # a shell leaves the ~ of '~/my users.csv'
    with _standard(sys.stdin, "rb") if file == "-" else open(name, "rb") as source:
        headers = {"Content-Type": media} | _token_headers(url)
        parts = iter(lambda: source.read(PART), b"")
        length = None if file == "-" else os.path.getsize(name) // PART + 1
        with _progress(parts, length) as content, _http() as http:
            answer = http.post(f"{url}/users/import", content=content, headers=headers)
    if answer.status_code != 200:
        return _refused(answer)
    print(answer.text)
    return 0


def _standard(stream: TextIO | None, mode: Literal["rb", "wb"]) -> BinaryIO:
    """Standard input or output as bytes, in a file of its own: what it can't write is not tried again at the exit."""
    if stream is None:
        raise click.ClickException(f"Standard {'input' if mode == 'rb' else 'output'} is closed.")
    return open(stream.fileno(), mode, closefd=False)


def _progress(parts: Iterable[Any], length: int | None = None) -> AbstractContextManager[Iterable[Any]]:
    """The same, with a bar for whoever looks at standard error."""
    hidden = not sys.stderr.isatty()
    return click.progressbar(parts, length, hidden=hidden, show_pos=length is None, file=sys.stderr)


def _http() -> httpx.Client:
    """For calls of a service: by no proxy, as `check` does it. (httpx asks none if its transport is given.)"""
    import httpx

    try:
        return httpx.Client(transport=httpx.HTTPTransport(), timeout=3600)
    except OSError as fault:  # it names no file
        raise BadSettings(f"SSL_CERT_FILE or SSL_CERT_DIR names certificates that can't be read: {fault}") from None


def _token_headers(url: str) -> dict[str, str]:
    """A token of the client that BOTFARM_CLIENT_ID and BOTFARM_CLIENT_SECRET name, where they are set."""
    client = os.environ.get("BOTFARM_CLIENT_ID", ""), os.environ.get("BOTFARM_CLIENT_SECRET", "")
    if not any(client):
        return {}
    if not all(client) or not "".join(client).isprintable():
        raise BadSettings("BOTFARM_CLIENT_ID and BOTFARM_CLIENT_SECRET: set both, to what `client add` has printed")
    with _http() as http:
        answer = http.post(f"{url}/token", data={"grant_type": "client_credentials"}, auth=client)
    if answer.status_code != 200:
        raise BadSettings(f"BOTFARM_CLIENT_ID: no token of {shown(url)}: {answer.status_code} {answer.text[:300]}")
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


def _refused(answer: httpx.Response) -> int:
    """Tell why, an error a line."""
    if '"urn:botfarm:' not in answer.text:  # a proxy's, or another service's
        print(f"{answer.status_code}: {answer.text[:200]}", file=sys.stderr)
        return 1
    problem = answer.json()
    print(f"{problem['status']} {problem['detail']}", file=sys.stderr)
    for error in problem.get("errors", []):
        print(f"line {error.get('line')}: {error.get('field') or ''}: {error['message']}", file=sys.stderr)
    return 1


@commands.command("export")
@click.option("--type", "media", type=click.Choice([NDJSON, CSV]), default=NDJSON, help="as what")
@of_service
def export_command(media: str, url: str) -> int:
    """Print all users of a service, as NDJSON or CSV."""
    headers = {"Accept": media} | _token_headers(url)
    with _http() as http, http.stream("GET", f"{url}/users/export", headers=headers) as answer:
        if answer.status_code != 200:
            answer.read()
            return _refused(answer)
        try:
            with _standard(sys.stdout, "wb") as output, _progress(answer.iter_bytes()) as parts:
                for part in parts:
                    output.write(part)
        except BrokenPipeError:
            raise click.ClickException("Standard output was closed before the end of the export.") from None
    return 0


# -- What needs neither ----------------------------------------------------------------------------------


@commands.command("keygen")
def keygen_command() -> None:
    """Print a new key for BOTFARM_KEYS or BOTFARM_SIGNING_KEYS."""
    from farm.passwords import generate_key

    print(generate_key())


@commands.command("openapi")
def openapi_command() -> None:
    """Print the OpenAPI document."""
    Settings.load()  # what is wrong with them ends a command with status 2
    print(json.dumps(pkgutil.resolve_name("botfarm:app").state.openapi(), indent=2))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: done; 1: refused; 2: bad flags or settings; 3: the service could not start."""
    hold_standard_files()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or (words[0].startswith("-") and words[0] not in HELP):
        words.insert(0, "serve")
    try:
        status = commands.main(words, standalone_mode=False) or 0
        if words[0] != "serve" and sys.stdout:
            with contextlib.suppress(BrokenPipeError):
                sys.stdout.flush()  # a full disk has not got what may be told this once
        return status
    except click.ClickException as error:
        return say(error.show, status=error.exit_code)
    except click.Abort:  # SIGINT
        return 130
    except BadSettings as error:
        return say(sys.stderr.write, f"{error}\n", status=2)
    except Exception as error:
        if (told := _foreseen(error)) is None:
            raise
        return say(sys.stderr.write, f"{told}\n", status=3 if words[0] == "serve" else 1)
    finally:
        let_go_of_output()


def hold_standard_files() -> None:
    """What was closed leads nowhere: else the next file or connection had its number, and got the log's lines."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # as the lowest number that is free
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def say(tell: Callable[..., object], *words: object, status: int) -> int:
    """Tell it on standard error, in one piece: the log writes there, too. The status counts, whoever reads that."""
    with contextlib.suppress(OSError):
        tell(*words)
    return status


def let_go_of_output() -> None:
    """Where nobody reads standard output any more, Python would end with a status of its own."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _foreseen(error: Exception) -> Exception | str | None:
    """What ends a command with a sentence; None for a bug of ours. Imported only when something has gone wrong."""
    import httpx

    from farm.addresses import SchemaError, explained
    from farm.database import DATABASE_FAULTS
    from farm.embedded import EmbeddedError
    from farm.passwords import KeyFault

    if isinstance(error, (SchemaError, KeyFault, EmbeddedError)):
        return error
    if isinstance(error, httpx.RequestError):
        url = error.request.url
        where, why = f"{url.scheme}://{url.netloc.decode()}", str(error).rstrip(".")  # without a password
        return f"{where} does not answer: {why}. Is the service there? --url names another one."
    if isinstance(error, DATABASE_FAULTS):
        return explained(error.__cause__ or error, "DATABASE_URL") or error
    return error if isinstance(error, OSError) else None
