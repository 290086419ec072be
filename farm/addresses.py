"""The database's address: a URL as PostgreSQL's own tools take it, and what it means when nobody answers there.

asyncpg sends every parameter that it does not know to the server, as a setting. So the rest of what libpq documents is
honoured here, passed over, or refused by name; a setting that the server does not know is refused by the server.
"""

from __future__ import annotations

import asyncio
import configparser
import multiprocessing
import os
import re
import socket
import ssl
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlencode, urlsplit

import asyncpg
from msgspec import Struct

from farm.settings import log

T = TypeVar("T")


class SchemaError(Exception):
    """The database can't be used as it is; the message says why, and the way out."""


class Unreachable(SchemaError):
    """The database does not serve, or not yet."""


# ---- The URL -----------------------------------------------------------------------------------------------


class Address(Struct, frozen=True):
    url: str  # as asyncpg reads it
    place: str  # hosts and ports, for messages
    seconds: float  # for a connection


PASSED_OVER = {
    *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"),
    *("channel_binding", "fallback_application_name", "gssdelegation", "load_balance_hosts"),
    *("sslcertmode", "sslcompression", "sslkeylogfile", "sslsni"),
}
# What asks for more than we can do, and what to write instead.
REFUSED = {
    "hostaddr": "write the address as the host",
    "max_protocol_version": "leave it out",
    "min_protocol_version": "leave it out",
    "oauth_client_id": "BotFarm logs in by password or certificate",
    "oauth_client_secret": "BotFarm logs in by password or certificate",
    "oauth_issuer": "BotFarm logs in by password or certificate",
    "oauth_scope": "BotFarm logs in by password or certificate",
    "replication": "leave it out",
    "require_auth": "leave it out, and let sslmode=verify-full tell who the server is",
    "requirepeer": "leave it out",
    "requiressl": "write sslmode=require",
    "scram_client_key": "write the password",
    "scram_server_key": "write the password",
    "sslcrldir": "write the file as sslcrl",
}
# Parameters of which some values mean what we do anyway: these values, and why no other.
FIXED = {
    "client_encoding": (("utf8", "utf-8", "unicode", "auto"), "BotFarm speaks UTF8"),
    "gssencmode": (("disable", "prefer"), "encrypt by TLS: sslmode=verify-full"),
    "target_session_attrs": (("any", "read-write", "primary"), "BotFarm writes, so it looks for the primary"),
}
FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
SECONDS = 5.0


@cache
def warn_once(text: str) -> None:
    """Once a start: its workers say nothing."""
    if multiprocessing.parent_process() is None:
        log.warning("%s", text)


def read_address(url: str, name: str = "DATABASE_URL") -> Address:
    """SchemaError says what can't be honoured, by the variable's name. No part of a password is told."""
    try:
        asked = _asked(url)
    except ValueError as fault:
        special = "write what is special in its password as %2F (/), %23 (#), %3F (?), %40 (@)."
        is_query = isinstance(fault, BadQuery) and "@" in url.partition("?")[0]
        raise SchemaError(f"{name} is not readable: {fault if is_query else special}") from None
    try:
        asked = _of_service(asked)
        seconds = _checked(asked)
        _find_certificates(asked)
    except ValueError as fault:
        raise SchemaError(f"{name}: {fault}.") from None
    if passed := sorted(PASSED_OVER & asked.keys()):
        warn_once(f"In the database's URL {', '.join(passed)} passed over: BotFarm's driver has nothing like it.")
    kept = {key: value for key, value in asked.items() if key not in PASSED_OVER}
    host, port = asked.get("host") or os.environ.get("PGHOST") or "its local socket", asked.get("port")
    is_pair = port and not re.search("[/, ]", host)  # not several hosts, nor a socket
    place = f"{host}:{port}" if is_pair else f"{host}, port {port or os.environ.get('PGPORT') or 5432}"
    return Address(f"postgresql://?{urlencode(kept, quote_via=quote)}", place, seconds)


class BadQuery(ValueError):
    """What follows the question mark is not readable."""


def _asked(url: str) -> dict[str, str]:
    """What the URL asks for, by libpq's names. What is asked for twice counts as it stands behind the question mark.

    (For asyncpg what stands before it would count. Google prints
    postgresql://USER:PASSWORD@localhost/DB?host=/cloudsql/INSTANCE.) ValueError where a password breaks the URL: what
    it leaves of host and port, for one, is none.
    """
    parts = urlsplit(url)
    login, _, hosts = parts.netloc.rpartition("@")
    places = [re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::(\d*))?", host) for host in hosts.split(",")]
    if not all(places) or "@" in login + parts.path or parts.fragment or "%00" in url:
        raise ValueError
    pairs = [part.partition("=") for part in parts.query.split("&") if part]
    if not all(sign and re.fullmatch(r"[\w.]+", key) for key, sign, _ in pairs):
        raise BadQuery("what follows its ? are not words with values, as in sslmode=require&connect_timeout=10.")
    user, _, password = login.partition(":")
    names, ports = zip(*(place.groups() for place in places if place), strict=True)
    before = {"user": user, "password": password, "host": ",".join(names), "dbname": parts.path[1:]}
    if any(ports):
        before["port"] = ",".join(port or "5432" for port in ports)
    behind = {"dbname" if key == "database" else key: value for key, _, value in pairs}
    return {key: unquote(value) for key, value in (before | behind).items() if value}


def _of_service(asked: dict[str, str]) -> dict[str, str]:
    """With what the connection service file says under the name of `service`. ValueError without that."""
    file = asked.pop("servicefile", "") or os.environ.get("PGSERVICEFILE") or os.path.expanduser("~/.pg_service.conf")
    if not (service := asked.pop("service", None)):
        return asked
    known = configparser.ConfigParser(interpolation=None)
    try:
        known.read(file)
        return dict(known[service]) | asked
    except (KeyError, configparser.Error):
        raise ValueError(f"service={service} is not found in {file}: PGSERVICEFILE names another file") from None


def _checked(asked: dict[str, str]) -> float:
    """Take out what is ours to honour; the seconds for a connection. ValueError names what can't be honoured."""
    if asked.pop("ssl", "") == "true":  # as JDBC writes it, and libpq takes it
        asked.setdefault("sslmode", "require")
    for key, (values, reason) in FIXED.items():
        if (value := asked.pop(key, values[0])).lower() not in values:
            raise ValueError(f"{key}={value} can't be honoured: {reason}")
    for key in sorted(REFUSED.keys() & asked.keys()):
        raise ValueError(f"{key} can't be honoured: {REFUSED[key]}")
    if "options" in asked:  # as urllib.parse.urlencode writes a space
        asked["options"] = asked["options"].replace("-c+", "-c ")
    for key in ("connect_timeout", "port"):
        if not re.fullmatch(r"[\d,]*" if key == "port" else r"-?\d+|", value := asked.get(key, "")):
            raise ValueError(f"{key}={value} is no whole number")
    seconds = int(asked.pop("connect_timeout", "") or 0)
    return float(seconds) if seconds > 0 else SECONDS


def _find_certificates(asked: dict[str, str]) -> None:
    """Whether each file is there: of one that is not, the driver names neither the file nor the parameter."""
    if asked.get("sslrootcert") == "system":
        if (mode := asked.setdefault("sslmode", "verify-full")) != "verify-full":
            raise ValueError(f"sslrootcert=system goes with sslmode=verify-full, not with sslmode={mode}")
        asked["sslrootcert"] = _system_certificates()
    for key in FILES:
        if path := asked.get(key) or os.environ.get(f"PG{key.upper()}"):
            try:
                open(path, "rb").close()
            except OSError as fault:
                raise ValueError(f"the certificate file {key}={path} can't be read: {fault.strerror}") from None


def _system_certificates() -> str:
    """One file for both drivers: the one of migrations brings an OpenSSL that looks for them elsewhere."""
    paths = ssl.get_default_verify_paths()
    for file in (paths.cafile, "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"):
        if file and Path(file).is_file():
            return file
    raise ValueError("sslrootcert=system: no file has this system's certificates; name one by SSL_CERT_FILE")


# ---- A connection ------------------------------------------------------------------------------------------


# What is raised, of exactly these types, for a host or a port that is none, and for options that are none.
NOT_UNDERSTOOD = (ValueError, IndexError, OverflowError, asyncpg.PostgresSyntaxError)


async def connect(url: str, name: str = "DATABASE_URL", **options: Any) -> asyncpg.Connection:
    """To the server that takes writes."""
    address = read_address(url, name)
    options |= {"timeout": address.seconds, "target_session_attrs": "read-write"}
    try:
        return await asyncpg.connect(address.url, **options)
    except Exception as fault:
        if type(fault) not in NOT_UNDERSTOOD:
            raise
        text = str(fault.args[0]).rstrip(".")
        way_out = "Check its host, its port, and its options: ?options=-c%20search_path%3DNAME."
        raise SchemaError(f"{name} is not understood: {address.place}: {text}. {way_out}") from None


def run_apart(work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end, also from within an event loop. A signal whose handler raises ends the wait at once.

    In a thread of its own: raised within asyncio, such an exception let its loop spin for ever in 5 of 700 starts.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(asyncio.run(work))
        except BaseException as fault:
            outcome.set_exception(fault)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result()


# ---- What goes wrong there ---------------------------------------------------------------------------------

EMPTY = "Give BotFarm an empty database, or a schema of its own: ?options=-c%20search_path%3DNAME in DATABASE_URL."
RIGHTS = (
    "Let the schema's owner run `python botfarm.py migrate` and grant what docs/operating.md lists under Two roles, "
    "or let this user own the schema."
)
ROOM = "Make room there, then start again."
# By SQLSTATE or by its beginning: what it means, and the way out. Anything else is a bug of ours.
TOLD: Mapping[str, tuple[str, str]] = {
    "28": ("The database refuses the login", "Check user and password in DATABASE_URL, the server's pg_hba.conf, and "
           "whether it wants TLS (sslmode=require)."),
    "3D": ("There is no such database", "Create it, or name another one in DATABASE_URL."),
    "3F": ("There is no such schema", "Create it (create schema NAME), or name another one as search_path."),
    "42501": ("The database's user lacks a right", RIGHTS),
    "42P07": ("Something of somebody else is in the way", EMPTY),
    "42710": ("Something of somebody else is in the way", EMPTY),
    "42809": ("Something of somebody else is in the way", EMPTY),
    "42P01": ("The schema is not whole", EMPTY),
    "42703": ("The schema is not ours, or not whole", EMPTY),
    "42704": ("The database does not know a parameter of DATABASE_URL", "Leave it out."),
    "22023": ("The database does not take a parameter of DATABASE_URL", "Leave it out."),
    "55P02": ("The database does not take a parameter of DATABASE_URL", "Leave it out."),
    "25006": ("The database takes no writes", "Name the primary in DATABASE_URL."),
    "53": ("The database is short of something", ROOM),
    "58": ("The database's disk or system fails", ROOM),
}  # fmt: skip
WAITED_FOR = ("08", "53300", "57")  # what may pass by itself


def explained(fault: BaseException, place: str) -> SchemaError | None:
    """A fault of connecting or migrating in words, of either driver; None where it is a bug of ours."""
    state = getattr(fault, "sqlstate", None) or ""
    text = str(fault.args[0] if fault.args else "").partition("\n")[0]
    if "unsupported startup parameter" in text:  # as PgBouncer says it, with the SQLSTATE of much else
        return SchemaError(
            f"The pooler at {place} passes no such setting on: {text}. Set it for the user instead, as in "
            "`alter role NAME set search_path = NAME`, or give a DATABASE_URL without the pooler."
        )
    if state.startswith(WAITED_FOR):
        return Unreachable(f"The database cannot be reached: {place}: {type(fault).__name__}: {text}")
    for beginning in (state, state[:2]):
        if told := TOLD.get(beginning):
            return SchemaError(f"{told[0]}: {text}. {told[1]}")
    return None if state else _explained_by_kind(fault, place, text)


def _explained_by_kind(fault: BaseException, place: str, text: str) -> SchemaError | None:
    """What no server has told."""
    match fault:
        case asyncpg.TargetServerAttributeNotMatched():
            return Unreachable(f"The database cannot be reached: {place} takes no writes. Name the primary.")
        case ssl.SSLCertVerificationError():
            is_of_another = "mismatch" in fault.verify_message
            way = "Write a host that it names" if is_of_another else "Name its authority's by sslrootcert=FILE"
            told = fault.verify_message.rstrip(".")
            return SchemaError(
                f"The certificate of the database at {place} is not accepted: {told}. {way} in DATABASE_URL."
            )
        case ssl.SSLError():
            return SchemaError(f"TLS with {place} fails: {text or fault}. Check the certificates in DATABASE_URL.")
        case ConnectionError() if "rejected SSL" in text:
            return SchemaError(f"The database at {place} speaks no TLS: set it up there, or write sslmode=disable.")
        case socket.gaierror():
            return Unreachable(f"The database cannot be reached: no such host: {place}: {fault.strerror}")
        case TimeoutError():
            return Unreachable(f"The database cannot be reached: {place} does not answer in time.")
        case OSError():
            return Unreachable(f"The database cannot be reached: {type(fault).__name__}: {place}: {fault}")
        case asyncpg.ClientConfigurationError() if "certificate" in text:
            return SchemaError(f"DATABASE_URL: {text}. Name it by sslrootcert=FILE, or write sslrootcert=system.")
        case asyncpg.ClientConfigurationError():
            return SchemaError(f"DATABASE_URL: {text}.")
        case UnicodeError():
            return SchemaError("DATABASE_URL: its host is no name of a host.")
        case asyncpg.InterfaceError() | asyncpg.InternalClientError():
            return SchemaError(f"The database at {place} is not understood: {text}. Is it a PostgreSQL?")
    return None
