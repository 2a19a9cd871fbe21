"""The dashboard in a real browser: what an operator sees of a gateway with stub peers."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from common.samples import sample
from launch.gateway.doors.keys import ApiKey
from launch.gateway.doors.settings import DoorKeys
from tests.launch.gateway.client import GENERATE, PROMPT, keys_of, post
from tests.launch.gateway.stubs import StubCluster
from tests.launch.gateway.stubs import running_cluster as cluster_of

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromium-driver"),
]

WAIT_S = 60
HOSTILE = "<img src=x onerror=alert(1)>"
KEYS = DoorKeys(api_keys=(), admin_api_keys=(ApiKey("root", "key-r"),))
QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # Whatever it should want elsewhere, it does not get there.
    *("--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
)


class Page:
    """What is seen at a gateway's ``/dashboard``; its calls block."""

    def __init__(self, browser: Chrome, port: int) -> None:
        self.browser = browser
        browser.get(f"http://127.0.0.1:{port}/dashboard")

    def until(self, what: str, holds: Callable[[], Any]) -> None:
        waiting = WebDriverWait(
            self.browser, WAIT_S, 0.1, ignored_exceptions=[StaleElementReferenceException]
        )
        waiting.until(lambda _: holds(), f"not seen: {what}")

    def text(self, name: str) -> str:
        return self.browser.find_element(By.ID, name).text

    def texts(self, selector: str) -> list[str]:
        """Of one moment: rows are made anew at each look."""
        read = "return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)"
        found: list[str] = self.browser.execute_script(read, selector)
        return [" ".join(text.split()) for text in found]

    def row(self, table: str, name: str) -> str:
        rows = self.texts(f"#{table} > tbody > tr")
        return next((row for row in rows if row.startswith(name)), "")

    def script(self, text: str) -> Any:
        return self.browser.execute_script(text)

    def widen(self, width: int) -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.until(f"{width} wide", lambda: self.script("return innerWidth") == width)

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options=options, service=Service(DRIVER))
    chrome.set_page_load_timeout(WAIT_S)
    try:
        yield chrome
    finally:
        chrome.quit()


async def serve_some(cluster: StubCluster) -> None:
    """Three answers with hits, one of a client with a name of its own, and counters that grow."""
    agent = cluster.agents["node-p"]
    await cluster.announce("node-p", keys_of(PROMPT))
    await post(cluster, "/admin/drain", {"name": "d1", "on": True})
    for rid in ("first", HOSTILE, "last"):
        assert (await post(cluster, "/generate", {**GENERATE, "rid": rid}))[0] == 200
    counted = cluster.services.history
    await cluster.until(lambda: counted.view(0)["points"])  # what comes now has been added since
    for read_bytes in (1 << 30, 3 << 30):
        agent.samples = [
            sample("agent_storage_read_bytes_total", read_bytes, tier="remote"),
            sample("agent_delivered_bytes_total", read_bytes, engine="d0"),
            sample("agent_hits_total", read_bytes >> 20, tier="ssd"),
            sample("agent_tier_bytes", 3 << 30, tier="ssd"),
            sample("agent_tier_capacity_bytes", 8 << 30, tier="ssd"),
        ]
        await agent.push(agent.status())
        peer = cluster.services.plane.members.agents["node-p"]
        await cluster.until(lambda peer=peer: peer.samples() == agent.samples)
        noted = len(counted.view(0)["points"])
        await cluster.until(lambda noted=noted: len(counted.view(0)["points"]) > noted)


def sees_the_cluster(page: Page) -> None:
    page.until("live", lambda: page.text("state") == "live")
    page.until("nodes", lambda: page.row("nodes", "node-p prefill") and page.row("nodes", "node-d"))
    assert "drained" in page.row("engines", "d1") and "idle" in page.row("engines", "d0")
    assert "may be stopped" in page.text("drains") and "d1" in page.text("drains")
    page.until("who reads", lambda: "3.0 GiB" in page.row("matrix", "node-p"))
    assert "100 %" in page.row("matrix", "node-p")
    assert "3.0 GiB of 8.0 GiB" in page.row("tiers", "node-p")
    page.until("tokens", lambda: "92 %" in page.text("figures"))
    pictures = page.browser.find_elements(By.CSS_SELECTOR, "#charts polygon")
    assert len(pictures) >= 2
    assert page.text("policy") == "reads n-way, loads auto"


def opens_a_request(page: Page) -> None:
    """A client's own name is text; a click explains its plan."""

    def click() -> bool:
        button = page.browser.find_element(By.CSS_SELECTOR, f'button[title="{HOSTILE}"]')
        assert button.text == HOSTILE
        button.click()
        return True

    page.until("the request", click)
    page.until("its plan", lambda: "Policy n-way" in page.text("requests"))
    steps = page.texts(".steps td:first-child")
    assert {"tokenise", "queue", "read", "prefill"} <= set(steps)
    assert page.texts(".chosen") == ["p0", "d0"]
    looked_ms = page.script("return shown.answeredMs")
    page.until("another look", lambda: page.script("return shown.answeredMs") > looked_ms)
    assert page.texts(".steps td:first-child") == steps, "it stays open"
    assert not page.browser.find_elements(By.CSS_SELECTOR, "main img")


def fits(page: Page) -> None:
    """No width makes the page itself scroll sideways."""
    for width in (1280, 390):
        page.widen(width)
        assert page.script("return document.documentElement.scrollWidth") <= width


async def test_an_operator_sees_the_cluster_and_its_silence(browser: Chrome) -> None:
    async with cluster_of(decodes=2, path_policy="n-way") as cluster:
        await serve_some(cluster)
        page = await asyncio.to_thread(Page, browser, cluster.config.port)
        for look in (sees_the_cluster, opens_a_request, fits):
            await asyncio.to_thread(look, page)
        await asyncio.to_thread(browser.refresh)
        await asyncio.to_thread(sees_the_cluster, page)  # the gateway has kept the last minutes
        assert await asyncio.to_thread(page.errors) == []

    def seen_as_stale() -> bool:
        main = browser.find_element(By.ID, "cluster").get_attribute("class")
        return page.text("state").startswith("stale: no answer") and main == "stale"

    await asyncio.to_thread(page.until, "it is stale", seen_as_stale)
    assert "node-p" in await asyncio.to_thread(page.text, "nodes"), "what was known stays"


async def test_an_empty_cluster_says_what_to_do(browser: Chrome) -> None:
    async with cluster_of() as cluster:
        page = await asyncio.to_thread(Page, browser, cluster.config.port)

        def told() -> bool:
            return "Send one to /v1/chat" in page.text("requests")

        await asyncio.to_thread(page.until, "what to do", told)
        assert "curl -s http://127.0.0.1" in await asyncio.to_thread(page.text, "drains")
        assert "No KV was delivered" in await asyncio.to_thread(page.text, "matrix")


def type_key(page: Page, key: str) -> None:
    page.until("the door", lambda: page.browser.find_element(By.ID, "door").is_displayed())
    assert not page.browser.find_element(By.ID, "cluster").is_displayed()
    page.browser.find_element(By.ID, "key").send_keys(key + "\n")


def opens_with_the_key(page: Page) -> None:
    type_key(page, "key-x")
    page.until("refused", lambda: "That key does not open it" in page.text("notice"))
    type_key(page, "key-r")
    page.until("open", lambda: page.row("engines", "d0"))
    page.browser.refresh()
    page.until("open again", lambda: page.row("engines", "d0"))
    kept = page.script("return [JSON.stringify(sessionStorage), localStorage.length]")
    assert "key-r" in kept[0] and kept[1] == 0 and page.browser.get_cookies() == []
    assert "key-r" not in page.browser.current_url
    page.browser.find_element(By.ID, "forget").click()
    page.until("locked", lambda: page.text("state") == "locked")
    assert page.script("return sessionStorage.length") == 0
    assert all("401" in error for error in page.errors())


async def test_a_key_opens_it_and_stays_in_the_tab(browser: Chrome) -> None:
    async with cluster_of(keys=KEYS) as cluster:
        page = await asyncio.to_thread(Page, browser, cluster.config.port)
        await asyncio.to_thread(opens_with_the_key, page)
