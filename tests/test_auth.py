"""Authentication: tokens, scopes, limits to projects, whose a lock is, rotation and removal."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote_plus

import argon2
import asyncpg
import httpx
import hypothesis
import jwt
import pytest
from conftest import (
    ROOT,
    acquire,
    client,
    command,
    examples,
    execute,
    free_port,
    fresh_database,
    make_users,
    pass_time,
    process,
    serving,
    settings,
    slug,
    wait_ready,
)
from hypothesis import strategies as st

import farm.clients
import farm.database
import farm.locks
import farm.migrations
import farm.passwords
import farm.problems
import farm.settings
import farm.telemetry
import farm.waiting
import farm.words

SIGNING = "s1:" + "B" * 43 + "="
OTHER = "s2:" + "C" * 43 + "="
ALL = "users:write locks"
SECURITY = (ROOT / "docs/security.md").read_text()
GRANT = {"grant_type": "client_credentials"}


@pytest.fixture(scope="module")
def secured(server):
    """A service with authentication on, and its `database`."""
    with fresh_database(server) as url, serving(secure(url)) as running:
        running.database = url
        yield running


def secure(url, keys=SIGNING, **changes):
    return settings(url, auth="on", signing_keys=farm.settings.Secret(keys), **changes)


# As farm.passwords.HASHER hashes, but a thousand times cheaper to make and to compare.
QUICK = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


async def add_client(url, scope, projects=None, hasher=QUICK):
    """As `client add` does, but quicker: its id and its secret."""
    secret = secrets.token_urlsafe(32)
    row = (uuid.uuid4(), uuid.uuid4().hex, hasher.hash(secret), scope.split(), projects)
    connection = await asyncpg.connect(url)
    try:
        await connection.fetch(farm.database.SQL["add_client"], *row)
    finally:
        await connection.close()
    return SimpleNamespace(id=str(row[0]), name=row[1], secret=secret)


async def ask(api, who, secret=None, **form):
    return await api.post("/token", data=GRANT | form, auth=(who.id, secret or who.secret))


@asynccontextmanager
async def caller(service, scope, projects=None):
    """An HTTP client that sends a token of a client of its own, `who`."""
    async with client(service.url) as api:
        who = await add_client(service.database, scope, projects)
        answer = await ask(api, who)
        assert answer.status_code == 200, answer.text
        api.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
        api.who = who
        yield api


def forge(who, key=SIGNING, **changes):
    """A token as the service would give it, but for the changes; a claim that is None is left out."""
    name, _, text = key.partition(":")
    now = int(time.time())
    claims = {"iss": "botfarm", "aud": "botfarm", "sub": who.id, "iat": now, "exp": now + 60, "jti": "1", "scope": ALL}
    claims = {name: value for name, value in (claims | changes).items() if value is not None}
    return jwt.encode(claims, base64.b64decode(text), "HS256", headers={"kid": name})


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


# ---- POST /token ------------------------------------------------------------------------------------------


async def test_a_token_is_given_for_the_secret_by_basic_or_by_form(secured):
    who = await add_client(secured.database, "users:read locks")
    async with client(secured.url) as api:
        by_form = {"client_id": who.id, "client_secret": who.secret}
        basic = base64.b64encode(f"{quote_plus(who.id)}:{quote_plus(who.secret)}".encode()).decode()
        for answer in (
            await api.post("/token", data=GRANT, auth=(who.id, who.secret)),
            await api.post("/token", data=GRANT | by_form),
            await api.post("/token", data=GRANT | {"client_id": who.id}, headers={"Authorization": f"basic {basic}"}),
            await api.post("/token", data=GRANT | {"scope": "", "audience": "unknown"}, auth=(who.id, who.secret)),
        ):
            assert answer.status_code == 200, answer.text
            assert answer.headers["cache-control"] == "no-store"
            told = answer.json()
            token = told.pop("access_token")
            assert told == {"token_type": "Bearer", "expires_in": 600, "scope": "users:read locks"}
            claims = jwt.decode(token, options={"verify_signature": False})
            assert claims.keys() == {"iss", "aud", "sub", "iat", "exp", "jti", "scope"}
            assert (claims["sub"], claims["exp"] - claims["iat"]) == (who.id, 600)
            assert (await api.get("/users", headers=bearer(token))).status_code == 200


async def test_a_token_may_be_asked_for_with_fewer_scopes(secured):
    async with client(secured.url) as api:
        who = await add_client(secured.database, "admin")
        answer = await ask(api, who, scope="users:read")
        assert answer.json()["scope"] == "users:read"
        headers = bearer(answer.json()["access_token"])
        assert (await api.get("/users", headers=headers)).status_code == 200
        assert slug(await api.post("/locks", json={}, headers=headers)) == "forbidden"


@pytest.mark.parametrize(
    ("form", "error"),
    [
        ({}, "invalid_request"),
        ({"grant_type": "password", "username": "u", "password": "p"}, "unsupported_grant_type"),
        ({"grant_type": "authorization_code"}, "unsupported_grant_type"),
        (GRANT | {"scope": "users:write"}, "invalid_scope"),
        (GRANT | {"scope": "admin"}, "invalid_scope"),
        (GRANT | {"scope": 'users:read nonsense\u00e9"'}, "invalid_scope"),
        (GRANT | {"client_secret": "x"}, "invalid_request"),
        (GRANT | {"client_id": "x"}, "invalid_request"),
        (GRANT | {"scope": ["users:read", "locks"]}, "invalid_request"),
    ],
)
async def test_a_bad_request_is_told_as_the_rfc_says(secured, form, error):
    async with client(secured.url) as api:
        who = await add_client(secured.database, "users:read locks")
        answer = await api.post("/token", data=form, auth=(who.id, who.secret))
        assert (answer.status_code, answer.json().keys()) == (400, {"error", "error_description"})
        assert answer.json()["error"] == error
        assert re.fullmatch(r"[\x20-\x21\x23-\x5b\x5d-\x7e]+", answer.json()["error_description"])
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-type"] == "application/json"


async def test_only_a_form_in_the_body_is_read(secured):
    async with client(secured.url) as api:
        who = await add_client(secured.database, "locks")
        sent = (who.id, who.secret)
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        for answer in (
            await api.post("/token", json=GRANT, auth=sent),
            await api.post("/token?grant_type=client_credentials", data=GRANT, auth=sent),
            await api.post("/token", content=b"grant_type=%ff", headers=form, auth=sent),
            await api.post("/token", content=b"a" * 20_000, headers=form, auth=sent),
            await api.post("/token", content=b"&".join([b"a=b"] * 200), headers=form, auth=sent),
        ):
            assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
        assert slug(await api.get("/token")) == "method-not-allowed"


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (b"scope=%ff", "The body is not application/x-www-form-urlencoded in UTF-8."),
        ("scope=é".encode(), "The body is not application/x-www-form-urlencoded in UTF-8."),
        (b"&".join([b"a=b"] * 101), "The form has over 100 parameters."),
        (b"&".join([b"a=b"] * 100), "A parameter is there twice."),
    ],
)
def test_a_form_that_is_not_read_is_told_why(form, why):
    with pytest.raises(farm.problems.TokenRefusal) as refused:
        farm.clients.read_form(farm.clients.FORM, form)
    assert str(refused.value) == why


async def test_an_unknown_client_and_a_wrong_secret_are_told_alike_and_take_as_long(secured, monkeypatch):
    compared = []
    monkeypatch.setattr(farm.clients, "matches", lambda stored, secret: compared.append(stored))
    who = await add_client(secured.database, "locks")
    rotated = await add_client(secured.database, "locks")
    await execute(
        secured.database,
        "update clients set previous_hash = secret_hash, previous_until = now() + interval '1 hour' "
        f"where id = '{rotated.id}'",
        "select",
    )
    answers = []
    async with client(secured.url) as api:
        for id in (who.id, rotated.id, str(uuid.uuid4()), "nobody", ""):
            before = len(compared)
            answers.append(await api.post("/token", data=GRANT, auth=(id, "wrong")))
            assert len(compared) - before == 2
            assert all(stored.startswith("$argon2id$") for stored in compared)
        answers.append(await api.post("/token", data=GRANT, headers={"Authorization": "Basic %"}))
        answers.append(await api.post("/token", data=GRANT, headers=bearer("x")))
        answers.append(await api.post("/token", data=GRANT))
    assert {(answer.status_code, answer.json()["error"]) for answer in answers} == {(401, "invalid_client")}
    assert {answer.headers["www-authenticate"] for answer in answers} == {'Basic realm="botfarm"'}
    assert len({answer.text for answer in answers[:5]}) == 1


async def test_wrong_secrets_are_limited_to_ten_a_minute_over_two_services(secured):
    with serving(secure(secured.database)) as second:
        async with client(secured.url) as one, client(second.url) as other:
            who = await add_client(secured.database, "locks")
            answers = await asyncio.gather(*(ask(api, who, "wrong") for api in (one, other) for _ in range(15)))
            assert sorted(answer.status_code for answer in answers) == [401] * 10 + [429] * 20
            for api in (one, other):  # not even the right one is checked now
                refused = await ask(api, who)
                assert refused.status_code == 429
                assert refused.json().keys() == {"error", "error_description"}
                assert "of this client at this address" in refused.json()["error_description"]
                assert 1 <= int(refused.headers["retry-after"]) <= 60
            spelled = SimpleNamespace(id=who.id.upper(), secret=who.secret)
            assert (await ask(one, spelled)).status_code == 429
            someone_else = await add_client(secured.database, "locks")
            assert (await ask(one, someone_else)).status_code == 200
            await execute(secured.database, "update token_requests set since = since - interval '1 minute'", "select")
            assert (await ask(other, who)).status_code == 200


async def test_failures_under_ever_new_names_are_limited_by_address(secured, monkeypatch):
    monkeypatch.setattr(farm.clients.Gate, "STRAY_FAILURES", 6)
    await execute(secured.database, "delete from token_requests", "select")
    async with client(secured.url) as api:
        strangers = [SimpleNamespace(id=str(uuid.uuid4()), secret="guess") for _ in range(10)]
        answers = [await ask(api, who) for who in strangers]
    assert [answer.status_code for answer in answers] == [401] * 6 + [429] * 4
    told = answers[-1].json()["error_description"]
    assert re.fullmatch(r"Too many failures at this address, of any client; try again in \d+ seconds\.", told)
    await execute(secured.database, "delete from token_requests", "select")


OTHERS = ["192.0.2.1", "::ffff:192.0.2.1", "", "unix"]


def test_addresses_of_one_customer_count_as_one():
    assert farm.clients._network("2001:db8::1") == farm.clients._network("2001:db8::ffff:1") == "2001:db8::/64"
    assert [farm.clients._network(text) for text in OTHERS] == OTHERS


async def test_one_token_in_many_spellings_is_kept_once(secured):
    who = await add_client(secured.database, "locks users:read")
    async with client(secured.url) as api:
        token = (await ask(api, who)).json()["access_token"]
        for spelled in (f"Bearer  {token}", f"Bearer {token} x", f"Bearer {token}" + " " * 3000 + "x"):
            answer = await api.get("/users", headers={"Authorization": spelled})
            assert (answer.status_code, slug(answer)) == (401, "unauthenticated")


async def test_all_requests_are_limited_too_and_checked_for_that_first(secured, monkeypatch):
    monkeypatch.setattr(farm.clients.Gate, "REQUESTS", 5)
    async with client(secured.url) as api:
        who = await add_client(secured.database, "locks")
        answers = await asyncio.gather(*(ask(api, who) for _ in range(8)))
        assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 3
        monkeypatch.setattr(farm.clients, "matches", lambda *_: pytest.fail("checked a secret after the limit"))
        assert (await ask(api, who)).status_code == 429
    await execute(secured.database, "update token_requests set since = since - interval '2 minutes'", "select")
    await execute(secured.database, farm.database.SQL["prune_token_requests"], "select")
    assert not await execute(secured.database, "select from token_requests")


async def test_too_many_secrets_at_once_are_refused_and_do_not_stop_calls(secured, monkeypatch):
    monkeypatch.setattr(farm.passwords.Passwords, "CROWD", 2)
    async with caller(secured, "locks") as api:
        slow = farm.passwords.HASHER
        clients = [await add_client(secured.database, "locks", hasher=slow) for _ in range(20)]
        asked = asyncio.gather(*(ask(api, who) for who in clients))
        assert (await api.get(f"/locks/{uuid.uuid4()}")).status_code == 404
        answers = await asked
    statuses = {answer.status_code for answer in answers}
    assert statuses == {200, 503}
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert (refused.json()["error"], refused.headers["retry-after"]) == ("temporarily_unavailable", "1")


async def test_without_authentication_there_is_no_token(api):
    assert slug(await api.post("/token", data=GRANT)) == "not-found"
    document = (await api.get("/docs/openapi.json")).json()
    assert "/token" not in document["paths"]
    assert "securitySchemes" not in document["components"]
    assert "401" not in json.dumps(document["paths"])


# ---- Tokens -----------------------------------------------------------------------------------------------


async def test_a_call_without_a_token_is_told_how_to_get_one(secured):
    async with client(secured.url) as api:
        for headers in ({}, {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer"}):
            answer = await api.get("/users", headers=headers)
            assert slug(answer) == "unauthenticated"
        answer = await api.get("/users")
        assert answer.headers["www-authenticate"] == 'Bearer realm="botfarm"'
        assert "/token" in answer.json()["detail"]
        for path in ("/", "/livez", "/readyz", "/metrics", "/docs", "/docs/openapi.json"):
            assert (await api.get(path)).status_code == 200


async def test_a_token_that_is_not_right_is_refused(secured):
    who = await add_client(secured.database, ALL)
    good = forge(who)
    head, body, signature = good.split(".")
    none = base64.urlsafe_b64encode(b'{"alg":"none","kid":"s1"}').rstrip(b"=").decode()
    wider = base64.urlsafe_b64encode(base64.urlsafe_b64decode(body + "==").replace(b"locks", b"admin")).rstrip(b"=")
    past = int(time.time()) - 60
    bad = {
        "expired": forge(who, iat=past - 600, exp=past),
        "not yet": forge(who, iat=int(time.time()) + 600),
        "for another": forge(who, aud="other"),
        "for nobody": forge(who, aud=None),
        "of another": forge(who, iss="other"),
        "without an end": forge(who, exp=None),
        "without an id": forge(who, jti=None),
        "without scope": forge(who, scope=None),
        "whose is it": forge(SimpleNamespace(id="x")),
        "no client": forge(SimpleNamespace(id=str(uuid.uuid4()))),
        "unsigned": f"{none}.{body}.",
        "unsigned with a signature": f"{none}.{body}.{signature}",
        "another key": forge(who, "s1:" + "D" * 43 + "="),
        "an unknown key": forge(who, OTHER),
        "changed": f"{head}.{wider.decode()}.{signature}",
        "cut": good[:-4],
        "another algorithm": jwt.encode(
            {"sub": who.id}, base64.b64decode(SIGNING[3:]) * 2, "HS512", headers={"kid": "s1"}
        ),
        "garbage": "x",
    }
    async with client(secured.url) as api:
        assert (await api.get("/users", headers=bearer(good))).status_code == 200
        for what, token in bad.items():
            for _ in range(2):  # also the second time
                answer = await api.get("/users", headers=bearer(token))
                assert slug(answer) == "unauthenticated", what
                assert 'error="invalid_token"' in answer.headers["www-authenticate"], what
                assert token not in answer.text, what


async def test_a_token_ends_though_its_claims_are_kept(secured, monkeypatch):
    who = await add_client(secured.database, ALL)
    monkeypatch.setattr(farm.clients.Gate, "LEEWAY", 0)
    token = forge(who, exp=math.ceil(time.time() + 1.5))
    async with client(secured.url) as api:
        assert (await api.get("/users", headers=bearer(token))).status_code == 200
        for _ in range(100):
            if (answer := await api.get("/users", headers=bearer(token))).status_code == 401:
                break
            await asyncio.sleep(0.05)
        assert "expired" in answer.json()["detail"]


async def test_a_checked_token_is_checked_no_more_for_a_while(secured, monkeypatch):
    async with caller(secured, ALL) as api:
        assert (await api.get("/users")).status_code == 200
        monkeypatch.setattr(jwt, "decode", lambda *_, **__: pytest.fail("checked again"))
        assert (await api.get("/users")).status_code == 200
        monkeypatch.undo()
        kept = secured.farm.gate._checked
        for _ in range(10):
            headers = bearer(forge(api.who, jti=uuid.uuid4().hex))
            assert (await api.get("/users", headers=headers)).status_code == 200
        assert 10 <= len(kept) <= kept.maxsize == farm.clients.Gate.MOST


async def test_signing_keys_are_rotated_without_a_gap(empty_database):
    """The new key is made known, then it signs, then the old one goes."""
    url = empty_database
    with ExitStack() as stack:
        old = stack.enter_context(serving(secure(url, f"{SIGNING},{OTHER}")))
        new = stack.enter_context(serving(secure(url, f"{OTHER},{SIGNING}")))
        last = stack.enter_context(serving(secure(url, OTHER)))
        who = await add_client(url, ALL)
        async with client(old.url) as one, client(new.url) as two, client(last.url) as three:
            by_old = bearer((await ask(one, who)).json()["access_token"])
            by_new = bearer((await ask(two, who)).json()["access_token"])
            statuses = [[(await api.get("/users", headers=h)).status_code for api in (one, two, three)]
                        for h in (by_old, by_new)]  # fmt: skip
        assert statuses == [[200, 200, 401], [200, 200, 200]]


@pytest.fixture(scope="module")
def blocking(secured):
    with httpx.Client(base_url=secured.url, timeout=30) as opened:
        yield opened


def encoded(part):
    return base64.urlsafe_b64encode(part).rstrip(b"=")


BYTES = st.one_of(
    st.binary(max_size=60),
    st.builds(lambda *parts: b".".join(map(encoded, parts)), *[st.binary(max_size=40)] * 3),
    st.builds(lambda head: encoded(json.dumps(head).encode()) + b".e30.eA", st.dictionaries(
        st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jku", "zip"]),
        st.sampled_from(["none", "HS256", "RS256", "s1", "", None, 1, [], {}, ["b64"], True]))),
)  # fmt: skip


@hypothesis.given(st.sampled_from([b"Bearer ", b"bearer  ", b"Basic ", b"", b"Digest "]), BYTES, st.binary(max_size=80))
@hypothesis.example(b"Bearer ", encoded(b"[" * 20_000) + b".e30.eA", b"")
@hypothesis.example(b"Bearer ", encoded(b'{"a":' * 5_000) + b".e30.eA", b"")
@hypothesis.example(b"Basic ", base64.b64encode(b"\xff:\x00"), b"grant_type=client_credentials")
@hypothesis.example(b"Basic ", base64.b64encode(b"a%00%ff:b"), b"grant_type=client_credentials&scope=%00")
@hypothesis.settings(max_examples=examples(150), deadline=None)
def test_no_header_and_no_form_is_more_than_refused(secured, blocking, kind, sent, form):
    value = bytes(byte for byte in kind + sent if 32 <= byte != 127).strip()  # what a header may hold
    answer = blocking.get("/users", headers={b"Authorization": value})
    assert slug(answer) == "unauthenticated"
    assert "\n" not in answer.headers["www-authenticate"]
    media = {"Content-Type": "application/x-www-form-urlencoded"}
    told = blocking.post("/token", content=form, headers={b"Authorization": value, **media})
    assert told.status_code in (400, 401, 429)
    assert told.json().keys() == {"error", "error_description"}


# ---- Scopes -----------------------------------------------------------------------------------------------

READ = {"list_users", "get_user", "list_history", "list_pools", "get_overview", "export_users"}
WRITE = READ | {
    "create_user", "update_user", "delete_user", "verify_password", "quarantine_user", "end_quarantine",
    "import_users",
}  # fmt: skip
LOCKS = {"acquire_lock", "acquire_user", "acquire_set", "get_lock", "extend_lock", "release_lock", "release_holder"}
LOCKS |= {"put_session", "get_session", "delete_session", "give_code"}
ADMIN = WRITE | LOCKS | {"force_release"}


@pytest.mark.parametrize(
    ("scope", "allowed"),
    [
        ("users:read", READ),
        ("users:write", WRITE),
        ("locks", LOCKS),
        ("users:read locks", READ | LOCKS),
        ("admin", ADMIN),
    ],
)
async def test_each_scope_allows_what_the_contract_says(secured, scope, allowed):
    async with client(secured.url) as nobody, caller(secured, scope) as api:
        document = (await api.get("/docs/openapi.json")).json()
        seen = set()
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                name, url = operation["operationId"], path.replace("{id}", str(uuid.uuid4()))
                if not operation["security"]:
                    continue
                seen.add(name)
                assert slug(await nobody.request(method, url)) == "unauthenticated"
                assert {"401", "403"} <= operation["responses"].keys()
                answer = await api.request(method, url)
                assert (answer.status_code == 403) == (name not in allowed), name
                assert answer.status_code != 401
                if name not in allowed:
                    assert slug(answer) == "forbidden"
                    (needed,) = operation["security"][0]["oauth2"]
                    challenge = f'Bearer realm="botfarm", error="insufficient_scope", scope="{needed}"'
                    assert answer.headers["www-authenticate"] == challenge
        assert seen == ADMIN


async def test_who_may_not_call_is_refused_before_the_body_is_read(secured):
    reader, writer = await asyncio.open_connection("127.0.0.1", int(secured.url.rpartition(":")[2]))
    try:
        writer.write(b"POST /users HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        async with asyncio.timeout(5):
            assert await reader.readline() == b"HTTP/1.1 401 Unauthorized\r\n"
    finally:
        writer.close()


async def test_the_api_page_can_ask_for_a_token(secured):
    """What swagger-ui sends when Authorize is clicked, with what it reads from the document."""
    who = await add_client(secured.database, ALL)
    async with client(secured.url) as api:
        document = (await api.get("/docs/openapi.json")).json()
        flow = document["components"]["securitySchemes"]["oauth2"]["flows"]["clientCredentials"]
        assert flow["scopes"].keys() == set(farm.clients.SCOPES)
        form = {"grant_type": "client_credentials", "scope": "users:write locks"}
        answer = await api.post(
            flow["tokenUrl"], data=form, auth=(who.id, who.secret), headers={"X-Requested-With": "XMLHttpRequest"}
        )
        assert answer.json()["token_type"] == "Bearer"
        assert document["paths"]["/token"]["post"]["security"] == []
        assert document["paths"]["/livez"]["get"]["security"] == []
        refs = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
        assert refs <= document["components"]["schemas"].keys()
        env = {"BOTFARM_AUTH": "on", "BOTFARM_SIGNING_KEYS": SIGNING}
        assert json.loads(command("openapi", env=env).stdout) == document


# ---- Whose a lock is --------------------------------------------------------------------------------------


async def test_a_lock_of_another_client_is_not_held(secured, project):
    async with caller(secured, ALL) as mine, caller(secured, ALL) as other, caller(secured, "admin") as admin:
        await make_users(mine, project)
        lock = (await acquire(mine, project, holder="job")).json()
        path = f"/locks/{lock['id']}"
        unknown = (await other.get(f"/locks/{uuid.uuid4()}")).json()
        for method in ("GET", "PATCH", "DELETE"):
            answer = await other.request(method, path)
            assert slug(answer) == "lock-not-held"
            assert answer.json().keys() == unknown.keys()
        assert (await other.delete("/locks?holder=job")).json() == {"released": 0}
        assert (await mine.get(path)).json()["expires_at"] == lock["expires_at"]
        assert (await mine.patch(path, json={"ttl": 100})).json()["ttl"] == 100
        assert (await admin.get(path)).status_code == 200
        assert (await admin.patch(path, json={"ttl": 200})).json()["ttl"] == 200
        assert (await mine.delete(path)).status_code == 204
        assert (await mine.get(path)).json()["ended_by"] == "released"
        assert (await admin.get(path)).json()["ended_by"] == "released"
        assert "ended_by" not in (await other.get(path)).json()
        lock = (await acquire(mine, project)).json()
        assert (await admin.delete(f"/locks/{lock['id']}")).status_code == 204
        assert (await mine.get(f"/locks/{lock['id']}")).json()["ended_by"] == "released"


async def test_calls_of_two_clients_for_one_lock_do_not_meet_in_a_batch(secured, project):
    """They share statements: neither stands for the other there."""
    async with caller(secured, ALL) as mine, caller(secured, ALL) as other:
        await make_users(mine, project)
        for _ in range(10):
            lock = (await acquire(mine, project)).json()
            path = f"/locks/{lock['id']}"
            renewed = await asyncio.gather(*(api.patch(path, json={"ttl": 99}) for api in (other, mine, other)))
            assert [answer.status_code for answer in renewed] == [404, 200, 404]
            released = await asyncio.gather(*(api.delete(path) for api in (other, mine, other)))
            assert [answer.status_code for answer in released] == [404, 204, 404]


async def test_sessions_and_codes_are_the_holders_alone(secured, project):
    """Not even an admin's, who may else look at, renew and end that lock."""
    async with caller(secured, ALL) as mine, caller(secured, ALL) as other, caller(secured, "admin") as admin:
        await make_users(mine, project, totp="JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP")
        lock = (await acquire(mine, project)).json()
        path = f"/locks/{lock['id']}"
        assert (await mine.put(f"{path}/session", json={"sid": 1})).status_code == 204
        assert (await admin.get(path)).status_code == 200
        for api in (other, admin):
            calls = [api.put(f"{path}/session", json={"sid": 2}), api.get(f"{path}/session")]
            calls += [api.delete(f"{path}/session"), api.post(f"{path}/totp")]
            for answer in await asyncio.gather(*calls):
                assert slug(answer) == "lock-not-held"
        assert (await mine.get(f"{path}/session")).json() == {"sid": 1}
        assert (await mine.post(f"{path}/totp")).status_code == 200


async def test_the_batch_itself_keeps_clients_apart(secured, project):
    async with caller(secured, ALL) as mine, caller(secured, ALL) as other:
        await make_users(mine, project)
        lock = uuid.UUID((await acquire(mine, project)).json()["id"])
        me, them = uuid.UUID(mine.who.id), uuid.UUID(other.who.id)
        async with farm.database.open_pool(secured.database, 1, "force_generic_plan", 10) as pool:
            own_farm = farm.locks.Locks(secured.farm.settings, pool, pool, secured.farm.passwords, secured.farm.events)
            renewals = [farm.locks.Renewal(lock, 50 + n, client) for n, client in enumerate((them, me, them))]
            assert [bool(row) for row in await own_farm._extend(renewals)] == [False, True, False]
            releases = [farm.locks.Release(lock, 0, None, client) for client in (them, me, them, me)]
            assert await own_farm._release(releases) == [False, True, False, False]
            lock = uuid.UUID((await acquire(mine, project)).json()["id"])
            both = await own_farm._release([farm.locks.Release(lock, 0, None, client) for client in (me, None)])
            assert sorted(both) == [False, True]


async def test_an_expired_lock_is_told_to_its_client_alone(secured, project):
    async with caller(secured, ALL) as mine, caller(secured, ALL) as other:
        await make_users(mine, project)
        lock = (await acquire(mine, project)).json()
        await pass_time(secured.database, lock["user"]["id"])
        taken = (await acquire(other, project, wait=5)).json()
        assert taken["fence"] > lock["fence"]
        path = f"/locks/{lock['id']}"
        assert (await mine.get(path)).json()["ended_by"] == "expired"
        assert "ended_by" not in (await other.get(path)).json()
        assert slug(await mine.get(f"/locks/{taken['id']}")) == "lock-not-held"
        assert (await other.get(f"/locks/{taken['id']}")).status_code == 200


async def test_however_a_lock_ends_its_record_says_whose_it_was(empty_database):
    """On the statements themselves, because a running sweep would be first."""
    await asyncio.to_thread(farm.migrations.migrate, empty_database)
    me, other, project, made = (uuid.uuid4() for _ in range(4))
    over = "update locks set ready_at = now() - interval '1 hour', expires_at = acquired_at"
    async with farm.database.open_pool(empty_database, 1, "force_generic_plan", 10) as pool:
        events = farm.telemetry.Events(None)
        own_farm = farm.locks.Locks(settings(empty_database), pool, pool, cast("Any", None), events)
        secret = "$argon2id$"
        await pool.fetch(
            farm.database.SQL["create_user"], made, "a", secret, project, "stage", "regular", "{}", *farm.codes.NO_CODES
        )

        async def take(client):
            (row,) = await own_farm._acquire_locks(
                [
                    farm.waiting.Ask(
                        wishes=(farm.words.Wish(None, project),),
                        holder="h",
                        ttl=60,
                        client=client,
                        lock_ids=[farm.database.new_id()],
                    )
                ]
            )
            return row["lock_id"]

        ask = farm.waiting.Ask(wishes=(farm.words.Wish(made),), client=other, ttl=60, lock_ids=[farm.database.new_id()])
        ends = {
            "released": lambda id: own_farm._release([farm.locks.Release(id)]),
            "released by holder": lambda _: pool.fetch(farm.database.SQL["release_holder"], "h", None, None, None),
            "swept": lambda _: pool.fetch(farm.database.SQL["sweep_locks"], 10),
            "forced": lambda _: pool.fetch(farm.database.SQL["force_release"], made),
            "taken over": lambda _: take(other),
            "taken over by one who waited": lambda _: pool.fetch(
                farm.database.SQL["acquire_users"], *farm.waiting._groups({ask: [made]})
            ),
            "restored": lambda _: pool.fetch(farm.database.SQL["rest_after_restore"], 0),
            "deleted": lambda _: pool.fetch(farm.database.SQL["delete_user"], made, True, None),
        }
        for how, end in ends.items():
            await pool.execute("update locks set lock_id = null, ready_at = now() - interval '1 day'")
            id = await take(me)
            if how == "swept" or how.startswith("taken"):
                await pool.execute(over)
            await end(id)
            rows = await pool.fetch("select client_id from history where lock_id = $1", id)
            assert [row["client_id"] for row in rows] == [me], how


async def test_locks_of_sets_and_of_waiters_belong_to_their_client(secured, project):
    async with caller(secured, ALL) as mine, caller(secured, ALL) as other:
        (user, _) = await make_users(mine, project, 2)
        body = {"users": [{"project_id": project, "count": 2}]}
        (first, second) = (await mine.post("/locks/sets", json=body)).json()["locks"]
        waiting = asyncio.create_task(acquire(mine, project, wait=10))
        assert slug(await other.delete(f"/locks/{first['id']}")) == "lock-not-held"
        assert (await mine.delete(f"/locks/{first['id']}")).status_code == 204
        served = (await waiting).json()
        assert slug(await other.delete(f"/locks/{served['id']}")) == "lock-not-held"
        assert (await mine.delete("/locks?holder=")).status_code == 422
        for lock in (second, served):
            assert (await mine.delete(f"/locks/{lock['id']}")).status_code == 204
        lock = (await mine.put(f"/users/{user['id']}/lock")).json()
        assert slug(await other.delete(f"/locks/{lock['id']}")) == "lock-not-held"


async def test_two_clients_may_use_the_same_idempotency_key(secured, project):
    async with caller(secured, ALL) as mine, caller(secured, ALL) as other:
        await make_users(mine, project, 3)
        key = uuid.uuid4()
        ours = (await acquire(mine, project, key=key)).json()
        theirs = (await acquire(other, project, key=key)).json()
        assert ours["id"] != theirs["id"]
        assert (await acquire(mine, project, key=key)).json() == ours
        assert (await acquire(other, project, key=key)).json() == theirs
        await mine.delete(f"/locks/{ours['id']}")
        ended = await acquire(mine, project, key=key)
        assert slug(ended) == "lock-ended"
        assert str(key) in ended.json()["detail"]
        assert ended.json()["ended_at"]
        assert (await acquire(other, project, key=key)).json() == theirs


async def test_deleting_a_user_by_force_ends_no_lock_of_another_client(secured, project):
    async with caller(secured, ALL) as mine, caller(secured, ALL) as other, caller(secured, "admin") as admin:
        (first, second) = await make_users(mine, project, 2)
        for user in (first, second):
            assert (await mine.put(f"/users/{user['id']}/lock")).status_code == 201
        assert slug(await other.delete(f"/users/{first['id']}")) == "user-locked"
        assert slug(await other.delete(f"/users/{first['id']}?force=true")) == "forbidden"
        assert (await mine.delete(f"/users/{first['id']}?force=true")).status_code == 204
        assert (await admin.delete(f"/users/{second['id']}?force=true")).status_code == 204


# ---- Limits to projects -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [ALL, "admin"])
async def test_a_client_that_is_limited_to_projects_sees_nothing_else(secured, scope):
    own, second, foreign = (str(uuid.uuid4()) for _ in range(3))
    async with caller(secured, "admin") as admin, caller(secured, scope, [own, second]) as api:
        (mine,) = await make_users(admin, own)
        (hidden,) = await make_users(admin, foreign)
        taken = (await acquire(admin, foreign, holder="job")).json()
        await make_users(admin, second, login="other")
        projects = {own, second}

        assert {user["project_id"] for user in (await api.get("/users")).json()["items"]} == projects
        for query in ("holder=job", "state=locked", f"login={hidden['login']}&state=locked"):
            assert (await api.get(f"/users?{query}")).json()["items"] == []
        exported = (await api.get("/users/export")).text.splitlines()
        assert {json.loads(line)["project_id"] for line in exported} == projects
        assert {pool["project_id"] for pool in (await api.get("/pools")).json()["items"]} == projects
        page = (await api.get("/users?limit=1")).json()
        rest = (await api.get("/users", params={"cursor": page["next"]})).json()
        assert len(rest["items"]) == 1
        assert rest["next"] is None
        outside = (await admin.get("/users?limit=1")).json()["next"]  # a cursor of somebody else widens nothing
        items = (await api.get("/users", params={"cursor": outside})).json()["items"]
        assert {user["project_id"] for user in items} <= projects

        for path in ("/users", "/users/export", "/pools", "/overview"):
            assert slug(await api.get(f"{path}?project_id={foreign}")) == "forbidden"
            assert (await api.get(f"{path}?project_id={own}")).status_code == 200

        id = hidden["id"]
        unknown = str(uuid.uuid4())
        for method, path, body in (
            ("GET", "/users/{}", None),
            ("PATCH", "/users/{}", {"login": "x"}),
            ("DELETE", "/users/{}", None),
            ("DELETE", "/users/{}?force=true", None),
            ("POST", "/users/{}/verify", {"password": "pw-0"}),
            ("POST", "/users/{}/quarantine", {"reason": "x"}),
            ("DELETE", "/users/{}/quarantine", None),
            ("GET", "/users/{}/history", None),
            ("PUT", "/users/{}/lock", {"wait": 1}),
            *([("DELETE", "/users/{}/lock", None)] if scope == "admin" else []),
        ):
            there, nowhere = [
                await api.request(method, path.format(each), **({"json": body} if body else {}))
                for each in (id, unknown)
            ]
            assert slug(there) == "user-not-found"
            assert there.text == nowhere.text.replace(unknown, id)

        for path in ("/locks/{}", "/locks/{}?cooldown=1"):
            for method in ("GET", "PATCH", "DELETE"):
                if "?" not in path or method == "DELETE":
                    there = await api.request(method, path.format(taken["id"]))
                    assert slug(there) == "lock-not-held"
                    assert "ended_at" not in there.json()
        assert (await api.delete("/locks?holder=job")).json() == {"released": 0}
        assert slug(await api.delete(f"/locks?holder=job&project_id={foreign}")) == "forbidden"

        assert slug(await acquire(api, foreign)) == "forbidden"
        assert slug(await acquire(api, foreign, wait=1)) == "forbidden"
        for parts in ([foreign], [own, foreign]):
            body = {"users": [{"project_id": each} for each in parts]}
            assert slug(await api.post("/locks/sets", json=body)) == "forbidden"
        user = {"login": "new", "password": "p", "env": "stage"}
        assert slug(await api.post("/users", json=user | {"project_id": foreign})) == "forbidden"
        assert (await api.post("/users", json=user | {"project_id": own})).status_code == 201

        lines = [
            json.dumps(user | {"login": f"import-{n}", "project_id": each}) for n, each in enumerate((own, foreign))
        ]
        columns = "login,password,project_id,env"
        csv = "\n".join([columns, f"a,p,{own},stage", f"b,p,{foreign},stage"])
        for text, media, number in (("\n".join(lines), farm.words.NDJSON, 2), (csv, farm.words.CSV, 3)):
            refused = await api.post("/users/import", content=text, headers={"Content-Type": media})
            assert slug(refused) == "forbidden"
            assert f"Line {number}" in refused.json()["detail"]
        assert len((await api.get(f"/users?project_id={own}")).json()["items"]) == 2
        imported = await api.post("/users/import", content=lines[0], headers={"Content-Type": farm.words.NDJSON})
        assert imported.json()["created"] == 1

        assert (await admin.get(f"/locks/{taken['id']}")).status_code == 200
        assert (await admin.get(f"/users/{id}")).json()["login"] == hidden["login"]
        assert (await api.get(f"/users/{mine['id']}")).json()["id"] == mine["id"]


async def test_an_admin_that_is_limited_reaches_locks_of_others_in_its_projects(secured, project):
    async with caller(secured, ALL) as other, caller(secured, "admin", [project]) as admin:
        elsewhere = str(uuid.uuid4())
        (user,) = await make_users(other, project)
        await make_users(other, elsewhere)
        away = (await acquire(other, elsewhere, holder="job")).json()
        lock = (await acquire(other, project, holder="job")).json()
        assert (await admin.get(f"/locks/{lock['id']}")).status_code == 200
        assert (await admin.patch(f"/locks/{lock['id']}", json={"ttl": 77})).json()["ttl"] == 77
        assert (await admin.delete(f"/locks/{lock['id']}")).status_code == 204
        assert (await admin.get(f"/locks/{lock['id']}")).json()["ended_by"] == "released"
        await acquire(other, project, holder="job")
        assert (await admin.delete("/locks?holder=job")).json() == {"released": 1}
        await acquire(other, project)
        assert (await admin.delete(f"/users/{user['id']}/lock")).status_code == 204
        assert (await other.get(f"/locks/{away['id']}")).status_code == 200


# ---- Clients ----------------------------------------------------------------------------------------------


def test_clients_are_kept_by_commands_and_secrets_are_shown_once(empty_database):
    env = {"DATABASE_URL": empty_database}
    project = str(uuid.uuid4())
    added = command("client", "add", "ci", "--scope", "users:read locks", "--project", project, env=env)
    line = json.loads(added.stdout)
    assert line.keys() == {"client_id", "client_secret", "scope", "projects"}
    assert (line["scope"], line["projects"]) == ("users:read locks", [project])
    assert len(base64.urlsafe_b64decode(line["client_secret"] + "=")) == 32
    other = json.loads(command("client", "add", "a", "--scope", "admin", env=env).stdout)
    assert other["projects"] is None
    listed = [json.loads(text) for text in command("client", "list", env=env).stdout.splitlines()]
    assert [(each["name"], each["scope"]) for each in listed] == [("a", "admin"), ("ci", "users:read locks")]
    assert not any("secret" in key for each in listed for key in each)
    twice = command("client", "add", "ci", "--scope", "locks", env=env)
    assert (twice.returncode, twice.stdout) == (1, "")
    assert "'ci' exists already" in twice.stderr
    rotated = json.loads(command("client", "rotate", "ci", "--keep", "60", env=env).stdout)
    assert (rotated["client_id"], rotated["projects"]) == (line["client_id"], [project])
    assert rotated["client_secret"] != line["client_secret"]
    assert rotated["old_secret_valid_until"]
    removed = json.loads(command("client", "remove", "ci", env=env).stdout)
    assert removed["client_id"] == line["client_id"]
    for action in ("rotate", "remove"):
        gone = command("client", action, "ci", env=env)
        assert (gone.returncode, gone.stdout) == (1, "")
        assert "'ci' does not exist" in gone.stderr
    (stored,) = asyncio.run(execute(empty_database, "select clients::text as row from clients"))
    assert other["client_secret"] not in stored["row"]


async def test_a_client_that_is_removed_while_it_waits_gets_no_user(secured, project):
    async with caller(secured, ALL) as mine, caller(secured, ALL) as removed:
        (user,) = await make_users(mine, project)
        lock = (await acquire(mine, project)).json()
        waiting = asyncio.create_task(acquire(removed, project, wait=20))
        while (await mine.get("/pools", params={"project_id": project})).json()["items"][0]["waiting"] == 0:
            await asyncio.sleep(0.02)
        await execute(secured.database, f"delete from clients where id = '{removed.who.id}'", "select")
        unknown = forge(SimpleNamespace(id=str(uuid.uuid4())))  # which makes the service look at the clients now
        assert (await mine.get("/users", headers=bearer(unknown))).status_code == 401
        await mine.delete(f"/locks/{lock['id']}")
        assert slug(await waiting) == "unauthenticated"
        assert (await mine.put(f"/users/{user['id']}/lock", json={"wait": 5})).status_code == 201


async def test_the_commands_send_a_token_of_their_client(secured, project):
    who = await add_client(secured.database, "users:write")
    line = json.dumps({"login": "c", "project_id": project, "env": "stage", "password": "p"})
    env = {"BOTFARM_CLIENT_ID": who.id, "BOTFARM_CLIENT_SECRET": who.secret}
    words = ("import", "-", "--url", secured.url)
    done = await asyncio.to_thread(command, *words, env=env, text=line)
    assert (done.returncode, json.loads(done.stdout)["created"]) == (0, 1)
    exported = await asyncio.to_thread(command, "export", "--url", secured.url, env=env)
    assert project in exported.stdout
    anonymous = await asyncio.to_thread(command, *words, text=line)
    assert (anonymous.returncode, "401" in anonymous.stderr) == (1, True)
    wrong = await asyncio.to_thread(command, *words, env=env | {"BOTFARM_CLIENT_SECRET": "x"}, text=line)
    assert (wrong.returncode, "invalid_client" in wrong.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("add", "x"), "--scope"),
        (("add", "x", "--scope", "users:read all"), "'all'"),
        (("add", "x", "--scope", ""), "at least one"),
        (("add", "a\nb", "--scope", "locks"), "control characters"),
        (("add", os.fsdecode(b"\xff"), "--scope", "locks"), "1 to 100 characters in UTF-8"),
        (("add", "x", "--scope", "locks", "--project", "nope"), "nope"),
        (("rotate", "x", "--keep", "soon"), "'soon'"),
        ((), "COMMAND"),
    ],
)
def test_a_mistyped_client_command_is_refused_with_what_is_wrong(words, named):
    refused = command("client", *words)
    assert refused.returncode == 2
    assert named in refused.stderr
    assert "Traceback" not in refused.stderr


async def test_after_a_rotation_the_old_secret_is_valid_for_a_while(secured):
    async with client(secured.url) as api:
        who = await add_client(secured.database, "locks")
        token = bearer((await ask(api, who)).json()["access_token"])
        env = {"DATABASE_URL": secured.database}
        rotated = await asyncio.to_thread(command, "client", "rotate", who.name, env=env)
        new = json.loads(rotated.stdout)["client_secret"]
        for secret in (who.secret, new):
            assert (await ask(api, who, secret)).status_code == 200
        (left,) = await execute(
            secured.database, f"select previous_until - now() as time from clients where id = '{who.id}'"
        )
        assert 3500 < left["time"].total_seconds() <= 3600
        await execute(secured.database, f"update clients set previous_until = now() where id = '{who.id}'", "select")
        assert (await ask(api, who)).status_code == 401
        assert (await ask(api, who, new)).status_code == 200
        assert (await api.get(f"/locks/{uuid.uuid4()}", headers=token)).status_code == 404


async def test_tokens_of_a_removed_client_end_at_all_services(empty_database, monkeypatch):
    url = empty_database
    assert farm.clients.Gate.REFRESH * 1.25 + 10 < farm.clients.Gate.STALE
    assert farm.clients.Gate.STALE + 10 <= 60
    monkeypatch.setattr(farm.clients.Gate, "REFRESH", 0.2)
    with serving(secure(url)) as one, serving(secure(url)) as two:
        who, fewer = await add_client(url, ALL), await add_client(url, ALL)
        async with client(one.url) as api, client(two.url) as other:
            headers = bearer((await ask(api, who)).json()["access_token"])
            less = bearer((await ask(api, fewer)).json()["access_token"])
            for service in (api, other):  # also a client that the other one has not heard of yet
                assert (await service.get("/users", headers=headers)).status_code == 200
                assert (await service.get("/users", headers=less)).status_code == 200
            removed = await asyncio.to_thread(command, "client", "remove", who.name, env={"DATABASE_URL": url})
            assert removed.returncode == 0
            assert (await ask(other, who)).status_code == 401
            narrowed = f"update clients set scopes = '{{locks}}' where id = '{fewer.id}'"
            await execute(url, narrowed, "select")
            for service in (api, other):
                for expected, sent in (("unauthenticated", headers), ("forbidden", less)):
                    for _ in range(50):
                        if (answer := await service.get("/users", headers=sent)).status_code != 200:
                            break
                        await asyncio.sleep(0.05)
                    assert slug(answer) == expected


async def test_what_was_read_of_clients_counts_for_less_than_a_minute(empty_database, monkeypatch):
    """With the database away nobody can tell whether a client was removed: then no token counts."""
    with serving(secure(empty_database)) as running:
        who = await add_client(empty_database, ALL)
        async with client(running.url) as api:
            headers = bearer((await ask(api, who)).json()["access_token"])
            assert (await api.get("/users", headers=headers)).status_code == 200
            monkeypatch.setitem(farm.database.SQL, "list_clients", "select pg_sleep(1) from clients_gone")
            failing = farm.database.Connections.fetch

            async def away(self, sql, *values, **options):
                if "clients_gone" in sql:
                    raise ConnectionError("away")
                return await failing(self, sql, *values, **options)

            monkeypatch.setattr(farm.database.Connections, "fetch", away)
            assert (await api.get("/users", headers=headers)).status_code == 200
            monkeypatch.setattr(farm.clients.Gate, "STALE", 0)
            assert slug(await api.get("/users", headers=headers)) == "database-unavailable"
            monkeypatch.undo()
            assert (await api.get("/users", headers=headers)).status_code == 200


# ---- The start --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [{}, {"BOTFARM_SIGNING_KEYS": ""}, {"BOTFARM_SIGNING_KEYS": "s1:short"}, {"BOTFARM_SIGNING_KEYS_FILE": "/none"}],
)
def test_a_start_without_a_signing_key_is_refused(keys):
    refused = command("serve", env={"BOTFARM_AUTH": "on", "DATABASE_URL": "postgresql://x"} | keys)
    assert refused.returncode == 2
    assert refused.stderr.count("BOTFARM_SIGNING_KEYS") == 1
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("auth", "host", "warned"), [("off", "0.0.0.0", True), ("off", "127.0.0.1", False), ("on", "0.0.0.0", False)]
)
def test_what_is_opened_without_authentication_is_told_in_the_log(empty_database, auth, host, warned):
    port = str(free_port())
    env = {"DATABASE_URL": empty_database, "BOTFARM_AUTH": auth, "BOTFARM_HOST": host, "BOTFARM_SIGNING_KEYS": SIGNING}
    with process("--port", port, env=env) as running:
        wait_ready(f"http://127.0.0.1:{port}")
        running.terminate()
        output, _ = running.communicate(timeout=20)
    assert ("without authentication" in output) == warned


async def test_a_caller_cannot_choose_its_address(empty_database):
    """X-Forwarded-For counts only where the deployment says of whom."""
    who = None
    port = str(free_port())
    env = {"DATABASE_URL": empty_database, "BOTFARM_AUTH": "on", "BOTFARM_SIGNING_KEYS": SIGNING}
    with process("--port", port, "--workers", "2", env=env) as running:
        await asyncio.to_thread(wait_ready, f"http://127.0.0.1:{port}")
        who = await add_client(empty_database, "locks")
        statuses = []
        for number in range(15):
            async with client(f"http://127.0.0.1:{port}") as api:  # a new connection, so maybe the other worker
                api.headers["X-Forwarded-For"] = f"10.0.0.{number}"
                statuses.append((await ask(api, who, "wrong")).status_code)
        assert sorted(statuses) == [401] * 10 + [429] * 5
        async with client(f"http://127.0.0.1:{port}") as api:
            other = await add_client(empty_database, "locks")
            told = await ask(api, other)
            await api.get("/users", headers=bearer(told.json()["access_token"]))
            await api.get("/users", headers=bearer(told.json()["access_token"] + "x"))
        running.terminate()
        output, _ = running.communicate(timeout=20)
    assert who.id in output  # who was refused is told, what was sent is not
    for secret in (who.secret, other.secret, "wrong", told.json()["access_token"], SIGNING[3:]):
        assert secret not in output


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed; CI installs it")


@needs_curl
def test_the_lines_about_authentication_work(empty_database, tmp_path):
    section = SECURITY.partition("## Authentication")[2].partition("\n## ")[0]
    start, use = re.findall(r"```sh\n(.*?)```", section, re.S)
    port = free_port()
    here = f"{sys.executable} {ROOT}/botfarm.py"
    start, use = (
        text.replace(".venv/bin/python botfarm.py", here).replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        for text in (start, use)
    )
    env = {"DATABASE_URL": empty_database, "PATH": "/usr/bin:/bin", "BOTFARM_PORT": str(port)}
    start = re.sub(r"^(?=BOTFARM_AUTH=)", "exec env ", start, flags=re.M)
    service = subprocess.Popen(["bash", "-euc", start], env=env, cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        wait_ready(f"http://127.0.0.1:{port}")
        done = subprocess.run(["bash", "-euc", use], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith('{"items":[]')
        assert httpx.get(f"http://127.0.0.1:{port}/users").status_code == 401
    finally:
        service.terminate()
        service.wait(20)
