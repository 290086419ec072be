"""The dashboard in a real browser: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import tarfile
import uuid
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from conftest import acquire, client, execute, free_port, make_users, process, serving, settings, wait_ready
from playwright.async_api import Page, async_playwright, expect
from test_auth import add_client, secure

import farm.clients

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium: Debian has it in the package of that name")
AXE = "axe-core@4.14.1"
STRAY = re.compile("Failed to load resource")  # what chromium says of a reply that is no 2xx


@pytest.fixture(scope="module")
async def browser():
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        await browser.close()


@asynccontextmanager
async def looking(browser, url, path="/", **options):
    """A page of its own context. Its `told` is what went to the console, its `asked` are the addresses it went to."""
    context = await browser.new_context(**{"viewport": {"width": 1440, "height": 900}} | options)
    page = await context.new_page()
    page.set_default_timeout(10_000)
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
        await expect(page.locator("#users td.time time").nth(1)).to_have_text(re.compile(r"^9 min \d\d s$"))
        await expect(page.locator("#lately li")).to_contain_text([f"{gone['user']['login']} given back by eve"])
        await page.get_by_text("Resting", exact=True).click()
        await button(page, gone["user"]["login"]).first.click()
        await expect(page.locator("#drawer .why")).to_contain_text(re.compile(r"free again at \d\d:\d\d, in 4 min"))
        await expect(page.locator("#drawer .chart")).to_have_attribute("aria-label", re.compile("In use 0 %"))
        text = await page.content() + "".join([await answer.text() for answer in read])
        assert page.told == []
        for secret in (gone["id"], held["id"], "pw-0", "pw-1"):
            assert secret not in text


async def test_it_shows_who_waits_and_puts_the_worst_pool_first(browser, own, http, project):
    await make_users(http, project, 2)
    await make_users(http, project, 1, env="prod")
    await acquire(http, project, env="prod", ttl=600)
    waits = asyncio.create_task(acquire(http, project, env="prod", wait=60))
    async with looking(browser, own.url) as page:
        await expect(page.locator("#pools li").first).to_contain_text(re.compile("prod.*1 call waits, the longest for"))
        await expect(page.locator("#pools li").first).to_contain_text(re.compile("The next comes free in 9 min"))
        await expect(page).to_have_title("1 waiting · BotFarm")
        (user,) = (await http.get("/users", params={"env": "prod"})).json()["items"]
        await http.delete(f"/users/{user['id']}/lock")
        await waits
        await expect(page).to_have_title("BotFarm")


async def test_a_new_farm_shows_the_two_lines_that_create_and_acquire_the_first_user(browser, own):
    async with looking(browser, own.url) as page:
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
        await page.get_by_label("Login begins with").fill("zo")
        await expect(page.locator("#users tr")).to_contain_text(["zoe"])
        await page.get_by_label("Login begins with").fill("")
        await page.get_by_label("Holder").fill("late")
        await expect(page.locator("#users tr")).to_contain_text(["zoe"])


@pytest.mark.parametrize("width", [360, 2560])
async def test_it_fits_narrow_and_wide_screens(browser, own, http, project, width):
    await make_users(http, project, 1, login="a" * 254)
    await acquire(http, project, holder="h" * 200)
    async with looking(browser, own.url, viewport={"width": width, "height": 800}) as page:
        await page.locator("#users button.link").first.click()
        await expect(page.locator("#drawer .state")).to_have_text("locked")
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        assert await page.evaluate("document.querySelector('#drawer').scrollWidth") <= width


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


async def test_it_looks_every_two_seconds_and_every_ten_when_nothing_changes(browser, own, http, project):
    await make_users(http, project, 1)
    async with looking(browser, own.url) as page:
        await expect(page.locator("#pools li")).to_have_count(1)
        looks = lambda: sum("/overview" in address for address in page.asked)  # noqa: E731
        await page.clock.install()
        await page.reload()
        await expect(page.locator("#pools li")).to_have_count(1)
        for _ in range(4):
            async with page.expect_response("**/overview") as answer:
                await page.clock.run_for(2100)
            assert (await answer.value).status == 304
            await page.wait_for_timeout(50)
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
        await expect(page.locator("#pulse")).to_have_text(re.compile("^as of"), timeout=40_000)
        await expect(page.locator("#said")).to_have_text("The service answers again.")
        await running.__aexit__(None, None, None)


async def test_ten_tabs_of_one_browser_all_follow(browser, own, http, project):
    await make_users(http, project, 1)
    context = await browser.new_context()
    tabs = [await context.new_page() for _ in range(10)]
    await asyncio.gather(*(tab.goto(own.url) for tab in tabs))
    await acquire(http, project, holder="ada")
    await asyncio.gather(*(expect(tab.locator("#users tr")).to_contain_text(["ada"], timeout=15_000) for tab in tabs))
    await context.close()


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
    await expect(page.locator("#said")).to_have_text("20,000 users added, 0 changed, 0 as they were.", timeout=30_000)
    assert await page.evaluate("window.bar.getAttribute('value') === null && window.bar.max === 1")


async def test_users_are_exported(page, project):
    await page.get_by_label("Login begins with").fill("bot-1")
    await button(page, "Export").click()
    async with page.expect_download() as coming:
        await button(dialog(page), "Export").click()
    saved = await coming.value
    (user,) = map(json.loads, Path(await saved.path()).read_text().splitlines())
    assert (saved.suggested_filename, user["login"], "password" in user) == ("users.ndjson", "bot-1", False)


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
        while sum(address.endswith("/token") for address in page.asked) < 3:
            await page.wait_for_timeout(50)
        kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
        assert boss.secret not in await page.content()
        assert await page.evaluate(kept) == json.dumps([{}, {}, "", guarded.url + "/"], separators=(",", ":"))
        await execute(guarded.database, f"delete from clients where id = '{boss.id}'")
        await page.reload()
        await expect(page.locator("#entry")).to_be_visible()


async def test_a_page_offers_what_its_client_may_do_alone(browser, guarded, project):
    boss = await add_client(guarded.database, "admin")
    reader, locker = await add_client(guarded.database, "users:read"), await add_client(guarded.database, "locks")
    async with client(guarded.url) as http:
        form = {"grant_type": "client_credentials", "client_id": boss.id, "client_secret": boss.secret}
        token = (await http.post("/token", data=form)).json()["access_token"]
        http.headers["Authorization"] = f"Bearer {token}"
        await make_users(http, project, 2)
        await acquire(http, project, holder="ada")
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
        await page.locator("#users button.link").first.click()
        await expect(page.locator("#drawer .state")).to_have_text("locked")
        seen = await page.get_by_role("button").all_inner_texts()
        assert not {"Add a user", "Import", "Release", "Quarantine", "Release by force"} & set(seen), seen
        assert "Export" in seen


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
            await http.delete(f"/locks/{lock['id']}", params={"cooldown": 600 * (number % 2)})
    for number in range(12):
        await acquire(http, SHOP, env="preprod", holder="nightly-payments", ttl=300 + number)
    for number in range(9):
        await acquire(http, BANK, holder="smoke", ttl=100 + 90 * number)
    locked, free = [
        (await http.get("/users", params={"project_id": BANK, "state": state})).json()["items"]
        for state in ("locked", "free")
    ]
    await http.delete(f"/users/{locked[0]['id']}/lock")
    await http.post(f"/users/{free[0]['id']}/quarantine", json={"reason": "login page says: account blocked"})
    past = """
        insert into history (lock_id, user_id, fence, holder, acquired_at, ended_at, ended_by)
        select gen_random_uuid(), user_id, -number, 'checkout-e2e #' || 4600 - number, began, began + took, 'released'
        from locks
        cross join generate_series(1, 60) as number
        cross join lateral (select now() - number * interval '23 minutes' as began,
            interval '1 minute' * (2 + (number * 7) % 19) as took) as times
        where holder = 'smoke' and lock_id is not null"""
    await execute(database, past)


async def test_pictures_for_the_documents(browser, own, http, request, tmp_path):
    """Light, dark and narrow: kept with --screenshots."""
    folder = Path(request.config.getoption("--screenshots") or tmp_path)
    await scene(http, own.database)
    waits = [asyncio.create_task(acquire(http, SHOP, env="preprod", wait=60)) for _ in range(3)]
    for name, width, height, scheme in (
        ("light", 1280, 800, "light"),
        ("dark", 1280, 800, "dark"),
        ("narrow", 390, 844, "light"),
    ):
        async with looking(browser, own.url, viewport={"width": width, "height": height}, color_scheme=scheme) as page:
            await expect(page.locator("#pools li").first).to_contain_text("3 calls wait")
            if name == "dark":
                await page.get_by_label("Holder").fill("smoke")
                await expect(page.locator("#users tr")).to_have_count(8)
                await page.locator("#users button.link").first.click()
                await expect(page.locator("#drawer .state")).to_have_text("locked")
            await page.screenshot(path=folder / f"page-{name}.png")
            assert (folder / f"page-{name}.png").stat().st_size < 250_000
    await http.delete("/locks", params={"holder": "nightly-payments"})
    await asyncio.gather(*waits)
