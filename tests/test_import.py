"""Import and its many ways to be wrong."""

from __future__ import annotations

import asyncio
import json
import time
import uuid

import asyncpg
import pytest
from conftest import acquire, make_users, slug

import farm.imports
import farm.passwords
import farm.settings
from farm.imports import CHUNK

CSV = {"Content-Type": "text/csv"}
NDJSON = {"Content-Type": "application/x-ndjson"}


def ndjson(project, *users):
    return "\n".join(json.dumps({"project_id": project, "env": "stage", "password": "p"} | user) for user in users)


async def send(api, content, headers=NDJSON):
    return await api.post("/users/import", content=content, headers=headers)


async def test_an_import_creates_updates_and_leaves_alone(api, project):
    await make_users(api, project, 3)
    lock = (await api.put(f"/users/{(await known(api, project, 'bot-1'))['id']}/lock")).json()
    lines = [
        {"login": "bot-0", "password": "pw-0"},
        {"login": "bot-1", "password": None, "labels": {"role": "admin"}, "domain": "canary"},
        {"login": "bot-2", "password": "new"},
        {"login": "brand-new", "password": "p"},
    ]
    answer = await send(api, ndjson(project, *lines))
    assert (answer.status_code, answer.json()) == (200, {"created": 1, "updated": 2, "unchanged": 1})
    changed = await known(api, project, "bot-1")
    assert (changed["domain"], changed["labels"], changed["state"]) == ("canary", {"role": "admin"}, "locked")
    assert (await api.delete(f"/locks/{lock['id']}")).status_code == 204
    assert (await acquire(api, project, domain="canary")).json()["user"]["password"] == "pw-1"
    granted = {}
    while (answer := await acquire(api, project, domain="regular")).status_code == 201:
        granted[answer.json()["user"]["login"]] = answer.json()["user"]["password"]
    assert granted == {"bot-0": "pw-0", "bot-2": "new", "brand-new": "p"}


async def known(api, project, login):
    (user,) = (await api.get("/users", params={"project_id": project, "login": login})).json()["items"]
    return user


async def test_csv_has_quotes_labels_and_windows_line_ends(api, project):
    text = (
        "\ufefflogin,password,project_id,env,domain,label.role,label.note\r\n"
        f'one,"p,1",{project},stage,,admin,"say ""hi"""\r\n'
        f'two,"line\nbreak",{project},prod,canary,,\r\n'
        "\r\n"
        f"three,p3,{project},prod,regular,,é"
    )
    assert (await send(api, text.encode(), CSV)).json() == {"created": 3, "updated": 0, "unchanged": 0}
    assert (await known(api, project, "one"))["labels"] == {"role": "admin", "note": 'say "hi"'}
    assert (await acquire(api, project, env="prod", domain="canary")).json()["user"]["password"] == "line\nbreak"
    assert (await known(api, project, "three"))["labels"] == {"note": "é"}
    assert (await send(api, text.encode(), CSV)).json() == {"created": 0, "updated": 0, "unchanged": 3}


async def test_a_csv_record_of_several_lines_counts_as_its_first(api, project):
    """Also in the error about a login that stands there twice."""
    text = (
        f'login,password,project_id,env\none,"p\n\nq",{project},stage\none,p,{project},stage\ntwo,"\n",{project},moon\n'
    )
    errors = (await send(api, text.encode(), CSV)).json()["errors"]
    assert [(error["line"], error["field"]) for error in errors] == [(5, "login"), (6, "env")]
    assert "stands in the lines 2 and 5" in errors[0]["message"]


@pytest.mark.parametrize(
    ("lines", "errors"),
    [
        (["{"], [(1, None)]),
        (['{"login": "a"}'], [(1, "project_id")]),
        (["[]"], [(1, None)]),
        (["", '{"x": 1}'], [(2, "x")]),
        (['{"x": 1, "login": 5, "y": 2}', '{"login": 5, "env": 5}'], [(1, "x"), (1, "y"), (2, "login")]),
        ([b"\xff\xfe"], [(1, None)]),
        ([b"\x00"], [(1, None)]),
        (["[" * 10_000], [(1, None)]),
        (["x" * 70_000, '{"login": 1}'], [(1, None), (2, "login")]),
    ],
)
async def test_a_bad_line_is_named_and_nothing_is_stored(api, project, lines, errors):
    good = ndjson(project, {"login": "good"}).encode()
    content = b"\n".join([line if isinstance(line, bytes) else line.encode() for line in lines] + [good])
    answer = await send(api, content)
    assert slug(answer) == "invalid"
    assert [(error["line"], error["field"]) for error in answer.json()["errors"]] == errors
    assert (await api.get("/users", params={"project_id": project})).json()["items"] == []


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("", [(1, None)]),
        ("login,shoe\n", [(1, None), (1, "env"), (1, "project_id")]),
        ("login,password,project_id,env\ra,p,{project},stage\r", [(1, None)]),
        ('login,password,project_id,env\na,p"q,{project},stage\nb,p"q,{project},stage\n', [(2, None)]),
        ("login,login,project_id,env\n", [(1, "login")]),
        ("login,project_id,env,label.a b\n", [(1, None)]),
        ("login,project_id,env\na,b\n", [(2, None)]),
        ('login,project_id,env\n"a,{project},stage\n', [(2, None)]),
        ("login,project_id,env\na,{project},moon\n,{project},stage\n", [(2, "env"), (3, "login")]),
        ("login,project_id,env\na,{project},stage\n", [(2, "password")]),
        ('login,project_id,env\n"a"b,{project},stage\n', [(2, None)]),
        ("login,project_id,env\na\x00,{project},stage\n", [(2, "login")]),
        ("login,password,project_id,env\na,\x00,{project},stage\n", [(2, "password")]),
    ],
)
async def test_bad_csv_is_named_by_line(api, project, text, errors):
    answer = await send(api, text.replace("{project}", project).encode(), CSV)
    assert slug(answer) == "invalid"
    told = [(error["line"], error["field"]) for error in answer.json()["errors"]]
    assert sorted(told, key=str) == sorted(errors, key=str)


@pytest.mark.parametrize("password", ["Password!", "Label.hunter2", "E-n-v"])
async def test_without_a_header_no_password_is_shown_whatever_it_looks_like(api, project, password):
    answer = await send(api, f"bot-1,{password},{project},stage\n".encode(), CSV)
    assert slug(answer) == "invalid"
    assert [error["line"] for error in answer.json()["errors"]] == [1] * 7
    assert password not in answer.text


async def test_a_login_twice_in_a_file_names_both_lines(api, project):
    users = [{"login": "a"}, {"login": "b"}, {"login": "a"}, {"login": "a", "env": "prod"}]
    answer = await send(api, ndjson(project, *users))
    (error,) = answer.json()["errors"]
    assert (error["line"], error["field"]) == (3, "login")
    assert "1" in error["message"]
    assert "3" in error["message"]


async def test_only_the_first_hundred_errors_are_told(api, project):
    answer = await send(api, "\n".join(["{}"] * 500))
    assert [error["line"] for error in answer.json()["errors"]] == list(range(1, 101))


def test_after_a_hundred_errors_no_line_is_looked_at_any_more():
    """All 20,000 that fit into one part of a body would hold up every other call for a second."""
    file = farm.imports.NdjsonFile(farm.settings.Settings(), farm.passwords.Passwords(None), None)
    assert list(file.feed(b"{}\n" * 20_000)) == []
    assert len(file.errors) == 100


@pytest.mark.parametrize("header", [b"," * 60_000, b"login," * 10_000])
def test_after_a_hundred_errors_no_column_is_looked_at_any_more(header):
    file = farm.imports.CsvFile(farm.settings.Settings(), farm.passwords.Passwords(None), None)
    assert list(file.feed(header + b"\n")) == []
    assert 100 <= len(file.errors) <= 103  # with the columns that are missing


@pytest.mark.parametrize("sign", [b",", b";"])
def test_a_header_that_is_one_long_word_is_read_in_no_time(sign):
    """The pattern of labels took two minutes for it, in which nobody was answered."""
    file = farm.imports.CsvFile(farm.settings.Settings(), farm.passwords.Passwords(None), None)
    begin = time.monotonic()
    assert list(file.feed(b"login,env," + sign.join([b"label." + b"!" * 30_000 + b" x"] * 2) + b"\n")) == []
    assert time.monotonic() - begin < 10
    assert file.errors


async def test_what_is_no_import_is_refused(api, project, service, monkeypatch):
    assert slug(await send(api, "{}", {"Content-Type": "application/json"})) == "unsupported-media-type"
    assert (await send(api, "")).json() == {"created": 0, "updated": 0, "unchanged": 0}
    monkeypatch.setattr(service.farm, "settings", farm.settings.Settings(max_import=2000))
    assert slug(await send(api, "\n" * 2001)) == "body-too-large"


@pytest.mark.parametrize("change", ["made", "deleted", "renamed", "replaced"])
@pytest.mark.parametrize("labels", [{}, {"n": "1"}], ids=["unchanged", "updated"])
async def test_users_of_the_file_that_others_make_delete_or_rename_meanwhile_refuse_it_whole(
    api, project, change, labels
):
    """They are compared when their lines arrive, and once more at the end."""
    (user,) = await make_users(api, project)
    lines = [{"login": "bot-0", "password": "pw-0", "labels": labels}, *({"login": f"u{n}"} for n in range(CHUNK))]
    text = ndjson(project, *lines, {"login": "last"}).encode()

    async def slowly():
        yield text[:-10]
        await asyncio.sleep(0.5)
        if change == "made":
            await make_users(api, project, login="u7", password="other")
        elif change == "renamed":
            await api.patch(f"/users/{user['id']}", json={"login": "renamed"})
        else:
            await api.delete(f"/users/{user['id']}")
        if change == "replaced":
            await make_users(api, project, password="other")
        yield text[-10:]

    answer = await send(api, slowly())
    assert slug(answer) == "login-taken"
    assert "send it again" in answer.json()["detail"]
    listed = (await api.get("/users", params={"project_id": project})).json()["items"]
    expected = {"made": ["bot-0", "u7"], "deleted": [], "renamed": ["renamed"], "replaced": ["bot-0"]}[change]
    assert [(user["login"], user["labels"]) for user in listed] == [(login, {}) for login in expected]
    created = CHUNK + {"made": 0, "deleted": 2, "renamed": 2, "replaced": 1}[change]
    assert (await send(api, text)).json()["created"] == created
    for login, password in (("bot-0", "pw-0"), ("u7", "p")):
        user = await known(api, project, login)
        assert (await api.put(f"/users/{user['id']}/lock")).json()["user"]["password"] == password


async def test_imports_and_changes_of_the_same_users_never_deadlock_into_an_error(api, project):
    users = await make_users(api, project, 40)
    order = [{"login": f"bot-{n}"} for n in range(40)]
    for round in range(6):
        domain = ["canary", "regular"][round % 2]
        lines = [line | {"domain": domain, "labels": {"r": str(round)}} for line in order]
        calls = [send(api, ndjson(project, *lines)), send(api, ndjson(project, *reversed(lines)))]
        calls += [api.patch(f"/users/{user['id']}", json={"domain": domain}) for user in users[:10]]
        calls += [api.delete(f"/users/{user['id']}?force=true") for user in users[30 + round : 31 + round]]
        calls += [acquire(api, project, holder=project) for _ in range(5)]
        calls += [api.delete("/locks", params={"holder": project}) for _ in range(3)]
        answers = await asyncio.gather(*calls)
        assert {answer.status_code for answer in answers} <= {200, 201, 204, 404, 409}


async def test_an_import_that_is_a_deadlocks_victim_tries_again(api, project, database):
    """It locks the first user and waits for the second, as another call wants them the other way round."""
    first, second = await make_users(api, project, 2)
    other = await asyncpg.connect(database)
    try:
        async with other.transaction():
            await other.execute(f"select from users where id = '{second['id']}' for update")
            lines = [{"login": f"bot-{n}", "labels": {"n": "1"}} for n in range(2)]
            job = asyncio.create_task(send(api, ndjson(project, *lines)))
            await asyncio.sleep(0.5)  # PostgreSQL looks for a deadlock after a second, and ends who looked
            await other.execute(f"select from users where id = '{first['id']}' for update")
    finally:
        await other.close()
    assert (await job).json() == {"created": 0, "updated": 2, "unchanged": 0}


async def test_acquires_and_releases_go_on_during_an_import(api, project):
    """Also of users in the file. The bound is the contract's 200 ms, five times over: a stall is seconds."""
    await make_users(api, project, 5)
    lines = [{"login": f"bot-{n}", "labels": {"n": "1"}, "domain": "canary"} for n in range(5)]
    lines += [{"login": f"u{n}", "password": "p"} for n in range(20_000)]
    job = asyncio.create_task(send(api, ndjson(project, *lines)))
    slowest, cycles = 0.0, 0
    while not job.done():
        begun = time.monotonic()
        answer = await acquire(api, project)
        assert answer.status_code in (201, 409)
        if answer.status_code == 201:
            assert (await api.delete(f"/locks/{answer.json()['id']}")).status_code == 204
        slowest, cycles = max(slowest, time.monotonic() - begun), cycles + 1
    assert (await job).json() == {"created": 20_000, "updated": 5, "unchanged": 0}
    assert cycles > 20
    assert slowest < 1


async def test_an_import_that_is_cut_off_stores_nothing(api, project):
    async def broken():
        yield ndjson(project, {"login": "a"}).encode() + b"\n"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await send(api, broken())
    await asyncio.sleep(0.2)
    assert (await api.get("/users", params={"project_id": project})).json()["items"] == []


async def test_two_imports_of_the_same_file_at_once_agree(api, project):
    """Where they overlap, one of them is to be sent again, and changes nothing then."""
    text = ndjson(project, *({"login": f"u{n}"} for n in range(2000)))
    answers = await asyncio.gather(send(api, text), send(api, text))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert [slug(answer) for answer in refused] in ([], ["login-taken"])
    assert sum(answer.json()["created"] for answer in answers if answer not in refused) == 2000
    assert (await send(api, text)).json() == {"created": 0, "updated": 0, "unchanged": 2000}
    exported = await api.get("/users/export", params={"project_id": project})
    assert len(exported.text.splitlines()) == 2000
    assert uuid.UUID(json.loads(exported.text.splitlines()[0])["id"])


async def test_locks_that_come_and_go_meanwhile_refuse_nothing(api, project):
    """Also of users that the file changes, while it is on its way."""
    users = await make_users(api, project, 3)
    held = (await api.put(f"/users/{users[1]['id']}/lock")).json()
    lines = [{"login": f"bot-{n}", "password": f"pw-{n}", "domain": "canary"} for n in range(3)]
    text = ndjson(project, *lines, *({"login": f"u{n}"} for n in range(CHUNK))).encode()
    taken = {}

    async def slowly():
        yield text[:-10]
        await asyncio.sleep(0.5)
        taken.update((await api.put(f"/users/{users[0]['id']}/lock")).json())
        assert (await api.delete(f"/locks/{held['id']}")).status_code == 204
        yield text[-10:]

    assert (await send(api, slowly())).json() == {"created": CHUNK, "updated": 3, "unchanged": 0}
    assert (await api.get(f"/locks/{taken['id']}")).json()["user"]["domain"] == "canary"
    assert (await api.delete(f"/locks/{taken['id']}")).status_code == 204
