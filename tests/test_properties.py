"""Filters, labels and limits against plain Python."""

from __future__ import annotations

import json
import re
import uuid

import httpx
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import farm.words

KEYS, VALUES = ["role", "team"], ["a", "b", ""]
labels = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES))
wishes = st.fixed_dictionaries(
    {"labels": labels},
    optional={"env": st.sampled_from(["prod", "stage"]), "domain": st.sampled_from(["canary", "regular"])},
)
users = st.fixed_dictionaries(
    {"labels": labels, "env": st.sampled_from(["prod", "stage"]), "domain": st.sampled_from(["canary", "regular"])}
)
relaxed = settings(max_examples=examples(100), deadline=None, suppress_health_check=list(HealthCheck))


def fits(user, wish):
    """The oracle."""
    same = all(user[name] == wish[name] for name in ("env", "domain") if name in wish)
    return same and all(user["labels"].get(key) == value for key, value in wish["labels"].items())


@pytest.fixture(scope="module")
def http(service):
    with httpx.Client(base_url=service.url, timeout=30) as opened:
        yield opened


@relaxed
@given(st.lists(users, max_size=8), wishes)
def test_lists_and_acquires_take_exactly_what_fits(http, made, wish):
    project = str(uuid.uuid4())
    lines = [
        json.dumps(user | {"login": f"u{n}", "password": "p", "project_id": project}) for n, user in enumerate(made)
    ]
    assert (
        http.post("/users/import", content="\n".join(lines), headers={"Content-Type": farm.words.NDJSON}).status_code
        == 200
    )
    expected = {f"u{number}" for number, user in enumerate(made) if fits(user, wish)}
    query = [("project_id", project), *((k, v) for k, v in wish.items() if k != "labels")]
    query += [("label", f"{key}:{value}") for key, value in wish["labels"].items()]
    listed = http.get("/users", params=query).json()["items"]
    assert {user["login"] for user in listed} == expected
    taken = set()
    while (answer := http.post("/locks", json=wish | {"project_id": project})).status_code == 201:
        taken.add(answer.json()["user"]["login"])
    assert taken == expected
    assert answer.status_code == (409 if expected else 404)


def plain(text):
    return not re.search("[\x00-\x1f\x7f-\x9f]", text)


@relaxed
@given(st.text(max_size=300))
def test_any_text_is_a_login_or_a_clear_refusal(http, text):
    """The oracle: 1 to 254 characters, none of them a control character."""
    body = {"login": text, "password": "p", "project_id": str(uuid.uuid4()), "env": "prod"}
    answer = http.post("/users", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == (201 if 1 <= len(text) <= 254 and plain(text) else 422)
    if answer.status_code == 201:
        assert answer.json()["login"] == text


@relaxed
@given(st.text(min_size=1, max_size=20))
def test_any_password_comes_back_as_it_was_sent(http, text):
    project = str(uuid.uuid4())
    body = {"login": "x", "password": text, "project_id": project, "env": "prod"}
    answer = http.post("/users", content=json.dumps(body), headers={"Content-Type": "application/json"})
    if "\x00" in text:
        assert answer.status_code == 422
    else:
        assert http.post("/locks", json={"project_id": project}).json()["user"]["password"] == text


@relaxed
@given(st.binary(max_size=200))
def test_any_bytes_as_a_body_are_a_clear_refusal(http, body):
    answer = http.post("/locks", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["type"] in ("urn:botfarm:malformed-body", "urn:botfarm:invalid")


@relaxed
@given(st.binary(max_size=400), st.sampled_from([farm.words.CSV, farm.words.NDJSON]))
def test_any_bytes_as_an_import_are_a_clear_refusal(http, body, media):
    answer = http.post("/users/import", content=body, headers={"Content-Type": media})
    assert answer.status_code in (200, 422)
    if answer.status_code == 200:
        assert answer.json() == {"created": 0, "updated": 0, "unchanged": 0}
