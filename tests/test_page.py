"""The dashboard in a real browser: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import tarfile
import uuid
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from conftest import (
    acquire,
    client,
    execute,
    free_port,
    long_chapter,
    make_users,
    process,
    serving,
    settings,
    wait_ready,
)
from playwright.async_api import Page, async_playwright, expect
from test_auth import add_client, secure

import farm.clients

long_chapter("drives a browser for a minute")

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium: Debian has it in the package of that name")
AXE = "axe-core@4.14.1"
STRAY = re.compile("Failed to load resource")  # what chromium says of a reply that is no 2xx
PATIENCE = 60_000  # milliseconds: how long a busy machine may take for what takes a moment
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
async def browser():
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        await browser.close()


@asynccontextmanager
async def looking(browser, url, path="/", **options):
    """A page of its own context. Its `told` is what went to the console, its `asked` are the addresses it went to."""
    context = await browser.new_context(**{"viewport": {"width": 1440, "height": 900}} | options)
    page = await context.new_page()
    page.set_default_timeout(PATIENCE)
    page.told, page.asked = [], []
    page.on("console", lambda message: page.told.append(message.text))
    page.on("pageerror", lambda error: page.told.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    try:
        await page.goto(url + path)
        yield page
        assert [text for text in page.told if not STRAY.match(text)] == []
        assert [address for address in page.asked if not address.startswith((url, "blob:", "data:"))] == []
    finally:
        await context.close()


@pytest.fixture
def own(empty_database):
    with serving(settings(empty_database)) as running:
        running.database = empty_database
        yield running


@pytest.fixture
async def http(own):
    async with client(own.url) as opened:
        yield opened


@pytest.fixture
async def page(browser, own, http, project):
    """A page that looks at three users, one of which `ada` holds."""
    await make_users(http, project, 3)
    await acquire(http, project, holder="ada", ttl=600)
    async with looking(browser, own.url) as opened:
        await expect(opened.locator("#users tr")).to_have_count(1)
        yield opened


def button(page: Page, name: str):
    return page.get_by_role("button", name=name, exact=True)


def dialog(page: Page):
    return page.locator("#ask")


async def state_of(http, **query):
    return [(user["login"], user["state"]) for user in (await http.get("/users", params=query)).json()["items"]]


# ---- What it shows -----------------------------------------------------------------------------------------


async def test_it_shows_who_holds_what_and_what_happened_and_no_secret(browser, own, http, project):
    await make_users(http, project, 4)
    gone, held = [(await acquire(http, project, holder=holder, ttl=600)).json() for holder in ("eve", "ada")]
    await http.delete(f"/locks/{gone['id']}", params={"cooldown": 300})
    await acquire(http, project, holder="bob", ttl=900)
    read = []
    async with looking(browser, own.url) as page:
        page.on("response", lambda answer: read.append(answer))
        await expect(page.locator("#pools .shares")).to_have_text("1 free2 locked1 resting0 quarantined")
        await expect(page.locator("#pools .bar")).to_have_attribute(
            "aria-label", "1 free, 2 locked, 1 resting, 0 quarantined"
        )
        await expect(page.locator("#users tr")).to_contain_text([f"{held['user']['login']}", "bob"])
        await expect(page.locator("#users td.time time").nth(1)).to_have_text(re.compile(r"^[89] min \d\d s$"))
        await expect(page.locator("#lately li")).to_contain_text([f"{gone['user']['login']} given back by eve"])
        await page.get_by_text("Resting", exact=True).click()
        await expect(page.locator("#users td.time").nth(1)).to_have_text(re.compile(r"^[34] min \d\d s$"))
        await button(page, gone["user"]["login"]).first.click()
        await expect(page.locator("#drawer .why")).to_contain_text(re.compile(r"free again at \d\d:\d\d, in [34] min"))
        await expect(page.locator("#drawer .chart")).to_have_attribute("aria-label", re.compile("In use 0 %"))
        text = await page.content() + "".join([await answer.text() for answer in read])
        assert page.told == []
        for secret in (gone["id"], held["id"], "pw-0", "pw-1"):
            assert secret not in text


async def test_it_shows_who_waits_and_puts_the_worst_pool_first(browser, own, http, project):
    await make_users(http, project, 2)
    await make_users(http, project, 1, env="prod")
    await acquire(http, project, env="prod", ttl=600)
    waits = asyncio.create_task(acquire(http, project, env="prod", wait=300))
    async with looking(browser, own.url) as page:
        await expect(page.locator("#pools li").first).to_contain_text(re.compile("prod.*1 call waits, the longest for"))
        await expect(page.locator("#pools li").first).to_contain_text(re.compile("The next comes free in [89] min"))
        await expect(page).to_have_title("1 waiting · BotFarm")
        (user,) = (await http.get("/users", params={"env": "prod"})).json()["items"]
        await http.delete(f"/users/{user['id']}/lock")
        await waits
        await expect(page).to_have_title("BotFarm")


async def test_a_new_farm_shows_the_two_lines_that_create_and_acquire_the_first_user(browser, own):
    async with looking(browser, own.url) as page:
        await expect(page.locator("#empty")).to_be_visible()
        lines = (await page.locator("#first").inner_text()).splitlines()
        assert len(lines) == 2
        for line in lines:
            done = await asyncio.to_thread(subprocess.run, line + " -sf", shell=True, capture_output=True, check=True)
            assert json.loads(done.stdout)["id"]
        await expect(page.locator("#users tr")).to_contain_text(["ada"])
        await expect(page.locator("#empty")).to_be_hidden()


async def test_long_lists_are_cut_and_say_so_and_a_search_goes_to_the_service(browser, own, http, project):
    await make_users(http, project, 1, login="zoe")
    await acquire(http, project, ttl=3600, holder="late")
    lines = [{"login": f"bot-{n:03}", "password": "p", "project_id": project, "env": "stage"} for n in range(210)]
    lines += [{"login": "x", "password": "p", "project_id": str(uuid.uuid4()), "env": "prod"} for _ in range(31)]
    file = "\n".join(json.dumps(line) for line in lines)
    await http.post("/users/import", content=file, headers={"Content-Type": "application/x-ndjson"})
    for _ in range(210):
        await acquire(http, project, env="stage", ttl=600, holder="early")
    async with looking(browser, own.url) as page:
        await expect(page.locator("#users-count")).to_contain_text("the 200 of 211 that end first")
        await expect(page.locator("#pools-count")).to_contain_text("the 30 worst of 32")
        await expect(page.locator("#pools li")).to_have_count(30)
        await page.get_by_label("Login begins with").fill("zo")
        await expect(page.locator("#users tr")).to_contain_text(["zoe"])
        await page.get_by_label("Login begins with").fill("")
        await page.get_by_label("Holder").fill("late")
        await expect(page.locator("#users tr")).to_contain_text(["zoe"])


async def end_with(http, user, outcome, **body):
    """A lock of this user that ended so."""
    lock = (await http.put(f"/users/{user['id']}/lock", json=body)).json()
    assert (await http.delete(f"/locks/{lock['id']}", params={"outcome": outcome})).status_code == 204


async def test_it_tells_how_each_lock_went(browser, own, http, project):
    users = await make_users(http, project, 4)
    for user, outcome in zip(users, ("passed", "failed", "bad-login"), strict=False):
        await end_with(http, user, outcome, holder="eve", note="run 7")
    async with looking(browser, own.url) as page:
        told = [f"bot-{number} given back by eve: {how}" for number, how in enumerate(("passed", "failed"))]
        await expect(page.locator("#lately li")).to_contain_text(
            ["bot-2 given back by eve: the login did not work", *reversed(told)]
        )
        await button(page, "bot-1").click()
        await expect(page.locator("#drawer .past li")).to_have_text(
            re.compile(r"^\d\d:\d\d given back by eve: failed after \d s+run 7$")
        )
        await page.get_by_text("Free", exact=True).click()
        await button(page.locator("#users"), "bot-3").click()
        await expect(page.locator("#drawer .title")).to_have_text("bot-3")
        await expect(page.locator("#drawer .past li")).to_have_count(0)


async def test_accounts_that_fail_and_their_pools_come_first(browser, own, http, project):
    users = await make_users(http, project, 3)
    (broken, other, _) = await make_users(http, project, 3, env="prod")
    await make_users(http, project, 1, env="preprod")
    await acquire(http, project, env="preprod")  # nobody is free there, which would else be the worst
    for user in (broken, other, users[2]):
        await end_with(http, user, "bad-login")
    await end_with(http, other, "passed")
    for _ in range(2):
        await end_with(http, users[2], "bad-login")  # the third time: it is quarantined
    await http.post(f"/users/{users[1]['id']}/quarantine", json={"reason": "by hand"})
    async with looking(browser, own.url) as page:
        await expect(page.locator("#pools li")).to_contain_text(["stage", "prod", "preprod"])
        sentence = "1 account fails: the last login did not work."
        await expect(page.locator("#pools .wait")).to_contain_text([sentence, sentence, "The next comes free in"])
        await expect(page.locator("#sums .bad")).to_contain_text(["quarantined2", "failing2"])
        await page.get_by_text("Free", exact=True).click()
        row = page.locator("#users tr")
        await expect(row.first).to_contain_text(re.compile("bot-0.*the login did not work.*prod"))
        await expect(row.get_by_text("the login did not work")).to_have_count(1)
        await page.get_by_text("Quarantined", exact=True).click()
        await expect(row).to_contain_text([re.compile("bot-2.*the login did not work"), "bot-1"])


@pytest.mark.parametrize(
    ("note", "links"),
    [
        ("see https://ci.test/run/7?a=1&b=2.", ["https://ci.test/run/7?a=1&b=2"]),
        ("HTTP://a.test and https://b.test", ["http://a.test/", "https://b.test/"]),
        ("javascript:alert(1) data:text/html,x <img src=x onerror=alert(1)> <a href=https:x>", []),
    ],
)
async def test_a_note_is_text_and_only_its_web_addresses_are_links(browser, own, http, project, note, links):
    await make_users(http, project)
    lock = (await acquire(http, project, note=note, ttl=600)).json()
    async with looking(browser, own.url) as page:
        await expect(page.locator("#users tr")).to_contain_text([note])
        await button(page, "bot-0").click()
        await expect(page.locator("#drawer .why")).to_contain_text(f"Note: {note}")
        await expect(page.locator("#drawer .past li")).to_contain_text([note])
        for place in ("#users", "#drawer .why", "#drawer .past"):
            found = await page.eval_on_selector_all(f"{place} a", "links => links.map((link) => link.href)")
            assert found == links
        await http.patch(f"/locks/{lock['id']}", json={"note": "handed over", "holder": "bob"})
        await expect(page.locator("#users tr")).to_contain_text([re.compile("bob.*handed over")])
        await expect(page.locator("#drawer .past li")).to_contain_text([re.compile("held by bob.*handed over")])
        assert await page.locator("#users a").count() == 0


async def test_the_drawer_tells_whether_there_is_a_session_and_whether_there_are_codes(browser, own, http, project):
    await make_users(http, project, 1, totp="JBSWY3DPEHPK3PXP")
    lock = (await acquire(http, project)).json()
    async with looking(browser, own.url) as page:
        await button(page, "bot-0").click()
        await expect(page.locator("#drawer .more")).to_have_text("It has no session and gives one-time codes.")
        await http.put(f"/locks/{lock['id']}/session", json={"cookies": "canary-session"})
        user = lock["user"]["id"]
        await http.patch(f"/users/{user}", json={"totp": None, "labels": {"changed": "yes"}})
        await http.delete(f"/locks/{lock['id']}")  # a change that the overview tells
        await expect(page.locator("#drawer .more")).to_have_text("It has a live session and no one-time codes.")
        memory = await reachable(page)
        assert [secret for secret in ("canary-session", "JBSWY3DPEHPK3PXP") if secret in memory] == []


@pytest.mark.parametrize("width", [360, 2560])
async def test_it_fits_narrow_and_wide_screens(browser, own, http, project, width):
    held, free = [(await make_users(http, project, 1, login=letter * 254))[0] for letter in "ab"]
    long = {"holder": "h" * 200, "note": "https://" + "n" * 492}
    await end_with(http, free, "bad-login", **long)
    await http.put(f"/users/{held['id']}/lock", json=long)
    widest = "Math.max(...['html', '#drawer', '#ask'].map((name) => document.querySelector(name).scrollWidth))"
    async with looking(browser, own.url, viewport={"width": width, "height": 800}) as page:
        await page.locator("#users button.link").first.click()
        await expect(page.locator("#drawer .state")).to_have_text("locked")
        assert await page.evaluate(widest) <= width
        await button(page, "Close").click()
        await page.get_by_text("Free", exact=True).click()
        await button(page.locator("#users"), free["login"]).click()
        await button(page, "Hold").click()
        assert await page.evaluate(widest) <= width


SITS = """([element, word]) => {
    const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT)
    while (walker.nextNode() && !walker.currentNode.data.includes(word)) ;
    const place = walker.currentNode.data.indexOf(word)
    const [one, other] = [0, 1].map((step) => {
        const range = document.createRange()
        range.setStart(walker.currentNode, place + step)
        range.setEnd(walker.currentNode, place + step + 1)
        return range.getBoundingClientRect().left
    })
    return one < other
}"""


async def test_a_name_that_turns_the_direction_of_writing_turns_no_sentence(browser, own, http, project):
    (user,) = await make_users(http, project, 1, login="\u202eada")
    await http.put(f"/users/{user['id']}/lock", json={"holder": "\u202ebob"})
    async with looking(browser, own.url, f"/?user={user['id']}") as page:
        await button(page, "Quarantine").click()
        for place, word in (("#drawer .why", "since"), ("#drawer .past li", "now"), ("#ask p", "stage")):
            element = await page.query_selector(place)
            assert await page.evaluate(SITS, [element, word]), place
        await button(dialog(page), "Cancel").click()
        await button(page.locator("#users"), "\u202ebob").click()
        await page.locator("#release-all").click()
        await expect(dialog(page)).to_contain_text("All come free")
        assert await page.evaluate(SITS, [await page.query_selector("#ask p"), "come free"])
        await button(dialog(page), "Cancel").click()
        await http.post(f"/users/{user['id']}/quarantine", json={"reason": "\u202eblocked"})
        await http.delete(f"/users/{user['id']}/lock")
        await expect(page.locator("#drawer .state")).to_have_text("quarantined")
        assert await page.evaluate(SITS, [await page.query_selector("#drawer .why"), "Nobody"])
        await button(page, "Put back").click()
        assert await page.evaluate(SITS, [await page.query_selector("#ask p"), "comes"])


# ---- The filter --------------------------------------------------------------------------------------------


async def test_the_filter_stands_in_the_address_and_survives_a_reload(browser, own, http, project):
    other = str(uuid.uuid4())
    await make_users(http, project, 2)
    await make_users(http, other, 1, login="other", env="prod", domain="canary")
    for holder in ("ada", "bob"):
        await acquire(http, project, holder=holder)
    await acquire(http, other, holder="eve")
    async with looking(browser, own.url) as page:
        await expect(page.locator("#users tr")).to_have_count(3)
        for name, value in (("Project", project), ("Env", "stage"), ("Domain", "regular")):
            await page.get_by_label(name).select_option(value)
        await page.get_by_label("Holder").fill("bob")
        await page.get_by_label("Login begins with").fill("bot-")
        await expect(page.locator("#users tr")).to_have_count(1)
        await expect(page).to_have_url(
            f"{own.url}/?project_id={project}&env=stage&domain=regular&holder=bob&login=bot-"
        )
        await page.reload()
        await expect(page.locator("#users tr")).to_contain_text(["bob"])
        await expect(page.get_by_label("Project")).to_have_value(project)
        await button(page, "Clear").click()
        await expect(page.locator("#users tr")).to_have_count(3)
        await expect(page).to_have_url(own.url + "/")
        await page.goto(f"{own.url}/?project_id=nonsense")
        await expect(page.locator("#filter-fault")).to_contain_text("nonsense")
        await button(page, "Add a user").click()
        await expect(dialog(page).get_by_label("Login")).to_be_visible()


# ---- Refreshing --------------------------------------------------------------------------------------------


async def test_a_refresh_loses_no_place_no_focus_and_no_selection(page, http, project):
    await page.locator("#users button.link").first.focus()
    await page.evaluate("getSelection().selectAllChildren(document.querySelector('#users td:nth-child(2)'))")
    selected = await page.evaluate("String(getSelection())")
    await page.evaluate("document.activeElement.was = true")
    await acquire(http, project, holder="bob", ttl=60)  # ends first, so it would stand first
    await expect(page.locator("#users tr")).to_have_count(2)
    assert await page.evaluate("document.activeElement.was")
    assert await page.evaluate("String(getSelection())") == selected
    assert await page.evaluate("document.querySelectorAll('#users tr')[0].textContent.includes('ada')")
    await http.delete("/locks", params={"holder": "ada"})  # the row that has the focus stays, and says that it is over
    await expect(page.locator("#users tr.gone")).to_contain_text(["ada"])
    assert await page.evaluate("document.activeElement.was")


# How often the page has read an answer, and set when it looks next.
COUNT_TURNS = """() => {
    window.turns = 0
    const set = window.setTimeout
    window.setTimeout = (run, ...rest) => {
        turns += run.name === "refresh"
        return set(run, ...rest)
    }
}"""


async def test_it_looks_every_two_seconds_and_every_ten_when_nothing_changes(browser, own, http, project):
    await make_users(http, project, 1)
    async with looking(browser, own.url) as page:
        await expect(page.locator("#pools li")).to_have_count(1)
        looks = lambda: sum("/overview" in address for address in page.asked)  # noqa: E731
        await page.clock.install()
        await page.reload()
        await expect(page.locator("#pools li")).to_have_count(1)
        await page.clock.pause_at(await page.evaluate("Date.now() / 1000 + 1"))  # it goes on by our word alone
        await page.evaluate(COUNT_TURNS)
        for turn in range(4):
            async with page.expect_response("**/overview") as answer:
                await page.clock.run_for(2100)
            assert (await answer.value).status == 304
            async with asyncio.timeout(PATIENCE / 1000):
                while await page.evaluate("turns") <= turn:
                    await page.wait_for_timeout(10)
        before = looks()
        await page.clock.run_for(9000)
        assert looks() == before
        await acquire(http, project)
        own.farm.glances._looks.clear()  # the page's time runs, and the service's second does not
        async with page.expect_response("**/overview"):
            await page.clock.run_for(1500)
        await expect(page.locator("#users tr")).to_have_count(1)
        async with page.expect_response("**/overview"):
            await page.clock.run_for(2100)
        hidden = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true})"
        await page.evaluate(f"{hidden % 'true'}; document.dispatchEvent(new Event('visibilitychange'))")
        before = looks()
        await page.clock.run_for(60_000)
        assert looks() == before
        async with page.expect_response("**/overview"):
            await page.evaluate(f"{hidden % 'false'}; document.dispatchEvent(new Event('visibilitychange'))")


async def test_it_says_since_when_there_is_no_answer_and_recovers(browser, empty_database, project):
    port = free_port()
    url, env = f"http://127.0.0.1:{port}", {"DATABASE_URL": empty_database, "BOTFARM_PORT": str(port)}
    with process("serve", env=env):
        wait_ready(url)
        async with client(url) as http:
            await make_users(http, project, 1)
        running = looking(browser, url)
        page = await running.__aenter__()
        await expect(page.locator("#pools li")).to_have_count(1)
    await expect(page.locator("#pulse")).to_have_text(re.compile(r"^no answer since \d\d:\d\d$"))
    await expect(page.locator("#said")).to_have_text(re.compile("no answer since"))
    before = len(page.asked)
    await page.wait_for_timeout(3000)
    assert len(page.asked) - before <= 2  # it backs off
    with process("serve", env=env):
        wait_ready(url)
        await expect(page.locator("#pulse")).to_have_text(re.compile("^as of"))
        await expect(page.locator("#said")).to_have_text("The service answers again.")
        await running.__aexit__(None, None, None)


async def test_ten_tabs_of_one_browser_all_follow(browser, own, http, project):
    await make_users(http, project, 1)
    context = await browser.new_context()
    tabs = [await context.new_page() for _ in range(10)]
    await asyncio.gather(*(tab.goto(own.url) for tab in tabs))
    await acquire(http, project, holder="ada")
    await asyncio.gather(*(expect(tab.locator("#users tr")).to_contain_text(["ada"]) for tab in tabs))
    await context.close()


async def test_a_list_follows_what_changes_no_count(browser, own, http, project):
    (user,) = await make_users(http, project)
    await http.post(f"/users/{user['id']}/quarantine", json={"reason": "first"})
    async with looking(browser, own.url, f"/?state=quarantined&user={user['id']}") as page:
        for place in (page.locator("#users tr"), page.locator("#drawer .why")):
            await expect(place).to_contain_text("first")
        await http.post(f"/users/{user['id']}/quarantine", json={"reason": "second"})
        for place in (page.locator("#users tr"), page.locator("#drawer .why")):
            await expect(place).to_contain_text("second")


async def test_a_drawer_that_was_opened_without_an_answer_gets_it_later_and_tells_of_a_deleted_user(page, http):
    (held,) = (await http.get("/users", params={"state": "locked"})).json()["items"]
    await page.context.set_offline(True)
    await button(page.locator("#users"), held["login"]).click()
    await expect(page.locator("#drawer .fault")).to_have_text("No answer, or not all of it: try again.")
    await page.context.set_offline(False)
    await expect(page.locator("#drawer .state")).to_have_text("locked")
    await expect(page.locator("#drawer .fault")).to_be_empty()
    await http.delete(f"/users/{held['id']}", params={"force": "true"})
    await expect(page.locator("#drawer .fault")).to_contain_text(held["id"])


async def test_an_older_answer_does_not_take_a_drawer_back(page, http):
    (held,) = (await http.get("/users", params={"state": "locked"})).json()["items"]
    go, asked = asyncio.Event(), []

    async def late(route):
        asked.append(route)
        answer = await route.fetch()
        if route is asked[0]:
            await go.wait()
        await route.fulfill(response=answer)

    await page.route(f"**/users/{held['id']}", late)
    async with page.expect_request(f"**/users/{held['id']}"):
        await button(page.locator("#users"), held["login"]).click()
    await page.wait_for_timeout(200)
    await http.delete(f"/users/{held['id']}/lock")
    await expect(page.locator("#drawer .state")).to_have_text("free")
    async with page.expect_response(lambda answer: answer.request == asked[0].request):
        go.set()
    await page.wait_for_timeout(200)
    assert await page.locator("#drawer .state").inner_text() == "free"


async def test_a_filter_that_was_typed_just_before_the_tab_was_hidden_holds_when_it_is_back(page, http, project):
    lock = (await acquire(http, project, holder="eve")).json()
    await http.delete(f"/locks/{lock['id']}")
    await expect(page.locator("#lately li")).to_have_count(1)
    hidden = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true})"
    await page.evaluate(hidden % "true")
    await page.get_by_label("Holder").fill("bob")
    await expect(page).to_have_url(re.compile("holder=bob"))
    await page.evaluate(f"{hidden % 'false'}; document.dispatchEvent(new Event('visibilitychange'))")
    await expect(page.locator("#lately li")).to_have_count(0, timeout=5000)


async def test_the_chart_of_a_drawer_follows_the_time_where_nothing_else_changes(page):
    await page.locator("#users button.link").first.click()
    await expect(page.locator("#drawer .chart")).to_have_attribute("aria-label", re.compile("In use 0 %"))

    async def later(route):
        answer = await route.fetch()
        date = format_datetime(datetime.now(UTC) + timedelta(hours=6), usegmt=True)
        await route.fulfill(response=answer, headers=answer.headers | {"date": date})

    await page.route(re.compile("/overview|/users"), later)
    await expect(page.locator("#drawer .chart")).to_have_attribute(
        "aria-label", re.compile("In use 25 %"), timeout=20_000
    )


async def test_a_row_follows_its_user_to_another_domain(page, http):
    (held,) = (await http.get("/users", params={"state": "locked"})).json()["items"]
    await expect(page.locator("#users tr")).to_contain_text(["stage · regular"])
    await http.patch(f"/users/{held['id']}", json={"domain": "canary"})
    await expect(page.locator("#users tr")).to_contain_text(["stage · canary"])


async def test_lately_names_a_user_as_it_is_called_now(page, http, project):
    lock = (await acquire(http, project, holder="eve")).json()
    await http.delete(f"/locks/{lock['id']}")
    await expect(page.locator("#lately li")).to_contain_text([f"{lock['user']['login']} given back by eve"])
    await http.patch(f"/users/{lock['user']['id']}", json={"login": "renamed"})
    await acquire(http, project, holder="bob")
    await expect(page.locator("#lately li")).to_contain_text(["renamed given back by eve"], timeout=5000)


# ---- Actions -----------------------------------------------------------------------------------------------


async def test_a_user_is_added_and_bad_input_gets_its_sentence_beside_the_field(page, http, project):
    await button(page, "Add a user").click()
    await dialog(page).get_by_label("Env").fill("moon")
    await button(dialog(page), "Add").click()
    await expect(page.locator("#fault-login")).to_contain_text("is not allowed")
    await dialog(page).get_by_label("Login").fill("new")
    await dialog(page).get_by_label("Password").fill("correct horse")
    await button(dialog(page), "Add").click()
    await expect(page.locator("#fault-env")).to_have_text('"moon" is not one of prod, preprod, stage')
    await expect(dialog(page).get_by_label("Env")).to_be_focused()
    await dialog(page).get_by_label("Env").fill("stage")
    await dialog(page).get_by_label("Labels").fill("role = admin\nlink=a=b")
    await button(dialog(page), "Add").click()
    await expect(page.locator("#said")).to_have_text("new was added.")
    await expect(page.locator("#pools .shares")).to_contain_text("3 free")
    (user,) = (await http.get("/users", params={"login": "new"})).json()["items"]
    assert (user["labels"], user["project_id"]) == ({"role": "admin", "link": "a=b"}, project)
    await button(page, "Add a user").click()
    await dialog(page).get_by_label("Login").fill("new")
    await dialog(page).get_by_label("Password").fill("x")
    await button(dialog(page), "Add").click()
    await expect(page.locator("#fault-login")).to_contain_text('The login "new" exists already')


async def test_a_file_is_imported_and_a_bad_one_tells_its_faults_by_line(page, http, project, tmp_path):
    good, bad = tmp_path / "users.csv", tmp_path / "bad.ndjson"
    rows = "".join(f"csv-{number},pw,{project},stage\n" for number in range(20_000))
    good.write_text("login,password,project_id,env\n" + rows)
    bad.write_text(json.dumps({"login": "a", "password": "p", "project_id": project, "env": "moon"}) + "\nnonsense\n")
    await button(page, "Import").click()
    await button(dialog(page), "Import").click()
    await expect(dialog(page)).to_contain_text("Choose a file.")
    await dialog(page).get_by_label("File").set_input_files(bad)
    await button(dialog(page), "Import").click()
    await expect(dialog(page).locator("li")).to_contain_text(
        ['line 1, env: "moon" is not one of', "line 2, all of it: "]
    )
    await dialog(page).get_by_label("File").set_input_files(good)
    bars = "new MutationObserver(() => window.bar ||= document.querySelector('progress'))"
    await page.evaluate(bars + ".observe(document.querySelector('#ask'), {childList: true, subtree: true})")
    await button(dialog(page), "Import").click()
    await expect(page.locator("#said")).to_have_text("20,000 users added, 0 changed, 0 as they were.")
    assert await page.evaluate("window.bar.getAttribute('value') === null && window.bar.max === 1")


async def test_an_import_that_a_proxy_refuses_is_told_and_can_be_tried_again(page, tmp_path):
    """As nginx does with a body over 1 MB, in HTML."""
    (file := tmp_path / "users.csv").write_text("login\n")
    html = {"status": 413, "content_type": "text/html", "body": "<html>Request Entity Too Large</html>"}
    await page.route("**/users/import", lambda route: route.fulfill(**html))
    await button(page, "Import").click()
    await dialog(page).get_by_label("File").set_input_files(file)
    await button(dialog(page), "Import").click()
    await expect(dialog(page)).to_contain_text("The service answered with 413.")
    await expect(button(dialog(page), "Import")).to_be_enabled()


async def test_cancel_stops_the_import_of_a_file_that_is_not_sent_yet(page, http, tmp_path):
    (file := tmp_path / "users.csv").write_text("login,password,project_id,env\n")
    sent = asyncio.Event()

    async def never(route):
        sent.set()
        await asyncio.sleep(1)
        await route.continue_()

    await page.route("**/users/import", never)
    await button(page, "Import").click()
    await dialog(page).get_by_label("File").set_input_files(file)
    await button(dialog(page), "Import").click()
    await sent.wait()
    async with page.expect_event("requestfailed"):
        await button(dialog(page), "Cancel").click()
    await expect(page.locator("#said")).to_have_text("Cancelled before the whole file was sent.")


async def test_a_file_that_was_changed_since_it_was_chosen_is_to_be_chosen_again(page, project, tmp_path):
    (file := tmp_path / "users.csv").write_text("login\n")
    await button(page, "Import").click()
    await dialog(page).get_by_label("File").set_input_files(file)
    await button(dialog(page), "Import").click()
    await expect(dialog(page).locator("li")).to_contain_text(["line 1, "])
    file.write_text(f"login,password,project_id,env\nnew,pw,{project},stage\n")
    os.utime(file, (10**9, 10**9))
    await button(dialog(page), "Import").click()
    await expect(dialog(page).locator(".fault")).to_have_text("The file has changed: choose it again.", timeout=5000)
    await dialog(page).get_by_label("File").set_input_files(file)
    await button(dialog(page), "Import").click()
    await expect(page.locator("#said")).to_have_text("1 user added, 0 changed, 0 as they were.")


async def test_users_are_exported(page, project):
    await page.get_by_label("Login begins with").fill("bot-1")
    await button(page, "Export").click()
    async with page.expect_download() as coming:
        await button(dialog(page), "Export").click()
    saved = await coming.value
    (user,) = map(json.loads, Path(await saved.path()).read_text().splitlines())
    assert (saved.suggested_filename, user["login"], "password" in user) == ("users.ndjson", "bot-1", False)


async def test_an_export_that_breaks_off_saves_nothing_and_says_so(page):
    await page.evaluate("""() => {
        const whole = Response.prototype.blob
        Response.prototype.blob = async function () {
            await whole.call(this)
            throw new TypeError("Failed to fetch")
        }
    }""")
    await button(page, "Export").click()
    await button(dialog(page), "Export").click()
    await expect(dialog(page).locator(".fault")).to_have_text("No answer, or not all of it: try again.", timeout=5000)


async def test_a_user_is_quarantined_with_a_reason_and_put_back(page, http):
    (held,) = (await http.get("/users", params={"state": "locked"})).json()["items"]
    await button(page, held["login"]).first.click()
    await button(page, "Quarantine").click()
    await expect(dialog(page)).to_contain_text(re.compile(f"{held['login']}.*is held by ada since.*That lock runs on"))
    await button(dialog(page), "Quarantine").click()
    await expect(page.locator("#fault-reason")).to_contain_text("is not allowed")
    await dialog(page).get_by_label("Reason").fill("login page says: blocked")
    await button(dialog(page), "Quarantine").click()
    await expect(page.locator("#drawer .why")).to_contain_text("then quarantined: login page says: blocked")
    await http.delete(f"/users/{held['id']}/lock")
    await expect(page.locator("#drawer .state")).to_have_text("quarantined")
    await page.get_by_text("Quarantined", exact=True).click()
    await expect(page.locator("#users tr")).to_contain_text(["login page says: blocked"])
    await button(page, "Put back").click()
    await expect(dialog(page)).to_contain_text("was taken out: “login page says: blocked”")
    await button(dialog(page), "Put back").click()
    await expect(page.locator("#drawer .state")).to_have_text("free")
    await expect(page.locator("#none")).to_have_text("No user that fits is quarantined.")


async def test_a_lock_is_released_by_force(page, http):
    await page.locator("#users tr").get_by_role("button", name="Release").click()
    await expect(dialog(page)).to_contain_text(re.compile("comes free at once.*is held by ada since"))
    await button(dialog(page), "Cancel").click()
    assert [state for _, state in await state_of(http)].count("locked") == 1
    await page.locator("#users tr").get_by_role("button", name="Release").click()
    await button(dialog(page), "Release by force").click()
    await expect(page.locator("#lately li.forced")).to_contain_text(["taken by force from ada"])
    assert {state for _, state in await state_of(http)} == {"free"}


async def test_everything_of_a_holder_is_released(page, http, project):
    await acquire(http, project, holder="ada")
    await acquire(http, project, holder="bob")
    await expect(page.locator("#users tr")).to_have_count(3)
    await button(page.locator("#users"), "ada").first.click()
    await button(page, "Release all of ada").click()
    await expect(dialog(page)).to_contain_text(re.compile("ada holds 2 users: bot-., bot-."))
    await button(dialog(page), "Release all").click()
    await expect(page.locator("#said")).to_have_text("2 locks of ada released.")
    await expect(page.locator("#none")).to_have_text("No user that fits is locked.")
    assert [state for _, state in await state_of(http)].count("locked") == 1


async def test_of_a_holder_whose_locks_ended_meanwhile_nothing_is_asked(page, http):
    await page.get_by_label("Holder").fill("ada")

    async def first(route):
        await http.delete("/locks", params={"holder": "ada"})
        await route.continue_()

    await page.route("**/users?*limit=1000", first)
    await button(page, "Release all of ada").click()
    await expect(page.locator("#said")).to_have_text("ada holds no user any more.", timeout=5000)
    await expect(dialog(page)).to_be_hidden()


async def reachable(page):
    """All that the page has: its document, what it keeps, and the memory of its scripts, as a debugger sees it."""
    kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
    parts = [await page.content(), await page.evaluate(kept)]
    debugger = await page.context.new_cdp_session(page)
    debugger.on("HeapProfiler.addHeapSnapshotChunk", lambda part: parts.append(part["chunk"]))
    await debugger.send("HeapProfiler.collectGarbage")
    await debugger.send("HeapProfiler.takeHeapSnapshot", {"reportProgress": False})
    await debugger.detach()
    return "".join(parts)


async def hold(page, login, name="ada", note="look at https://ci.test/7", minutes="30"):
    await page.get_by_text("Free", exact=True).click()
    await button(page.locator("#users"), login).click()
    await button(page, "Hold").click()
    await expect(dialog(page)).to_contain_text(f"{login} (stage · regular) is kept for you")
    for label, value in (("Your name", name), ("Minutes", minutes), ("Note", note)):
        await dialog(page).get_by_label(label).fill(value)
    await button(dialog(page), "Hold").click()


async def test_an_operator_holds_an_account_and_ends_it_and_the_page_gets_no_secret(browser, own, http, project):
    await make_users(http, project, 2, password="canary-password")
    (_, user) = (await http.get("/users")).json()["items"]
    async with looking(browser, own.url) as page:
        await hold(page, "bot-1")
        await expect(page.locator("#said")).to_have_text("bot-1 is held.")
        who = f"ada (hold {user['id'][-8:]})"
        await expect(page.locator("#drawer .why")).to_contain_text(f"Held by {who} since")
        await expect(page.locator("#drawer .why")).to_contain_text("Note: look at https://ci.test/7")
        held = (await http.get(f"/users/{user['id']}")).json()["lock"]
        assert (held["holder"], held["note"]) == (who, "look at https://ci.test/7")
        left = "select lock_id::text, extract(epoch from expires_at - acquired_at)::int from locks where holder <> ''"
        ((lock_id, seconds),) = await execute(own.database, left)
        assert seconds == 1800
        memory = await reachable(page)
        assert who in memory  # so what is not found there is not there
        assert [secret for secret in ("canary-password", lock_id) if secret in memory] == []
        await acquire(http, project, holder="ada")  # another lock of hers
        await button(page, "End the hold").click()
        await expect(dialog(page)).to_contain_text(f"{who} holds 1 user: bot-1. All come free at once.")
        await button(dialog(page), "End it").click()
        await expect(page.locator("#drawer .state")).to_have_text("free")
        assert await state_of(http) == [("bot-0", "locked"), ("bot-1", "free")]


async def test_a_hold_that_is_refused_tells_why(page, http, project):
    (user,) = (await http.get("/users", params={"login": "bot-2"})).json()["items"]
    await hold(page, "bot-2", minutes="0", note="n")
    await expect(page.locator("#fault-ttl")).to_contain_text("is not allowed")
    await expect(dialog(page).get_by_label("Minutes")).to_be_focused()
    await dialog(page).get_by_label("Minutes").fill("999999")
    await button(dialog(page), "Hold").click()
    await expect(page.locator("#fault-ttl")).to_contain_text("is over the longest ttl of")
    await http.put(f"/users/{user['id']}/lock", json={"holder": "bob"})
    await dialog(page).get_by_label("Minutes").fill("30")
    await button(dialog(page), "Hold").click()
    await expect(dialog(page).locator(".fault p")).to_contain_text('is held by "bob" until')
    await expect(page.locator("#fault-ttl")).to_be_empty()


async def test_of_two_operators_the_later_ends_no_lock_that_it_did_not_mean(page, browser, own, http, project):
    (held,) = (await http.get("/users", params={"state": "locked"})).json()["items"]
    await page.locator("#users tr").get_by_role("button", name="Release").click()
    async with looking(browser, own.url) as other:
        await other.locator("#users tr").get_by_role("button", name="Release").click()
        await button(dialog(other), "Release by force").click()
        await expect(other.locator("#none")).to_be_visible()
    assert (await http.put(f"/users/{held['id']}/lock", json={"holder": "next"})).status_code == 201
    await button(dialog(page), "Release by force").click()
    await expect(dialog(page)).to_contain_text(f"That lock has ended: {held['login']} is held by next now.")
    assert dict(await state_of(http))[held["login"]] == "locked"


async def test_what_goes_on_behind_a_closed_dialog_is_told_and_closes_no_other(page, http, project):
    go, fulfil = asyncio.Event(), {"status": 409, "json": {"detail": "no such luck"}}

    async def late(route):
        await go.wait()
        await (route.fulfill(**fulfil) if fulfil else route.continue_())

    await page.route("**/users", late)
    for said in ("no such luck", "new was added."):
        go.clear()
        await button(page, "Add a user").click()
        await dialog(page).get_by_label("Login").fill("new")
        await dialog(page).get_by_label("Password").fill("correct horse")
        await button(dialog(page), "Add").click()
        await button(dialog(page), "Cancel").click()
        await button(page, "Add a user").click()
        await dialog(page).get_by_label("Login").fill("typed meanwhile")
        go.set()
        await expect(page.locator("#said")).to_have_text(said)
        await expect(dialog(page).get_by_label("Login")).to_have_value("typed meanwhile")
        await button(dialog(page), "Cancel").click()
        fulfil.clear()


async def test_a_question_whose_look_came_late_takes_the_place_of_no_other(page, http):
    (held,) = (await http.get("/users", params={"state": "locked"})).json()["items"]
    go = asyncio.Event()

    async def late(route):
        await go.wait()
        await route.continue_()

    await page.route(f"**/users/{held['id']}", late)
    await page.locator("#users").get_by_role("button", name="Release").click()
    await button(page, "Add a user").click()
    await dialog(page).get_by_label("Login").fill("typed meanwhile")
    async with page.expect_response(f"**/users/{held['id']}"):
        go.set()
    await page.wait_for_timeout(200)
    await expect(dialog(page).get_by_label("Login")).to_have_value("typed meanwhile", timeout=1000)


async def test_an_action_without_an_answer_says_that_what_became_of_it_is_not_known(page):
    await page.locator("#users button.link").first.click()
    await button(page, "Quarantine").click()
    await dialog(page).get_by_label("Reason").fill("broken")
    await page.context.set_offline(True)
    await button(dialog(page), "Quarantine").click()
    await expect(dialog(page).locator(".fault")).to_have_text("No answer: whether this was done is not known.")
    await page.context.set_offline(False)
    await button(dialog(page), "Quarantine").click()
    await expect(page.locator("#drawer .why")).to_contain_text("then quarantined: broken")


# ---- Who looks ---------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(empty_database, monkeypatch):
    monkeypatch.setattr(farm.clients.Gate, "LIFE", 62)  # the page renews a token a minute before its end
    with serving(secure(empty_database)) as running:
        running.database = empty_database
        yield running


async def sign_in(page, who):
    await page.get_by_label("Client id").fill(who.id)
    await page.get_by_label("Secret").fill(who.secret)
    await button(page, "Sign in").click()


async def test_a_client_signs_in_and_its_token_is_renewed_and_kept_in_memory_alone(browser, guarded, project):
    boss = await add_client(guarded.database, "admin")
    async with looking(browser, guarded.url) as page:
        await page.get_by_label("Client id").fill(boss.id)
        await page.get_by_label("Secret").fill("wrong")
        await button(page, "Sign in").click()
        await expect(page.locator("#entry-fault")).to_have_text("Unknown client or wrong secret.")
        await sign_in(page, boss)
        await expect(page.locator("#empty")).to_be_visible()
        async with asyncio.timeout(PATIENCE / 1000):
            while sum(address.endswith("/token") for address in page.asked) < 4:
                await page.wait_for_timeout(50)
        kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
        assert boss.secret not in await page.content()
        assert await page.evaluate(kept) == json.dumps([{}, {}, "", guarded.url + "/"], separators=(",", ":"))
        await execute(guarded.database, f"delete from clients where id = '{boss.id}'")
        await expect(page.locator("#entry-fault")).to_have_text("Unknown client or wrong secret.")


async def test_a_token_that_does_not_come_is_told_as_any_other_answer(browser, guarded):
    boss = await add_client(guarded.database, "admin")
    async with looking(browser, guarded.url) as page:
        await sign_in(page, boss)
        await expect(page.locator("#empty")).to_be_visible()
        await page.evaluate("AbortSignal.timeout = AbortSignal.timeout.bind(AbortSignal, 500)")  # and not 20 s
        await page.route("**/token", lambda route: asyncio.sleep(30))
        await expect(page.locator("#pulse")).to_have_text(re.compile("no answer since"), timeout=15_000)
        await page.unroute_all(behavior="ignoreErrors")
        await expect(page.locator("#pulse")).to_have_text(re.compile("^as of"))


async def test_the_lines_of_a_new_farm_send_a_token_where_one_is_needed(browser, guarded):
    boss = await add_client(guarded.database, "admin")
    async with client(guarded.url) as http, looking(browser, guarded.url) as page:
        form = {"grant_type": "client_credentials", "client_id": boss.id, "client_secret": boss.secret}
        env = os.environ | {"TOKEN": (await http.post("/token", data=form)).json()["access_token"]}
        await sign_in(page, boss)
        await expect(page.locator("#empty")).to_be_visible()
        for line in (await page.locator("#first").inner_text()).splitlines():
            shell = {"shell": True, "env": env, "capture_output": True, "check": True}
            done = await asyncio.to_thread(subprocess.run, line + " -sf", **shell)
            assert json.loads(done.stdout)["id"]


async def test_a_reload_forgets_who_signed_in(browser, guarded):
    boss = await add_client(guarded.database, "admin")
    async with looking(browser, guarded.url) as page:
        await sign_in(page, boss)
        await expect(page.locator("#empty")).to_be_visible()
        await page.reload()
        await expect(page.locator("#entry")).to_be_visible()


async def test_who_signs_in_at_an_address_that_names_a_user_gets_its_drawer(browser, guarded, project):
    boss = await add_client(guarded.database, "admin")
    async with client(guarded.url) as http:
        form = {"grant_type": "client_credentials", "client_id": boss.id, "client_secret": boss.secret}
        token = (await http.post("/token", data=form)).json()["access_token"]
        http.headers["Authorization"] = f"Bearer {token}"
        (user,) = await make_users(http, project, 1)
    async with looking(browser, guarded.url, f"/?user={user['id']}") as page:
        await sign_in(page, boss)
        await expect(page.locator("#drawer .title")).to_have_text(user["login"])


async def test_who_is_signed_out_in_the_midst_of_an_action_still_reads_why_after_the_next_look(browser, guarded):
    boss = await add_client(guarded.database, "admin")
    async with looking(browser, guarded.url) as page:
        await sign_in(page, boss)
        await expect(page.locator("#empty")).to_be_visible()
        await page.route("**/users", lambda route: route.fulfill(status=401, json={}))
        await button(page, "Add a user").click()
        async with page.expect_response(lambda answer: "/overview" in answer.url and answer.status == 401):
            await button(dialog(page), "Add").click()
        await page.wait_for_timeout(100)
        await expect(page.locator("#entry-fault")).to_have_text("The token does not count any more: sign in again.")


async def test_nothing_that_was_shown_stays_when_a_sign_in_ends(browser, guarded, project):
    boss, reader = await add_client(guarded.database, "admin"), await add_client(guarded.database, "users:read")
    go, status = asyncio.Event(), {"status": 401, "json": {}}

    async def late(route):
        answer = await route.fetch()
        await go.wait()
        await route.fulfill(response=answer)

    async with client(guarded.url) as http, looking(browser, guarded.url) as page:
        form = {"grant_type": "client_credentials", "client_id": boss.id, "client_secret": boss.secret}
        token = (await http.post("/token", data=form)).json()["access_token"]
        http.headers["Authorization"] = f"Bearer {token}"
        await make_users(http, project)
        await acquire(http, project, holder="ada")
        waits = asyncio.create_task(acquire(http, project, wait=300))
        await sign_in(page, boss)
        await expect(page).to_have_title("1 waiting · BotFarm")
        await page.locator("#users button.link").first.focus()
        async with page.expect_request("**/overview"):
            await page.route("**/overview", late)
        await page.route("**/users/*/lock", lambda route: route.fulfill(**status))
        await page.locator("#users").get_by_role("button", name="Release").click()
        await button(dialog(page), "Release by force").click()
        await expect(page.locator("#entry")).to_be_visible()
        async with page.expect_response("**/overview"):
            go.set()
        await page.wait_for_timeout(200)
        assert await page.locator("#entry").is_visible()
        assert await page.locator("#pulse").inner_text() == ""
        assert await page.locator("#users tr").count() == 0
        assert await page.title() == "BotFarm"
        await sign_in(page, reader)
        await expect(page.locator("#users tr")).to_have_count(1)
        assert await page.locator("#users").get_by_role("button", name="Release").count() == 0
        waits.cancel()


async def test_a_page_offers_what_its_client_may_do_alone(browser, guarded, project):
    boss = await add_client(guarded.database, "admin")
    reader, locker = await add_client(guarded.database, "users:read"), await add_client(guarded.database, "locks")
    async with client(guarded.url) as http:
        form = {"grant_type": "client_credentials", "client_id": boss.id, "client_secret": boss.secret}
        token = (await http.post("/token", data=form)).json()["access_token"]
        http.headers["Authorization"] = f"Bearer {token}"
        await make_users(http, project, 2)
        await acquire(http, project, holder="ada")
        users = await state_of(http)
    async with looking(browser, guarded.url) as page:
        await page.get_by_label("Token").fill("nonsense")
        await button(page, "Sign in").click()
        await expect(page.locator("#entry-fault")).to_contain_text("not a token")
        await page.get_by_label("Token").fill(token)
        await button(page, "Sign in").click()
        await expect(page.locator("#users tr").get_by_role("button", name="Release")).to_be_visible()
        await expect(button(page, "Add a user")).to_be_visible()
        await button(page, "Sign out").click()
        await sign_in(page, locker)
        await expect(page.locator("#entry-fault")).to_contain_text("The token lacks the scope 'users:read'")
        await sign_in(page, reader)
        forbidden = {"Add a user", "Import", "Release", "Quarantine", "Release by force", "Hold", "End the hold"}
        for login, state in users:
            await page.get_by_text(state.capitalize(), exact=True).click()
            await button(page.locator("#users"), login).click()
            await expect(page.locator("#drawer .state")).to_have_text(state)
            seen = await page.get_by_role("button").all_inner_texts()
            assert not forbidden & set(seen), seen
            assert "Export" in seen


async def test_a_client_that_may_lock_ends_its_own_holds_alone(browser, guarded, project):
    boss, ann, bob = [await add_client(guarded.database, scope) for scope in ("admin", *["users:read locks"] * 2)]
    async with client(guarded.url) as http:
        form = {"grant_type": "client_credentials", "client_id": boss.id, "client_secret": boss.secret}
        token = (await http.post("/token", data=form)).json()["access_token"]
        http.headers["Authorization"] = f"Bearer {token}"
        await make_users(http, project, 1)
        async with looking(browser, guarded.url) as page, looking(browser, guarded.url) as other:
            await sign_in(page, ann)
            await hold(page, "bot-0", name="ann")
            await expect(page.locator("#drawer .why")).to_contain_text("Held by ann (hold")
            await sign_in(other, bob)
            await other.locator("#users button.link").first.click()
            await button(other, "End the hold").click()
            await expect(dialog(other)).to_contain_text("Locks of other clients stay.")
            await button(dialog(other), "End it").click()
            await expect(other.locator("#said")).to_have_text(re.compile(r"^0 locks of ann \(hold .{8}\) released\.$"))
            assert await state_of(http) == [("bot-0", "locked")]
            await button(page, "End the hold").click()
            await button(dialog(page), "End it").click()
            await expect(page.locator("#drawer .state")).to_have_text("free")


# ---- For everybody -----------------------------------------------------------------------------------------


async def test_it_is_used_by_keyboard_alone(page):
    await page.keyboard.press("Tab")
    await expect(page.get_by_text("Skip to the users")).to_be_focused()
    await page.keyboard.press("Enter")
    await page.keyboard.press("Tab")
    login = page.locator("#users button.link").first
    await expect(login).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.locator("#drawer .state")).to_have_text("locked")
    await expect(button(page, "Close")).to_be_focused()
    await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    await expect(dialog(page).get_by_label("Reason")).to_be_focused()
    await page.keyboard.type("broken")
    await page.keyboard.press("Enter")
    await expect(page.locator("#drawer .why")).to_contain_text("then quarantined: broken")
    await page.keyboard.press("Escape")
    await expect(page.locator("#drawer")).to_be_hidden()
    await expect(login).to_be_focused()


async def test_the_focus_stays_in_the_drawer_when_the_action_that_had_it_goes(page, http):
    await page.locator("#users button.link").first.click()
    await button(page, "Release by force").press("Enter")
    await button(dialog(page), "Release by force").press("Enter")
    await expect(page.locator("#drawer .state")).to_have_text("free")
    await expect(button(page, "Close")).to_be_focused()


async def test_nothing_moves_for_who_wants_no_motion(browser, own, http, project):
    await make_users(http, project, 1)
    moves = "getComputedStyle(document.querySelector('.bar rect')).transitionDuration"
    for motion, seconds in (("reduce", "0s"), ("no-preference", "0.3s, 0.3s")):
        async with looking(browser, own.url, reduced_motion=motion) as page:
            await expect(page.locator("#pools li")).to_have_count(1)
            assert await page.evaluate(moves) in (seconds, seconds.split(",")[0])


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """The source of axe-core, by npm."""
    if not shutil.which("npm"):
        pytest.skip("there is no npm, which brings axe-core: Debian has it in the package of that name")
    folder = tmp_path_factory.mktemp("axe")
    done = subprocess.run(["npm", "pack", "--silent", AXE], cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"npm does not bring {AXE}: {done.stderr[-200:]}")
    with tarfile.open(folder / done.stdout.strip()) as packed:
        source = packed.extractfile("package/axe.min.js")
        assert source
        return source.read().decode()


async def findings(page, axe):
    await page.evaluate(axe)  # what a debugger runs is not what the page's policy forbids
    found = await page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found["violations"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing(browser, own, http, project, axe, scheme):
    async with looking(browser, own.url, color_scheme=scheme) as page:
        await expect(page.locator("#empty")).to_be_visible()
        assert await findings(page, axe) == []
    await scene(http, own.database)
    async with looking(browser, own.url, color_scheme=scheme) as page:
        await expect(page.locator("#users tr")).not_to_have_count(0)
        assert await findings(page, axe) == []
        await page.locator("#users button.link").first.click()
        await expect(page.locator("#drawer .state")).to_have_text("locked")
        assert await findings(page, axe) == []
        await button(page, "Close").click()
        await button(page, "Add a user").click()
        await button(dialog(page), "Add").click()
        await expect(page.locator("#fault-login")).not_to_be_empty()
        assert await findings(page, axe) == []
        await button(dialog(page), "Cancel").click()
        await hold(page, "buyer-100@shop.test", minutes="0")
        await expect(page.locator("#fault-ttl")).not_to_be_empty()
        assert await findings(page, axe) == []
    async with looking(browser, own.url, color_scheme=scheme, viewport={"width": 360, "height": 800}) as page:
        await expect(page.locator("#users tr")).not_to_have_count(0)
        assert await findings(page, axe) == []
        await page.evaluate(
            "document.querySelector('#farm').hidden = true; document.querySelector('#entry').hidden = false"
        )
        assert await findings(page, axe) == []


# ---- Pictures ----------------------------------------------------------------------------------------------

SHOP, BANK = "6f1c2a58-0b5e-4d0a-9a57-2f0d8c1b7e11", "c2d94e30-7a41-4f7e-8f0e-51a0e3b9d642"


async def scene(http, database):
    """Three pools with hundreds of users, some of them locked, one quarantined, one pool with nobody left."""
    lines = []
    for project, env, count, name in (
        (SHOP, "stage", 160, "buyer"),
        (SHOP, "preprod", 12, "seller"),
        (BANK, "prod", 60, "bot"),
    ):
        user = {"password": "pw", "project_id": project, "env": env, "labels": {"role": name, "country": "de"}}
        lines += [json.dumps(user | {"login": f"{name}-{number:03}@shop.test"}) for number in range(count)]
    media = {"Content-Type": "application/x-ndjson"}
    assert (await http.post("/users/import", content="\n".join(lines), headers=media)).status_code == 200
    for number in range(52):
        job = f"checkout-e2e #{4700 + number % 5}"
        lock = (await acquire(http, SHOP, env="stage", holder=job, ttl=60 + 23 * number)).json()
        if number % 3 == 0:
            outcome = "failed" if number % 9 == 0 else "passed"
            await http.delete(f"/locks/{lock['id']}", params={"cooldown": 600 * (number % 2), "outcome": outcome})
    for number in range(12):
        await acquire(http, SHOP, env="preprod", holder="nightly-payments", ttl=300 + number)
    for number in range(9):
        note = "" if number % 3 != 1 else f"https://ci.shop.test/runs/{810 + number}"
        await acquire(http, BANK, holder="smoke", ttl=100 + 90 * number, note=note)
    locked, free = [
        (await http.get("/users", params={"project_id": BANK, "state": state})).json()["items"]
        for state in ("locked", "free")
    ]
    await http.delete(f"/users/{locked[0]['id']}/lock")
    await http.post(f"/users/{free[0]['id']}/quarantine", json={"reason": "login page says: account blocked"})
    await end_with(http, free[1], "bad-login", holder="smoke")
    await http.put(
        f"/users/{free[2]['id']}/lock",
        json={"holder": f"ada (hold {free[2]['id'][-8:]})", "note": "basket is empty after login", "ttl": 1800},
    )
    past = """
        insert into history (lock_id, user_id, fence, holder, acquired_at, ended_at, ended_by, outcome)
        select gen_random_uuid(), user_id, -number, 'checkout-e2e #' || 4600 - number, began, began + took, 'released',
            case when number % 5 = 0 then 'failed' else 'passed' end
        from locks
        cross join generate_series(1, 60) as number
        cross join lateral (select now() - number * interval '23 minutes' as began,
            interval '1 minute' * (2 + (number * 7) % 19) as took) as times
        where holder = 'smoke' and lock_id is not null"""
    earlier = """
        update history
        set acquired_at = acquired_at - interval '1 second' * (place * 35 + 60 + place * 37 % 240),
            ended_at = ended_at - interval '1 second' * place * 35
        from (
            select lock_id as id, row_number() over (order by ended_at desc) - 1 as place
            from history
        ) as placed
        where lock_id = id"""
    held = """
        update locks
        set acquired_at = acquired_at - interval '1 second' * (extract(epoch from expires_at - acquired_at)::int % 700)
        where lock_id is not null"""
    await execute(database, earlier, held, past)


async def test_pictures_for_the_documents(browser, own, http, request, tmp_path):
    """Light, dark and narrow: kept with --screenshots."""
    folder = Path(request.config.getoption("--screenshots") or tmp_path)
    await scene(http, own.database)
    waits = [asyncio.create_task(acquire(http, SHOP, env="preprod", wait=300)) for _ in range(3)]
    for name, width, height, scheme in (
        ("light", 1280, 800, "light"),
        ("dark", 1280, 800, "dark"),
        ("narrow", 360, 800, "light"),
    ):
        async with looking(browser, own.url, viewport={"width": width, "height": height}, color_scheme=scheme) as page:
            await expect(page.locator("#pools")).to_contain_text("3 calls wait")
            if name == "dark":
                await page.get_by_label("Holder").fill("smoke")
                await expect(page.locator("#users tr")).to_have_count(8)
                await page.locator("#users button.link").first.click()
                await expect(page.locator("#drawer .state")).to_have_text("locked")
            await page.screenshot(path=folder / f"page-{name}.png")
            assert (folder / f"page-{name}.png").stat().st_size < 250_000
    await http.delete("/locks", params={"holder": "nightly-payments"})
    await asyncio.gather(*waits)
