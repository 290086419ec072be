"""Users: create, list, change, verify, quarantine, delete."""

from __future__ import annotations

import asyncio
import gzip
import json
import uuid

import asyncpg
import pytest
from conftest import acquire, blocked, make_users, slug

import farm.words


async def test_a_created_user_is_answered_whole_and_without_its_password(api, project):
    body = {"login": "ada", "password": "pä ss", "project_id": project, "env": "prod", "labels": {"role": "admin"}}
    answer = await api.post("/users", json=body)
    user = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/users/{user['id']}"
    assert user == {
        "id": user["id"], "created_at": user["created_at"], "login": "ada", "project_id": project, "env": "prod",
        "domain": "regular", "labels": {"role": "admin"}, "state": "free", "locktime": None, "lock": None,
        "quarantine": None, "has_session": False, "has_totp": False,
    }  # fmt: skip
    assert (await api.get(answer.headers["location"])).json() == user


async def test_a_login_is_taken_once_within_project_and_env(api, project):
    await make_users(api, project)
    body = {"login": "bot-0", "password": "x", "project_id": project, "env": "stage"}
    assert slug(await api.post("/users", json=body)) == "login-taken"
    assert (await api.post("/users", json=body | {"env": "prod"})).status_code == 201
    assert (await api.post("/users", json=body | {"project_id": str(uuid.uuid4())})).status_code == 201


async def test_many_creates_of_one_login_make_one_user(api, project):
    body = {"login": "one", "password": "x", "project_id": project, "env": "stage"}
    answers = await asyncio.gather(*(api.post("/users", json=body) for _ in range(20)))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 19


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"login": ""}, "login"),
        ({"login": "x" * 255}, "login"),
        ({"login": "a\nb"}, "login"),
        ({"login": "a\n"}, "login"),
        ({"login": "a\u0085"}, "login"),
        ({"password": ""}, "password"),
        ({"password": "p\u0000"}, "password"),
        ({"password": "p" * 1025}, "password"),
        ({"project_id": "nope"}, "project_id"),
        ({"env": "moon"}, "env"),
        ({"domain": "moon"}, "domain"),
        ({"labels": {"a b": "x"}}, "labels"),
        ({"labels": {"a\n": "x"}}, "labels"),
        ({"labels": {"k" * 64: "x"}}, "labels"),
        ({"labels": {"k": "v" * 256}}, "labels.k"),
        ({"labels": {"k": "\u0000"}}, "labels.k"),
        ({"labels": {f"k{n}": "" for n in range(33)}}, "labels"),
        ({"labels": {"k": 1}}, "labels.k"),
        ({"labels": None}, "labels"),
        ({"shoe": 42}, "shoe"),
    ],
)
async def test_a_bad_value_is_named(api, project, changes, field):
    body = {"login": "ada", "password": "hunter2", "project_id": project, "env": "prod"} | changes
    answer = await api.post("/users", json=body)
    assert slug(answer) == "invalid"
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert "hunter2" not in answer.text


@pytest.mark.parametrize(
    ("path", "body", "errors"),
    [
        ("/users", {"login": "a\n", "password": "\0", "env": "x", "shoe": 1, "labels": {"k": None}}, [
            ("shoe", "unknown field"),
            ("login", '"a\\n" is not allowed: no control characters here'),
            ("project_id", "required, but missing"),
            ("labels.k", "null must be a text of up to 255 characters without control characters"),
            ("password", "no U+0000 here"),
            ("env", '"x" is not one of prod, preprod, stage'),
        ]),
        ("/users", {"login": "a", "x": 1, "y": 2, "project_id": "1" * 32, "env": "prod"}, [
            ("x", "unknown field"), ("y", "unknown field"), ("password", "required, but missing"),
        ]),
        ("/locks/sets", {"users": [{}], "ttl": 0}, [
            ("ttl", "0 is not allowed: Expected `int` >= 1"), ("users[0].project_id", "required, but missing"),
        ]),
        ("/locks/sets", {"users": [{"project_id": "1" * 32}, {"project_id": "1" * 32, "x": 1, "env": "y"}]}, [
            ("users[1].x", "unknown field"), ("users[1].env", '"y" is not one of prod, preprod, stage'),
        ]),
        ("/locks/sets", {"users": [{"project_id": "1" * 32, "labels": {"a b": "c"}}]}, [
            ("users[0].labels", 'the key "a b" is not 1 to 63 of A-Z a-z 0-9 _ . -'),
        ]),
        ("/locks/sets", {"users": [{"project_id": 5}]}, [
            ("users[0].project_id", "5 is not allowed: Expected `uuid`, got `int`"),
        ]),
        ("/locks/sets", {"users": [5]}, [("users[0]", "5 is not allowed: Expected `object`, got `int`")]),
        ("/locks", [], [(None, "Expected `object`, got `array`")]),
        ("/locks", {"project_id": "1" * 32, "ttl": 60.0, "shoe": 1}, [("shoe", "unknown field")]),
    ],
)  # fmt: skip
async def test_all_faults_of_a_body_are_told_with_place_value_and_rule(api, path, body, errors):
    answer = await api.post(path, json=body)
    assert slug(answer) == "invalid"
    assert [(error["field"], error["message"]) for error in answer.json()["errors"]] == errors


@pytest.mark.parametrize(
    "name", ["a.b", "a\nb", "[0]", "q - at `$.zzz", "q` - at `$.ttl", "users[0]", "labels[...]", ""]
)
async def test_a_name_that_reads_like_a_place_is_unknown_too(api, project, name):
    """msgspec's message holds the name as it was sent."""
    for path, body in (("/locks", {"project_id": project}), ("/users", {})):
        answer = await api.post(path, json=body | {name: 1})
        assert slug(answer) == "invalid"
        assert answer.json()["errors"][0] == {"field": name, "message": "unknown field"}
    nested = await api.post("/locks/sets", json={"users": [{"project_id": project, name: 1}]})
    assert slug(nested) == "invalid"
    assert nested.json()["errors"]
    line = await api.post(
        "/users/import", content=json.dumps({name: 1}), headers={"Content-Type": "application/x-ndjson"}
    )
    assert line.json()["errors"][0] == {"line": 1, "field": name, "message": "unknown field"}


@pytest.mark.parametrize("depth", [100, 300, 480, 600, 900, 5000])
async def test_a_deep_value_is_refused_wherever_it_stands(api, depth):
    deep = "[" * depth + "]" * depth
    for path, media, body in (
        ("/locks", "application/json", f'{{"x": {deep}}}'),
        ("/locks", "application/json", f'{{"ttl": {deep}}}'),
        ("/users/import", "application/x-ndjson", f'{{"login": {deep}}}'),
    ):
        answer = await api.post(path, content=body, headers={"Content-Type": media})
        assert slug(answer) in ("invalid", "malformed-body")


async def test_a_body_where_none_belongs_widens_nothing(api, project):
    """What stands in it was meant as a filter; it is read whether its length is announced or not."""

    async def chunks():
        yield b"{"

    await make_users(api, project)
    lock = (await acquire(api, project, holder="ci")).json()
    meant = {"project_id": str(uuid.uuid4())}
    for path in ("/locks?holder=ci", f"/locks/{lock['id']}", f"/users/{lock['user']['id']}?force=true"):
        assert slug(await api.request("DELETE", path, json=meant)) == "invalid"
        assert slug(await api.request("DELETE", path, content=chunks())) == "malformed-body"
    assert (await api.get(f"/locks/{lock['id']}")).status_code == 200
    assert (await api.request("DELETE", f"/locks/{lock['id']}", json={})).status_code == 204


async def test_a_call_that_needs_a_body_and_has_none_says_just_that(api, project):
    (user,) = await make_users(api, project)
    own = f"/users/{user['id']}"
    calls = [("POST", path) for path in ("/users", "/locks", "/locks/sets", f"{own}/verify", f"{own}/quarantine")]
    for method, path in [*calls, ("PATCH", own)]:
        answer = await api.request(method, path)
        assert slug(answer) == "malformed-body"
        assert answer.json()["detail"] == "There is no body, but this call takes JSON."


async def test_a_value_that_is_none_of_a_choice_is_told_the_choices(api, project):
    lock = f"/locks/{uuid.uuid4()}"
    for answer, field, told in (
        (await api.get("/users?state=gone"), "state", '"gone"|free, locked, resting, quarantined'),
        (await api.get("/users/export?state="), "state", '""|free, locked, resting, quarantined'),
        (await api.delete(f"{lock}?outcome=won"), "outcome", '"won"|passed, failed, bad-login'),
        (await api.post("/locks", json={"project_id": project, "prefer": "x"}), "prefer", '"x"|any, session'),
    ):
        value, _, choices = told.partition("|")
        assert slug(answer) == "invalid"
        message = f"{value} is not allowed: choose one of {choices}"
        assert answer.json()["errors"] == [{"field": field, "message": message}]


async def test_a_parameter_that_is_given_twice_is_told_once(api):
    answer = await api.get("/users?limit=1&limit=2&limit=3")
    assert answer.json()["errors"] == [{"field": "limit", "message": "is given twice"}]
    many = await api.get("/users?" + "label=a:b&" * 101)
    assert "100 parameters" in many.json()["detail"]


@pytest.mark.parametrize("query", ["label=bad&label=a:b", "label=a:b&label=bad&label=c:d", "label=a:b&label=bad"])
async def test_of_several_labels_the_one_that_is_none_is_named(api, query):
    (error,) = (await api.get(f"/users?{query}")).json()["errors"]
    assert error["field"] == "label"
    assert error["message"].startswith('"bad" is not allowed: write key:value')


async def test_an_id_in_a_path_is_a_uuid_as_it_is_everywhere_else(api, project):
    (user,) = await make_users(api, project)
    id = user["id"]
    lock = (await acquire(api, project)).json()["id"]
    for path in (f"/users/{id.upper()}", f"/users/{id.replace('-', '')}", f"/users/{id}/history", f"/users/{id}/"):
        assert (await api.get(path)).status_code == 200
    plain = id.replace("-", "")
    odd = [f"{{{id}}}", f"urn:uuid:{id}", f"{id}}}", f"+{plain[1:]}", f"%20{plain[1:]}", f"0-{plain[1:]}", f"{id}-"]
    for way in odd:
        for path in (f"/users/{way}", f"/users/{way}/history", f"/locks/{way.replace(id, lock)}"):
            assert slug(await api.get(path)) == "not-found"
        assert slug(await api.delete(f"/users/{way}?force=true")) == "not-found"


async def test_what_is_encoded_is_refused_as_such(api, project):
    packed = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    assert slug(await api.post("/locks", content=gzip.compress(b"{}"), headers=packed)) == "unsupported-media-type"
    packed["Content-Type"] = "text/csv"
    assert slug(await api.post("/users/import", content=b"x", headers=packed)) == "unsupported-media-type"


async def test_every_missing_or_extra_thing_is_refused(api, project):
    assert slug(await api.post("/users", json={"login": "x"})) == "invalid"
    assert slug(await api.get("/users", params={"projectid": project})) == "invalid"
    assert slug(await api.get("/users?limit=0")) == "invalid"
    assert slug(await api.get("/users?limit=1&limit=2")) == "invalid"
    assert slug(await api.get("/users?state=gone")) == "invalid"
    assert slug(await api.get("/users?label=role")) == "invalid"
    assert slug(await api.get("/users?env=moon")) == "invalid"
    assert slug(await api.get("/users?login=%00")) == "invalid"
    assert slug(await api.get("/users?login=%ff")) == "invalid"
    assert slug(await api.get("/livez?x=1")) == "invalid"
    assert slug(await api.get("/users?project_id=null")) == "invalid"
    assert slug(await api.get("/users?state=null")) == "invalid"
    assert slug(await api.delete("/locks?holder=ci&project_id=null")) == "invalid"


async def test_all_faults_of_a_query_are_told(api):
    answer = await api.get("/users?limit=0&shoe=1&env=stage&env=prod&label=a:b&label=a&state=null&login=x")
    assert slug(answer) == "invalid"
    assert {error["field"] for error in answer.json()["errors"]} == {"limit", "shoe", "env", "label", "state"}


async def test_unknown_users_are_not_found(api):
    missing = f"/users/{uuid.uuid4()}"
    calls = [
        api.get(missing), api.patch(missing, json={}), api.delete(missing), api.get(f"{missing}/history"),
        api.post(f"{missing}/verify", json={"password": "x"}), api.put(f"{missing}/lock"),
        api.post(f"{missing}/quarantine", json={"reason": "x"}), api.delete(f"{missing}/quarantine"),
        api.delete(f"{missing}/lock"),
    ]  # fmt: skip
    assert {slug(answer) for answer in await asyncio.gather(*calls)} == {"user-not-found"}
    assert slug(await api.get("/users/42")) == "not-found"


async def test_pages_show_each_user_once_while_others_are_created_and_deleted(api, project):
    users = await make_users(api, project, 25)
    seen, cursor = [], None
    for page in range(20):
        query = {"project_id": project, "limit": 4} | ({"cursor": cursor} if cursor else {})
        answer = (await api.get("/users", params=query)).json()
        seen += [user["login"] for user in answer["items"]]
        cursor = answer["next"]
        if not cursor:
            break
        await make_users(api, project, 1, login=f"new-{page}")
        await api.delete(f"/users/{users[page]['id']}")
    assert [login for login in seen if login.startswith("bot")] == [f"bot-{n}" for n in range(25)]
    assert len(seen) == len(set(seen))


LATE = farm.words.write_cursor("9999-12-31T23:59:59-12:00", uuid.UUID(int=0))


@pytest.mark.parametrize("cursor", ["x", "!!!", "WyJhIl0", "W10", "bnVsbA", "é", "", LATE])
async def test_a_tampered_cursor_is_refused(api, project, cursor):
    answer = await api.get("/users", params={"project_id": project, "cursor": cursor})
    assert slug(answer) == "invalid"
    assert answer.json()["errors"][0]["field"] == "cursor"
    (user,) = await make_users(api, project)
    assert slug(await api.get(f"/users/{user['id']}/history", params={"cursor": cursor})) == "invalid"


async def test_a_cursor_reaches_nothing_outside_the_filter(api, project):
    await make_users(api, project, 3)
    page = (await api.get("/users", params={"project_id": project, "limit": 1})).json()
    other = {"project_id": str(uuid.uuid4()), "cursor": page["next"]}
    assert (await api.get("/users", params=other)).json() == {"items": [], "next": None}


async def test_filters_are_all_applied(api, project):
    await make_users(api, project, 2, labels={"role": "admin", "team": "a"})
    await make_users(api, project, 1, login="prod", env="prod")
    held = (await acquire(api, project, env="stage", holder="me")).json()

    async def logins(**query):
        query = {"project_id": project} | query
        return [user["login"] for user in (await api.get("/users", params=query)).json()["items"]]

    assert await logins(env="prod") == ["prod"]
    assert await logins(state="locked") == [held["user"]["login"]]
    assert await logins(holder="me") == [held["user"]["login"]]
    assert await logins(holder="you") == []
    assert await logins(login="bot-1") == ["bot-1"]
    assert await logins(label=["role:admin", "team:a"]) == ["bot-0", "bot-1"]
    assert await logins(label=["role:admin", "role:buyer"]) == []
    assert await logins(domain="canary") == []


async def test_a_patch_changes_what_it_names_and_keeps_the_lock(api, project):
    (user,) = await make_users(api, project, labels={"a": "1"})
    lock = (await acquire(api, project)).json()
    path = f"/users/{user['id']}"
    assert (await api.patch(path, json={})).json()["labels"] == {"a": "1"}
    changed = (await api.patch(path, json={"login": "new", "domain": "canary", "labels": {}, "password": "p2"})).json()
    assert (changed["login"], changed["domain"], changed["labels"], changed["state"]) == ("new", "canary", {}, "locked")
    assert (await api.delete(f"/locks/{lock['id']}")).status_code == 204
    assert slug(await acquire(api, project, domain="regular")) == "no-matching-user"
    assert (await acquire(api, project, domain="canary")).json()["user"]["password"] == "p2"
    await make_users(api, project, 1, login="other")
    assert slug(await api.patch(path, json={"login": "other"})) == "login-taken"
    assert slug(await api.patch(path, json={"login": None})) == "invalid"


async def test_a_locked_user_is_deleted_only_by_force(api, project):
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project, holder="me")).json()
    refused = await api.delete(f"/users/{user['id']}")
    assert slug(refused) == "user-locked"
    assert refused.json()["holder"] == "me"
    assert refused.json()["expires_at"] == lock["expires_at"]
    assert (await api.delete(f"/users/{user['id']}?force=true")).status_code == 204
    ended = await api.get(f"/locks/{lock['id']}")
    assert slug(ended) == "lock-not-held"
    assert ended.json()["ended_by"] == "forced"


async def test_a_quarantined_user_is_not_handed_out_until_it_is_put_back(api, project):
    (user,) = await make_users(api, project)
    path = f"/users/{user['id']}/quarantine"
    assert (await api.post(path, json={"reason": "blocked"})).json()["state"] == "quarantined"
    refused = await acquire(api, project)
    assert slug(refused) == "pool-exhausted"
    assert refused.json()["quarantined"] == 1
    unavailable = await api.put(f"/users/{user['id']}/lock")
    assert slug(unavailable) == "user-unavailable"
    assert (unavailable.json()["state"], unavailable.json()["reason"]) == ("quarantined", "blocked")
    assert (await api.delete(path)).json()["state"] == "free"
    assert (await api.delete(path)).status_code == 200
    assert (await acquire(api, project)).status_code == 201


async def test_a_lock_runs_on_through_a_quarantine(api, project):
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project)).json()
    quarantined = (await api.post(f"/users/{user['id']}/quarantine", json={"reason": "later"})).json()
    assert (quarantined["state"], quarantined["quarantine"]) == ("locked", "later")
    assert (await api.patch(f"/locks/{lock['id']}")).status_code == 200
    await api.delete(f"/locks/{lock['id']}")
    assert (await api.get(f"/users/{user['id']}")).json()["state"] == "quarantined"
    assert slug(await acquire(api, project)) == "pool-exhausted"


async def test_passwords_are_verified_and_changed(api, project):
    (user,) = await make_users(api, project)
    path = f"/users/{user['id']}"

    async def valid(password):
        return (await api.post(f"{path}/verify", json={"password": password})).json()["valid"]

    assert await valid("pw-0")
    assert not await valid("pw-1")
    await api.patch(path, json={"password": "pw-1"})
    assert await valid("pw-1")


async def test_pools_count_their_users_by_state(api, project):
    await make_users(api, project, 3)
    await make_users(api, project, 1, login="c", domain="canary")
    lock = (await acquire(api, project, domain="regular")).json()
    await acquire(api, project, domain="regular")
    await api.delete(f"/locks/{lock['id']}?cooldown=60")
    pools = (await api.get("/pools", params={"project_id": project})).json()["items"]
    common = {"project_id": project, "env": "stage", "failing": 0, "waiting": 0}
    assert pools == [
        common | {"domain": "canary", "total": 1, "free": 1, "locked": 0, "resting": 0, "quarantined": 0},
        common | {"domain": "regular", "total": 3, "free": 1, "locked": 1, "resting": 1, "quarantined": 0},
    ]


async def test_the_history_pages_newest_first(api, project):
    (user,) = await make_users(api, project)
    for number in range(3):
        lock = (await acquire(api, project, holder=f"h{number}")).json()
        if number < 2:
            await api.delete(f"/locks/{lock['id']}")
    path = f"/users/{user['id']}/history"
    first = (await api.get(path, params={"limit": 2})).json()
    assert [(e["fence"], e["holder"], e["ended_by"]) for e in first["items"]] == [
        (3, "h2", None),
        (2, "h1", "released"),
    ]
    second = (await api.get(path, params={"limit": 2, "cursor": first["next"]})).json()
    assert [(e["fence"], e["ended_by"]) for e in second["items"]] == [(1, "released")]
    assert second["next"] is None


async def test_an_export_has_every_user_and_no_secret(api, project):
    users = await make_users(api, project, 3)
    answer = await api.get("/users/export", params={"project_id": project})
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert [json.loads(line) for line in answer.text.splitlines()] == users
    assert "pw-" not in answer.text
    assert slug(await api.get("/users/export?limit=1")) == "invalid"


async def test_of_two_changes_at_once_the_later_one_counts_in_all_that_a_user_has(api, project, database):
    """The one that waits for the other saw the pool and the codes as they were before that one."""
    (user,) = await make_users(api, project)
    connection = await asyncpg.connect(database)
    changes = []
    try:
        async with connection.transaction():
            await connection.execute(f"select from users where id = '{user['id']}' for update")
            for count, (domain, totp) in enumerate([("canary", "JBSWY3DPEHPK3PXP"), ("regular", None)], 1):
                call = api.patch(f"/users/{user['id']}", json={"domain": domain, "totp": totp})
                changes.append(asyncio.create_task(call))
                await blocked(database, count)
    finally:
        await connection.close()
    assert [(await change).status_code for change in changes] == [200, 200]
    changed = (await api.get(f"/users/{user['id']}")).json()
    assert (changed["domain"], changed["has_totp"]) == ("regular", False)
    assert (await acquire(api, project, domain="canary")).status_code == 404
    assert (await acquire(api, project, domain="regular")).status_code == 201
