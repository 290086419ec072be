"""How passwords are kept: sealed under keys (AES-256-GCM), so that a lock can tell them, or without keys as hashes.

Sessions and the secrets of one-time codes are sealed as they are, or not kept at all. What is sealed opens only for the
user that it belongs to, and only as what it is. The database remembers a proof of each key, so that a wrong
or a missing one is found at the start.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import os
import secrets
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import argon2
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from farm import embedded
from farm.database import SQL, Connections, open_pool
from farm.problems import NotSealed, Overloaded
from farm.settings import Secret, Settings, parse_keys, read_text

# ---- Keys --------------------------------------------------------------------------------------------------

SEALED = "$aes-256-gcm$"
Kind = Literal["password", "session", "totp"]


class KeyFault(Exception):
    """A sealing key is missing or wrong."""


class Keyring:
    """The sealing keys: the first seals, all unseal.

    Sealed is nonce + ciphertext + tag. The nonce is random (96 bits, NIST SP 800-38D), and the user's id and the kind
    are associated data, so a secret that is moved to another user, or to another kind's place, does not open. A
    password reads $aes-256-gcm$KEY-ID$base64(sealed).
    """

    def __init__(self, keys: str) -> None:
        """The keys as BOTFARM_KEYS has them."""
        self._ciphers = {key_id: AESGCM(key) for key_id, key in parse_keys(keys).items()}
        self.ids = list(self._ciphers)
        self.first = self.ids[0]

    def seal_as(self, kind: Kind, owner: uuid.UUID, clear: bytes, key_id: str | None = None) -> bytes:
        nonce = os.urandom(12)
        return nonce + self._ciphers[key_id or self.first].encrypt(nonce, clear, _bound_to(kind, owner))

    def open_as(self, kind: Kind, owner: uuid.UUID, key_id: str, sealed: bytes) -> bytes:
        """KeyFault when the key is not there, or is another one, or this is another user's or of another kind."""
        try:
            return self._ciphers[key_id].decrypt(sealed[:12], sealed[12:], _bound_to(kind, owner))
        except KeyError:
            raise KeyFault(f"No key {key_id!r} in BOTFARM_KEYS, but a {kind} is sealed with it.") from None
        except InvalidTag:
            raise KeyFault(f"The key {key_id!r} does not open a {kind} that was sealed under that id.") from None

    def seal(self, owner: uuid.UUID, clear: str, key_id: str | None = None) -> str:
        sealed = self.seal_as("password", owner, clear.encode(), key_id)
        return f"{SEALED}{key_id or self.first}${base64.b64encode(sealed).decode()}"

    def open(self, owner: uuid.UUID, secret: str) -> str:
        """The password. KeyFault as of `open_as`."""
        key_id, _, text = secret.removeprefix(SEALED).partition("$")
        return self.open_as("password", owner, key_id, base64.b64decode(text)).decode()


def _bound_to(kind: Kind, owner: uuid.UUID) -> bytes:
    """The associated data. Passwords were there before the other kinds."""
    return owner.bytes + (b"" if kind == "password" else kind.encode())


def generate_key() -> str:
    """A new key as BOTFARM_KEYS and BOTFARM_SIGNING_KEYS take it."""
    return f"k{secrets.token_hex(3)}:{base64.b64encode(secrets.token_bytes(32)).decode()}"


# ---- Passwords ---------------------------------------------------------------------------------------------

# OWASP's minimum (19 MiB, t=2, p=1; 15 ms): always in a thread of a small pool, so that hashing never stalls an
# acquire and never takes more than 38 MiB.
HASHER = argon2.PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1)


def matches(stored: str, clear: str) -> bool:
    """Whether an Argon2id hash is that of a text. Takes 15 ms."""
    try:
        return HASHER.verify(stored, clear)
    except argon2.exceptions.VerifyMismatchError:
        return False


R = TypeVar("R")


class Passwords:
    """How this deployment stores passwords."""

    CROWD = 100  # so many may wait for a hash, the last of them for a second
    THREADS = 2

    def __init__(self, keyring: Keyring | None) -> None:
        self.keyring = keyring
        self._threads = ThreadPoolExecutor(self.THREADS, thread_name_prefix="argon2")
        self._waiting = 0

    async def store(self, owner: uuid.UUID, clear: str, patient: bool = False) -> str:
        """What to keep of a password. Overloaded where too many wait for a hash; who is patient waits, too."""
        if self.keyring:
            return self.keyring.seal(owner, clear)
        return await self.in_thread(HASHER.hash, clear, patient=patient)

    async def verify(self, owner: uuid.UUID, secret: str, clear: str, patient: bool = False) -> bool:
        if secret.startswith(SEALED):
            return hmac.compare_digest(self._open(owner, secret).encode(), clear.encode())
        return await self.in_thread(matches, secret, clear, patient=patient)

    async def in_thread(self, work: Callable[..., R], *texts: str, patient: bool = False) -> R:
        if self._waiting >= self.CROWD and not patient:
            raise Overloaded(f"{self._waiting} calls wait for a hash already; try again in a moment.")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *texts)
        finally:
            self._waiting -= 1

    def reveal(self, owner: uuid.UUID, secret: str) -> str | None:
        """The clear password for the reply that grants a lock; None where only a hash is stored."""
        return self._open(owner, secret) if secret.startswith(SEALED) else None

    def sealing(self) -> Keyring:
        """What seals all that is not kept as a hash. NotSealed where there are no keys."""
        if not self.keyring:
            raise NotSealed
        return self.keyring

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _open(self, owner: uuid.UUID, secret: str) -> str:
        if not self.keyring:
            raise KeyFault("Passwords are sealed, but BOTFARM_KEYS is not set.")
        return self.keyring.open(owner, secret)


# ---- Keys and the database ---------------------------------------------------------------------------------

PROOF_OWNER = uuid.UUID(int=0)
EXTRAS = 50  # sessions and secrets of codes that are sealed anew at once; a session may have 256 KiB


async def _prove(pool: Connections, keyring: Keyring, key_id: str) -> None:
    """Whether the key opens what was sealed when the database saw its id for the first time."""
    stored = await pool.fetchval(SQL["prove_key"], key_id, keyring.seal(PROOF_OWNER, "BotFarm", key_id))
    try:
        keyring.open(PROOF_OWNER, stored)
    except KeyFault:
        raise KeyFault(
            f"BOTFARM_KEYS: the key {key_id!r} is not the one that this database was used with under that id. "
            "Set the right key, or give a new key another id."
        ) from None


async def check_keys(pool: Connections, keyring: Keyring | None) -> None:
    """Find a wrong or a missing key now and not at the first lock. KeyFault says which and what to do."""
    known = keyring.ids if keyring else []
    if keyring:
        for key_id in known:
            await _prove(pool, keyring, key_id)
    for key_id in [row["id"] for row in await pool.fetch(SQL["list_proofs"]) if row["id"] not in known]:
        if not await pool.fetchval(SQL["forget_proof"], key_id, f"{SEALED}{key_id}$"):
            raise KeyFault(
                f"BOTFARM_KEYS: the key {key_id!r} is missing, but secrets are sealed with it. Add it (after the first "
                "key), and run `python botfarm.py reseal` before you take it out."
            )


async def reseal(pool: Connections, keyring: Keyring) -> AsyncIterator[int]:
    """Seal everything under the first key, some of it at a time. Safe to stop and to start again at any time.

    Tells how many are done so far.
    """
    total, last = 0, uuid.UUID(int=0)
    prefix = f"{SEALED}{keyring.first}$"
    while rows := await pool.fetch(SQL["list_sealed"], last, SEALED, prefix, 500):
        ids = [row["id"] for row in rows]
        old = [row["secret"] for row in rows]
        new = [keyring.seal(row["id"], keyring.open(row["id"], row["secret"])) for row in rows]
        total += len(await pool.fetch(SQL["reseal_users"], ids, old, new))
        last = ids[-1]
        yield total
    place = uuid.UUID(int=0), ""
    while rows := await pool.fetch(SQL["list_sealed_extras"], *place, keyring.first, EXTRAS):
        kinds, ids, old = ([row[name] for row in rows] for name in ("kind", "user_id", "sealed"))
        clear = (keyring.open_as(row["kind"], row["user_id"], row["key_id"], row["sealed"]) for row in rows)
        new = [keyring.seal_as(kind, id, text) for kind, id, text in zip(kinds, ids, clear, strict=True)]
        total += len(await pool.fetch(SQL["reseal_extras"], kinds, ids, old, new, keyring.first))
        place = ids[-1], kinds[-1]
        yield total


def load_keys(settings: Settings) -> Secret | None:
    """The keys of the settings; with an embedded database else a key of its own, made at the first start."""
    if settings.keys or settings.database_url:
        return settings.keys
    file = embedded.settle_home(settings.home) / "keys"
    if not file.exists():
        file.with_suffix(".new").unlink(missing_ok=True)
        # The folder may belong to the user that PostgreSQL runs as: follow no link that stands there.
        handle = os.open(file.with_suffix(".new"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as new:
            new.write(generate_key() + "\n")
            new.flush()
            os.fsync(new.fileno())
        embedded.rename_for_good(file.with_suffix(".new"), file)
    try:
        text = read_text(file)
        parse_keys(text)
    except ValueError as fault:
        raise KeyFault(
            f"{file}: {fault}. Passwords are sealed with what stood there: put it back from a backup. Where none is "
            "stored yet, take the file away, and the next start makes a new one."
        ) from None
    return Secret(text)


def keyring_of(keys: Secret | None) -> Keyring | None:
    return Keyring(keys.reveal()) if keys else None


async def proven_keys(settings: Settings, url: str) -> Secret | None:
    """Those that the database's passwords are sealed with. KeyFault where they are not."""
    keys = load_keys(settings)
    async with open_pool(url, 1, "force_custom_plan", 60, settings.pooler) as pool:
        await check_keys(pool, keyring_of(keys))
    return keys
