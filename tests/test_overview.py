"""What pages show at a glance: the overview, how it is shared, and logins by how they begin."""

from __future__ import annotations

import asyncio
import time
import uuid
from datetime import datetime, timedelta
from itertools import pairwise

import pytest
from conftest import acquire, client, execute, make_users, pass_time, serving, settings, slug
from test_auth import caller, secured  # noqa: F401

import farm.overview
from farm.database import SQL, Connections


async def overview(service, api, **query):
    """The overview as it is now, and not a second ago."""
    service.farm.glances._looks.clear()
    answer = await api.get("/overview", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def moment(text):
    return datetime.fromisoformat(text)


async def test_it_tells_pools_locks_and_ends(service, api, project):
    users = await make_users(api, project, 4)
    await make_users(api, project, 1, env="prod", domain="canary")
    held = (await acquire(api, project, env="stage", holder="ada", note="run 7", ttl=60)).json()
    longer = (await acquire(api, project, env="stage", holder="bob", ttl=600)).json()
    given_back = (await acquire(api, project, env="stage", holder="eve")).json()
    assert (
        await api.delete(f"/locks/{given_back['id']}", params={"cooldown": 60, "outcome": "bad-login"})
    ).status_code == 204
    (rest,) = {user["id"] for user in users} - {lock["user"]["id"] for lock in (held, longer, given_back)}
    await api.post(f"/users/{rest}/quarantine", json={"reason": "broken"})

    (ended,) = (await api.get(f"/users/{given_back['user']['id']}/history")).json()["items"]
    pool = {"project_id": project, "env": "stage", "domain": "regular", "total": 4, "free": 0, "locked": 2}
    other = {"project_id": project, "env": "prod", "domain": "canary", "total": 1, "free": 1, "locked": 0}
    nobody = {"failing": 0, "waiting": 0, "longest_wait_since": None}
    assert await overview(service, api, project_id=project) == {
        "pools": [
            other | nobody | {"resting": 0, "quarantined": 0, "next_free_at": None},
            pool | nobody | {"failing": 1, "resting": 1, "quarantined": 1, "next_free_at": held["expires_at"]},
        ],
        "locks": {
            "total": 2,
            "items": [
                {
                    "user_id": lock["user"]["id"],
                    **{name: lock["user"][name] for name in ("login", "project_id", "env", "domain")},
                    **{name: lock[name] for name in ("holder", "note", "acquired_at", "expires_at")},
                }
                for lock in (held, longer)
            ],
        },
        "ended": [
            {"user_id": given_back["user"]["id"], "login": given_back["user"]["login"]}
            | {name: ended[name] for name in ("holder", "acquired_at", "ended_at", "ended_by", "outcome")}
        ],
    }
    await api.post(f"/users/{held['user']['id']}/quarantine", json={"reason": "broken"})  # does not come free then
    (_, told) = (await overview(service, api, project_id=project))["pools"]
    assert moment(told["next_free_at"]) == moment(ended["ended_at"]) + timedelta(seconds=60)
    resting = (await api.get(f"/users/{given_back['user']['id']}")).json()
    assert (resting["state"], resting["available_at"]) == ("resting", told["next_free_at"])


async def test_its_counts_are_those_of_the_pools(service, api, project):
    """In every state, also of locks that have expired and that nothing has noticed yet."""
    users = await make_users(api, project, 6)
    for user in users[:4]:
        await api.put(f"/users/{user['id']}/lock", json={"ttl": 60})
    for user in users[1:3]:
        await api.post(f"/users/{user['id']}/quarantine", json={"reason": "broken"})
    await pass_time(service.farm.settings.database_url.reveal(), users[2]["id"])
    await pass_time(service.farm.settings.database_url.reveal(), users[3]["id"])
    (pool,) = (await api.get("/pools", params={"project_id": project})).json()["items"]
    assert (pool["free"], pool["locked"], pool["quarantined"]) == (3, 2, 1)
    (told,) = (await overview(service, api, project_id=project))["pools"]
    assert told == pool | {"longest_wait_since": None, "next_free_at": None}


async def test_it_tells_who_waits_longest_and_when_the_next_comes_free(service, api, project):
    (user,) = await make_users(api, project)
    lock = (await acquire(api, project, ttl=300)).json()
    before = datetime.now().astimezone()
    calls = [asyncio.create_task(acquire(api, project, wait=30))]
    while (pool := (await overview(service, api, project_id=project))["pools"][0])["waiting"] < 1:
        await asyncio.sleep(0.01)
    since = moment(pool["longest_wait_since"])
    assert before - timedelta(seconds=0.1) <= since <= datetime.now().astimezone()
    calls.append(asyncio.create_task(acquire(api, project, wait=30)))
    while (pool := (await overview(service, api, project_id=project))["pools"][0])["waiting"] < 2:
        await asyncio.sleep(0.01)
    assert (moment(pool["longest_wait_since"]), pool["next_free_at"]) == (since, lock["expires_at"])
    await api.delete(f"/users/{user['id']}/lock")
    await asyncio.wait(calls, return_when="FIRST_COMPLETED")
    while (pool := (await overview(service, api, project_id=project))["pools"][0])["waiting"] > 1:
        await asyncio.sleep(0.01)
    assert moment(pool["longest_wait_since"]) > since
    await api.delete(f"/users/{user['id']}/lock")
    await asyncio.gather(*calls)


async def test_it_lists_the_200_locks_that_end_first_and_the_50_latest_ends(service, api, project):
    await make_users(api, project, 201)
    locks = [(await acquire(api, project, ttl=1000 - number)).json() for number in range(201)]
    told = (await overview(service, api, project_id=project))["locks"]
    assert told["total"] == 201
    assert [lock["user_id"] for lock in told["items"]] == [lock["user"]["id"] for lock in reversed(locks[1:])]
    elsewhere = str(uuid.uuid4())
    await make_users(api, elsewhere)
    await acquire(api, elsewhere, ttl=1001)
    whole = await overview(service, api)
    assert len(whole["locks"]["items"]) == 200 < whole["locks"]["total"]
    for lock in locks[:60]:
        await api.delete(f"/locks/{lock['id']}")
    ended = (await overview(service, api, project_id=project))["ended"]
    assert [end["user_id"] for end in ended] == [lock["user"]["id"] for lock in reversed(locks[10:60])]


async def test_the_end_of_a_user_that_is_gone_has_no_login(service, api, project):
    (user,) = await make_users(api, project)
    await acquire(api, project, holder="ada")
    assert (await api.delete(f"/users/{user['id']}", params={"force": True})).status_code == 204
    (end,) = [end for end in (await overview(service, api))["ended"] if end["user_id"] == user["id"]]
    assert (end["login"], end["holder"], end["ended_by"]) == (None, "ada", "forced")
    assert await overview(service, api, project_id=project) == {
        "pools": [],
        "locks": {"total": 0, "items": []},
        "ended": [],
    }


# ---- How it is shared --------------------------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch):
    """Each look that a service takes at its database: for which projects, whether for views of them, and when."""
    taken, fetchrow = [], Connections.fetchrow

    async def counted(self, sql, *args):
        if sql == SQL["get_overview"]:
            taken.append((args[0], args[2], time.monotonic()))
        return await fetchrow(self, sql, *args)

    monkeypatch.setattr(Connections, "fetchrow", counted)
    return taken


async def test_the_database_is_looked_at_once_a_second_however_many_ask(empty_database, looks):
    with serving(settings(empty_database)) as running:
        async with client(running.url) as api:
            projects = [str(uuid.uuid4()) for _ in range(5)]
            for project in projects:
                await make_users(api, project)
            answers = await asyncio.gather(
                *(api.get("/overview", params={"project_id": project} if project else {}) for project in projects * 8),
                *(api.get("/overview") for _ in range(40)),
            )
            assert {len(answer.json()["pools"]) for answer in answers} == {1, 5}
            while len(looks) < 3:
                await api.get("/overview")
            assert {projects for projects, *_ in looks} == {None}
            assert min(later - earlier for (*_, earlier), (*_, later) in pairwise(looks)) >= 1


async def test_among_many_locks_those_of_a_project_are_looked_for_when_somebody_asks(
    empty_database, monkeypatch, looks
):
    monkeypatch.setattr(farm.overview.Glances, "MANY", 2)
    with serving(settings(empty_database)) as running:
        async with client(running.url) as api:
            first, last = str(uuid.uuid4()), str(uuid.uuid4())
            await make_users(api, first, 200)
            await make_users(api, last, 1)
            for project, count in ((first, 200), (last, 1)):
                for _ in range(count):
                    await acquire(api, project, ttl=300 if project == first else 600)
            await overview(running, api)
            looks.clear()
            whole = await overview(running, api)
            assert {lock["project_id"] for lock in whole["locks"]["items"]} == {first}
            told = (await api.get("/overview", params={"project_id": last})).json()
            assert ([lock["project_id"] for lock in told["locks"]["items"]], told["locks"]["total"]) == ([last], 1)
            assert (await api.get("/overview")).json() == whole
            await overview(running, api)
            assert (await api.get("/overview", params={"project_id": last})).json() == told
            assert [is_split for _, is_split, _ in looks] == [False] + [True] * (len(looks) - 1)


async def test_what_has_not_changed_is_not_sent_again(service, api, project):
    await make_users(api, project)
    query = {"project_id": project}
    first = await api.get("/overview", params=query)
    known = {"If-None-Match": first.headers["etag"]}
    await overview(service, api)
    for sent in (known["If-None-Match"], f'"other", {known["If-None-Match"].removeprefix("W/")}', "*"):
        again = await api.get("/overview", params=query, headers={"If-None-Match": sent})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    plain = await api.get("/overview", params=query, headers={"Accept-Encoding": "identity"})
    assert [answer.headers.get("content-encoding") for answer in (first, plain)] == ["gzip", None]
    for accepted, packing in (
        ("br, gzip;q=0.5", "gzip"),
        ("gzip; q=0, br", None),
        ("gzip;q=0.0", None),
        ("x-gzips", None),
    ):
        answer = await api.get("/overview", headers={"Accept-Encoding": accepted})
        assert answer.headers.get("content-encoding") == packing, accepted
    assert (plain.content, plain.headers["etag"]) == (first.content, first.headers["etag"])
    await acquire(api, project)
    service.farm.glances._looks.clear()
    changed = await api.get("/overview", params=query, headers=known)
    assert (changed.status_code, changed.json()["pools"][0]["locked"]) == (200, 1)
    assert changed.headers["etag"] != first.headers["etag"]


async def test_a_look_that_fails_fails_for_all_who_wait_for_it_and_is_taken_anew(empty_database, monkeypatch):
    with serving(settings(empty_database)) as running:
        async with client(running.url) as api:
            fatal = "select pg_terminate_backend(pg_backend_pid()), $1::uuid[], $2::int[], $3::bool"
            monkeypatch.setitem(SQL, "get_overview", fatal)
            answers = await asyncio.gather(*(api.get("/overview") for _ in range(20)))
            assert {slug(answer) for answer in answers} == {"database-unavailable"}
            monkeypatch.undo()
            assert (await api.get("/overview")).json() == {
                "pools": [],
                "locks": {"total": 0, "items": []},
                "ended": [],
            }


async def test_many_users_are_counted_over_several_looks(empty_database, monkeypatch):
    """States are those of the moment always, and totals come after."""
    monkeypatch.setattr(farm.overview, "COUNTED", 4)
    with serving(settings(empty_database)) as running:
        async with client(running.url) as api:
            project = str(uuid.uuid4())
            pools = [(env, domain) for env in ("prod", "stage") for domain in ("canary", "regular")]
            for env, domain in pools:
                await api.post("/users", json=user_of(project, env, domain, "a"))
                await api.post("/users", json=user_of(project, env, domain, "b"))
            assert [pool["total"] for pool in (await overview(running, api))["pools"]] == [2] * 4
            for env, domain in pools:
                await api.post("/users", json=user_of(project, env, domain, "c"))
                await acquire(api, project, env=env, domain=domain)
            seen = [(await overview(running, api))["pools"] for _ in range(3)]
            assert {(pool["locked"], pool["total"] - pool["free"]) for told in seen for pool in told} == {(1, 1)}
            assert [sum(pool["total"] for pool in told) for told in seen] == [10, 12, 12]
            # A pool that is new is counted at once, and all are when nobody has looked for a minute.
            await api.post("/users", json=user_of(project, "preprod", "regular", "a"))
            assert [pool["total"] for pool in (await overview(running, api))["pools"]] == [1, 3, 3, 3, 3]
            for env, domain in pools:
                await api.post("/users", json=user_of(project, env, domain, "d"))
            running.farm.glances._totals.expire(time.monotonic() + 61)
            assert [pool["total"] for pool in (await overview(running, api))["pools"]] == [1, 4, 4, 4, 4]


def user_of(project, env, domain, name):
    return {"login": f"{domain}-{name}", "password": "pw", "project_id": project, "env": env, "domain": domain}


async def test_a_client_sees_its_projects_alone(secured, looks):  # noqa: F811
    mine, theirs, gone = (str(uuid.uuid4()) for _ in range(3))
    async with caller(secured, "admin") as admin, caller(secured, "users:read", [uuid.UUID(mine)]) as api:
        for project in (mine, theirs):
            await make_users(admin, project, 2)
            lock = (await acquire(admin, project)).json()
            await admin.delete(f"/locks/{lock['id']}")
            await acquire(admin, project)
        (user,) = await make_users(admin, gone)
        await acquire(admin, gone)
        await admin.delete(f"/users/{user['id']}", params={"force": True})
        told = await overview(secured, api)
        assert [pool["project_id"] for pool in told["pools"]] == [mine]
        assert [lock["project_id"] for lock in told["locks"]["items"]] == [mine]
        assert told["locks"]["total"] == 1
        assert len(told["ended"]) == 1
        assert told == (await api.get("/overview", params={"project_id": mine})).json()
        assert slug(await api.get("/overview", params={"project_id": theirs})) == "forbidden"
        assert {tuple(projects) for projects, *_ in looks} == {(uuid.UUID(mine),)}
    async with caller(secured, "locks") as stranger:
        assert slug(await stranger.get("/overview")) == "forbidden"


# ---- Logins by how they begin ------------------------------------------------------------------------------


async def test_users_are_found_by_how_their_login_begins(api, project):
    logins = ["50%-a", "50%-b", "501", "a_b", "axb", "a\\b", "Ab", "bot", "ä1"]
    for login in logins:
        await make_users(api, project, login=login, labels={"role": "admin"} if login == "a\\b" else {})

    async def found(prefix, **query):
        answer = await api.get("/users", params={"project_id": project, "login_prefix": prefix} | query)
        return [user["login"] for user in answer.json()["items"]], answer.json()["next"]

    for prefix in ("5", "50%", "50%-b", "a_", "a\\", "a", "A", "%", "ä", "bots"):
        assert await found(prefix) == ([login for login in logins if login.startswith(prefix)], None)
    page, more = await found("50", limit=2)
    assert page == ["50%-a", "50%-b"]
    assert await found("50", limit=2, cursor=more) == (["501"], None)
    exported = await api.get("/users/export", params={"project_id": project, "login_prefix": "50%"})
    assert len(exported.text.splitlines()) == 2
    assert await found("a", label="role:admin") == (["a\\b"], None)
    assert await found("a", login="axb") == (["axb"], None)
    assert await found("a", state="locked") == ([], None)


@pytest.mark.parametrize(
    "query",
    [{"login_prefix": ""}, {"login_prefix": "x" * 255}, {"login_prefix": "a\0"}, {"login_prefix": "a\x85"},
     {"login_prefix": ["a", "b"]}, {"login_prefx": "a"}, {"login_suffix": "a"}],
    ids=str,
)  # fmt: skip
async def test_a_prefix_that_is_none_is_refused(api, query):
    for path in ("/users", "/users/export"):
        answer = await api.get(path, params=query)
        assert slug(answer) == "invalid"
        assert answer.json()["errors"][0]["field"] == next(iter(query))


async def test_an_index_leads_to_logins_whatever_the_collation(empty_database):
    plan = "explain select from users where login like 'bot-1%'"
    rows = await execute(empty_database, "set enable_seqscan = off", plan)
    index = "a login is unique within a project and env"
    assert index in "".join(row[0] for row in rows)
    (row,) = await execute(empty_database, f"""select pg_get_indexdef('"{index}"'::regclass)""")
    assert "text_pattern_ops" in row[0]
