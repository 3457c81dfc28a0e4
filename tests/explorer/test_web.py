"""The pages in a real browser over a real server: walked, checked by axe-core, and hostile text."""

import errno
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright
from prefect.settings import PREFECT_API_URL
from starlette.testclient import TestClient

from explorer import open_store
from explorer.errors import NotThere
from explorer.web.app import HEADERS, make_app
from tests.tiny import save_recipe

HOSTILE = (
    '<script>document.title="stolen"</script><img src=x onerror=alert(1)> \u202etxet\u202c '
    "zero\u200bwidth\x1b[31m &amp; " + "A" * 300
)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine; Debian's package is `chromium`"
)


class Site:
    """A server of the pages on a free port."""

    def __init__(self, store, token=None) -> None:
        app = make_app(open_store(store), frozenset({"127.0.0.1"}), token)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def store(prefect_server, tmp_path_factory):
    """Caches of pairs whose text is hostile, and the store of a finished run beside them."""
    from cli.main import main

    folder = tmp_path_factory.mktemp("web")
    recipe = save_recipe(folder)
    rows = [{"prompt": f"{HOSTILE} {n}", "chosen": f"{HOSTILE} yes {n}", "rejected": f"no {n}"}
            for n in range(40)]  # fmt: skip
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = ("data.max_length=4000", "data.max_prompt_length=2000",
               "resources.tokens_per_batch=4000")  # fmt: skip
    settings = [part for one in lengths for part in ("--set", one)]
    places = ["--store", str(folder / "store"), "--report", str(folder / "report")]
    with pytest.raises(SystemExit) as left:
        main(["run", str(recipe), *places, *settings])
    assert not left.value.code
    return folder / "store"


@pytest.fixture(scope="module")
def site(store) -> Iterator[Site]:
    site = Site(store)
    yield site
    site.stop()


@pytest.fixture(scope="module")
def version(store):
    (folder,) = store.glob("artifacts/features/*")
    return folder.name


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser, site) -> Iterator[Page]:
    """A page whose errors fail the test."""
    page = browser.new_page(base_url=site.url)
    said: list[str] = []
    page.on("console", lambda one: said.append(one.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
    yield page
    page.close()
    assert said == []


def accessible(page: Page) -> None:
    found = Axe().run(page).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert serious == [], [(one["id"], [n["html"] for n in one["nodes"]][:3]) for one in serious]


@needs_chromium
def test_every_page_is_walked_without_an_error_and_is_accessible(page, store, version):
    page.goto("/")
    accessible(page)
    page.get_by_role("link", name="tiny", exact=True).first.click()
    assert page.url.endswith(f"/cache/{version}")
    accessible(page)
    page.locator("tbody tr").first.get_by_role("link").nth(0).wait_for()
    page.locator("tbody tr td:nth-child(2) a").first.click()
    page.get_by_role("heading", name="Over responses").wait_for()
    page.locator("img").evaluate("one => one.decode()")  # fails where it is no picture
    page.get_by_text("The numbers").click()
    page.get_by_text("Raised most").wait_for()
    accessible(page)
    feature = page.url
    for part in ("logits", "distribution"):
        page.goto(f"{feature}/{part}")
        page.locator(f"#{part} table").first.wait_for(state="attached")
        accessible(page)
    page.goto(feature)
    page.locator(".examples a").first.click()
    assert "/pair/" in page.url
    page.locator(".t[title]").first.wait_for()
    accessible(page)
    page.get_by_role("link", name="pairs", exact=True).click()
    accessible(page)
    page.get_by_role("link", name="after").click()
    assert page.url.endswith("offset=25")
    page.get_by_role("link", name="lineage").click()
    page.get_by_role("heading", name="Made from").wait_for()
    accessible(page)
    (evaluation,) = store.glob("artifacts/evaluation/*")
    page.goto(f"/training/{evaluation.name}")
    page.get_by_role("heading", name="What training moved").wait_for()
    accessible(page)


@needs_chromium
def test_the_link_in_prefects_ui_opens_the_report(page, store):
    of_report = {"artifacts": {"key": {"any_": ["fpo-report"]}}}
    found = httpx.post(f"{PREFECT_API_URL.value()}/artifacts/filter", json=of_report).json()
    (link,) = [one["data"] for one in found if str(store) in one["description"]]
    shown = re.fullmatch(r"\[report\.html\]\(http://127\.0\.0\.1:4242(/report/[\w-]+)\)", link)
    assert shown, link
    page.goto(shown[1])
    assert page.title() == "tiny: FPO"
    assert page.locator("h1").evaluate("one => getComputedStyle(one).fontFamily") != "serif"
    accessible(page)


@needs_chromium
def test_hostile_text_is_text(page, version):
    page.goto(f"/cache/{version}/pairs")
    page.locator("tbody a").first.click()
    text = page.locator("main").inner_text()
    assert "<script>" in text.replace("\n", "").replace("·", "")
    assert "⟨U+202E⟩" in text
    assert page.title() != "stolen"
    assert page.locator("main script, main img").count() == 0
    assert not set(page.content()) & set("\u202e\u200b\x1b")


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast_in_both_themes_and_a_phone_scrolls_down_only(
    browser, site, version, scheme
):
    page = browser.new_page(
        base_url=site.url, color_scheme=scheme, viewport={"width": 360, "height": 700}
    )
    for path in (f"/cache/{version}", f"/cache/{version}/feature/3"):
        page.goto(path)
        accessible(page)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360, f"{path} is {width} wide"
    page.close()


@needs_chromium
def test_sorting_filtering_and_deep_links(page, version):
    def column(number):
        return page.locator(f"tbody td:nth-child({number})").all_inner_texts()

    page.goto(f"/cache/{version}?sort=max&ascending=true")
    values = [float(text) for text in column(6)]
    assert values == sorted(values)
    page.get_by_role("link", name="density").click()
    densities = [float(text.rstrip("%")) for text in column(4)]
    assert densities == sorted(densities, reverse=True)
    page.get_by_label("density from").fill("0.5")
    page.get_by_role("button", name="Show").click()
    assert all(float(text.rstrip("%")) >= 50 for text in column(4))
    assert "min_density=0.5" in page.url
    shown = column(2)
    page.goto(page.url)  # as somebody opens it whom the link was sent to
    assert column(2) == shown


@needs_chromium
def test_a_label_comes_back_and_a_group_is_gathered(page, version):
    page.goto(f"/cache/{version}/feature/5")
    page.get_by_label("label").fill("<b>bold & loud</b>")
    page.get_by_role("button", name="Keep").click()
    page.get_by_role("heading", name="Feature 5: <b>bold & loud</b>").wait_for()
    page.goto(f"/cache/{version}?search=LOUD")
    assert page.locator("tbody tr").count() == 1
    page.get_by_role("button", name="put feature 5 into a group").click()
    page.goto(f"/cache/{version}/feature/9")
    page.get_by_role("link", name="put into a group").click()
    page.get_by_role("link", name="group (2)").click()
    assert "features: [5, 9]" in page.locator("#yaml").inner_text()
    accessible(page)


def test_headers_hosts_and_posts_from_elsewhere(site, version):
    found = httpx.get(f"{site.url}/cache/{version}")
    assert {name: found.headers[name] for name in HEADERS} == HEADERS
    for tag in re.findall(r"<(?:script|style)[^>]*>", found.text):
        assert "src=" in tag  # nothing inline, which the policy would refuse
    assert httpx.get(site.url, headers={"Host": "evil.example"}).status_code == 421
    label = f"{site.url}/cache/{version}/feature/5/label"
    assert httpx.post(label, data={"text": "x"}).status_code == 400
    other = {"Origin": "http://evil.example"}
    assert httpx.post(label, data={"text": "x"}, headers=other).status_code == 400


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/cache/nope", 404, "there are: features/"),
        ("/cache/{v}/feature/96", 404, "features are 0 to 95"),
        ("/cache/{v}/pair/xyz", 404, "no pair"),
        ("/cache/{v}?sort=size", 400, "one of difference"),
        ("/cache/{v}/group?features=a", 400, "no feature&#39;s number"),
        ("/artifact/policy/zzzz", 404, "no artifact"),
        ("/training/zzzz", 404, "no artifact"),
        ("/report/zzzz", 404, "has no report"),
        ("/report/%2e%2e", 404, "has no report"),
        ("/report/a%00b", 404, "has no report"),
    ],
)
def test_what_is_not_there_is_said_on_a_page(site, store, version, path, status, says):
    found = httpx.get(site.url + path.format(v=version))
    assert (found.status_code, says in found.text) == (status, True), found.text
    assert str(store.parent) not in found.text


def test_a_store_that_goes_away_is_said_and_comes_back(store, version, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    site = Site(tmp_path / "store")
    try:
        (tmp_path / "store").rename(tmp_path / "away")
        gone = httpx.get(f"{site.url}/cache/{version}")
        assert gone.status_code in (404, 503)
        assert str(tmp_path) not in gone.text
        (tmp_path / "away").rename(tmp_path / "store")
        assert httpx.get(f"{site.url}/cache/{version}").status_code == 200
    finally:
        site.stop()


def test_elsewhere_than_here_it_asks_for_the_token(store):
    site = Site(store, token="a-long-token")
    try:
        assert httpx.get(site.url).status_code == 403
        assert httpx.get(f"{site.url}/?token=wrong").status_code == 403
        with httpx.Client(base_url=site.url) as client:
            assert client.get("/?token=a-long-token").status_code == 200
            assert client.get("/").status_code == 200  # by the cookie
    finally:
        site.stop()


@pytest.fixture
def client(store):
    app = make_app(open_store(store), frozenset({"127.0.0.1"}))
    return TestClient(app, base_url="http://127.0.0.1")


def test_an_index_that_cannot_be_made_is_told_and_not_tried_at_every_view(
    client, version, monkeypatch, caplog
):
    tried = []

    def full(_cache):
        tried.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/secret/place")

    monkeypatch.setattr("explorer.web.opened.open_feature_index", full)
    for part in ("", "", "/distribution"):
        shown = client.get(f"/cache/{version}/feature/3{part}")
        assert shown.status_code == 200
        assert "No distribution: the index cannot be made: No space left on device." in shown.text
        assert "/a/secret" not in shown.text
    assert client.get(f"/cache/{version}/feature/3/histogram.svg").status_code == 503
    assert len(tried) == 1
    assert "cannot be made: [Errno 28]" in caplog.text
    monkeypatch.setattr("explorer.web.opened.AGAIN", 0.0)
    client.get(f"/cache/{version}/feature/3")
    assert len(tried) == 2


def test_no_folder_of_this_machine_is_on_the_page_of_logits(client, version, monkeypatch):
    tried = []

    def away(*_):
        tried.append(1)
        raise NotThere("no logits: SAE '/home/alice/secret-project/sae': no cfg.json there")

    monkeypatch.setattr("explorer.logits.LogitLens", away)
    for feature in (3, 4):
        shown = client.get(f"/cache/{version}/feature/{feature}/logits")
        assert "SAE &#39;sae&#39;: no cfg.json there" in shown.text
        assert "alice" not in shown.text
    assert len(tried) == 1
