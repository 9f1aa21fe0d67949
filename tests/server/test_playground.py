"""The playground in a real browser: what it shows is what the server said, and it asks nothing of anybody else."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import steerwell.apps.server
from steerwell.core.errors import EngineError
from tests.made import calibration, direction
from tests.server.live import BOUNDED, FakeScheduler, catalog, key_of, keys, live, service

PAGE = Path(steerwell.apps.server.__file__).parent / "playground" / "page"
CHROMIUM = next(filter(None, map(shutil.which, ("/usr/bin/chromium", "chromium", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
QUESTION = 'What\'s the "capital" of France?\nSay it in € and <b>bold</b>.'
RECORDER = """
window.exchanges = [];
const plain = window.fetch;
window.fetch = async (url, options) => {
  const answer = await plain(url, options);
  if (!String(url).endsWith("/chat/completions") || !answer.ok) return answer;
  const [page, test] = answer.body.tee();
  window.exchanges.push([options.body, new Response(test).text().catch(() => "")]);
  return new Response(page, answer);
};
"""  # so that a test sees what the page sent and was told, and no second request is needed
TRICKS = ("<img src=x onerror=alert(1)>", "<script>alert(2)</script>", "&amp; done  \n", "x" * 300)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(pilot) -> Iterator[str]:
    """An open server with a direction of a bundled concept's name, and a policy with bounds along it."""
    served = catalog(pilot, default=None)
    layers = tuple(calibration(boundary=0.1 * layer) for layer in range(pilot.info.n_layers))
    made = direction(seed=1, model=pilot.info, concept="dishonesty", calibration=layers)
    served.put_direction("dishonesty", made)
    served.put_policy("a-bounded-one", BOUNDED.model_copy(update={"direction": "dishonesty"}))
    with live(service(pilot, catalog=served)) as url:
        yield url


class Visit:
    """A page, what it asked for, and what it complained of."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.complaints: list[str] = []
        self.asked: list[Any] = []
        page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("response", lambda response: self.asked.append(response))
        page.add_init_script(RECORDER)
        page.goto(url)

    def run(self, text: str = QUESTION) -> None:
        self.page.fill("#prompt", text)
        self.page.keyboard.press("Control+Enter")
        self.settled()

    def settled(self) -> None:
        self.page.wait_for_selector("[data-name=Steered]:not([data-state=streaming], [data-state=idle])")
        self.page.wait_for_selector("[data-state=streaming]", state="detached")

    def answer(self, name: str) -> Any:
        return self.page.locator(f"[data-name={name}]")

    def exchanges(self) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Bodies sent and events received, the unsteered side's first."""
        found = self.page.evaluate("Promise.all(exchanges.map((pair) => Promise.all(pair)))")
        pairs = [(json.loads(body), events(text)) for body, text in found]
        return sorted(pairs, key=lambda pair: "monitor" not in json.dumps(pair[0].get("steering")))


@contextmanager
def visit(browser: Any, url: str, *, faults: str = "^$", **context: Any) -> Iterator[Visit]:
    """A fresh page; afterwards: no complaint but those that `faults` matches, and no request to anybody else."""
    opened = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | context)
    opened.set_default_timeout(15_000)
    try:
        made = Visit(opened.new_page(), url)
        yield made
        assert [text for text in made.complaints if not re.search(faults, text)] == []
        assert {httpx.URL(item.url).host for item in made.asked} == {httpx.URL(url).host}
    finally:
        opened.close()


def events(text: str) -> list[dict[str, Any]]:
    data = [block.removeprefix("data: ") for block in text.split("\n\n") if block.strip()]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


def content(chunks: list[dict[str, Any]]) -> str:
    return "".join(item["choices"][0]["delta"].get("content") or "" for item in chunks if item["choices"])


def traced(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tokens that made text."""
    tokens = [token for item in chunks for token in item.get("steering", {}).get("tokens", [])]
    return [token for token in tokens if token["text"]]


def choose(page: Any, label: str, value: str) -> None:
    page.get_by_role("combobox", name=label, exact=True).select_option(value)


# --- without a browser


def test_every_file_is_served_and_none_names_another_origin():
    for file in PAGE.rglob("*"):
        if file.suffix in {".html", ".js", ".css", ".svg"} and file.parent.name != "vendor":
            text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?://|//cdn", text), file
            assert "innerHTML" not in text, file
    index = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", index), "inline code"


def test_the_server_gives_the_page_under_a_policy_that_forbids_the_rest(address):
    answer = httpx.get(f"{address}/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    for path in re.findall(r'(?:src|href)="([^"]+)"', answer.text):
        assert httpx.get(f"{address}/{path}").status_code == 200, path


def test_vendored_code_comes_with_its_licences():
    texts = {file.name: file.read_text(encoding="utf-8") for file in (PAGE / "vendor").glob("LICENSE-*.txt")}
    assert "Jason Miller" in texts["LICENSE-preact.txt"]
    assert "Apache License" in texts["LICENSE-htm.txt"]


# --- in the browser


@pytest.mark.parametrize("toward", ["aligned", "violating"])
def test_the_tokens_on_the_page_are_those_of_the_answers(browser, address, toward):
    with visit(browser, address) as seen:
        choose(seen.page, "Steer with", "own")
        choose(seen.page, "Direction", "dishonesty")
        choose(seen.page, "Method", "stmp")
        choose(seen.page, "Toward", toward)
        seen.run()
        (asked, plain), (steered, told) = seen.exchanges()
        assert asked["steering"] | {"method": "monitor", "strength": 0} == asked["steering"]
        assert steered["steering"]["toward"] == toward
        assert asked["messages"][-1] == steered["messages"][-1] == {"role": "user", "content": QUESTION}
        boundary = 0.1 * steered["steering"]["layers"][0]
        for name, chunks, sign in (("Unsteered", plain, 1), ("Steered", told, -1 if toward == "violating" else 1)):
            shown, tokens = seen.answer(name), traced(chunks)
            assert shown.locator(".text").text_content() == content(chunks) != ""
            spans = [
                (item.text_content(), item.get_attribute("data-side"), item.get_attribute("data-mark"))
                for item in shown.locator(".token").all()
            ]
            mark = "edited" if name == "Steered" else "below"
            assert spans == [
                (
                    token["text"].lstrip() or token["text"],
                    "violating" if sign * token["projections"][0] < boundary else "aligned",
                    mark if any(token["edited"]) else "",
                )
                for token in tokens
            ]
            assert len({span[2] for span in spans}) == 2, "marked and unmarked ones: the test can fail"
        dots = seen.page.locator(".rug circle")
        assert dots.count() == len(traced(plain)) + len(traced(told))
        term = told[-1]["steering"]["receipts"][0]["terms"][0]
        receipt = seen.answer("Steered").locator(".receipt tbody").text_content().replace("−", "-").replace("+", "")
        assert f"{term['tokens_edited']} of {term['tokens_seen']} " in receipt
        assert f"{term['projection_before']:.2f} → {term['projection_after']:.2f}" in receipt
        assert f"{term['perturbation']:.2f}" in receipt


def test_tints_can_be_read_at_any_of_several_layers(browser, address):
    with visit(browser, address) as seen:
        choose(seen.page, "Steer with", "own")
        for layer in range(6):
            seen.page.locator(".layers input").nth(layer).set_checked(layer in (1, 4), force=True)
        choose(seen.page, "Method", "stmp")
        seen.run()
        _, (sent, told) = seen.exchanges()
        assert sent["steering"]["layers"] == [1, 4]
        choose(seen.page, "layer", "4")
        sides = [item.get_attribute("data-side") for item in seen.answer("Steered").locator(".token").all()]
        assert sides == ["violating" if token["projections"][1] < 0.4 else "aligned" for token in traced(told)]
        assert seen.answer("Steered").locator(".receipt tbody tr").count() == 2


def test_everything_works_by_keyboard(browser, address):
    with visit(browser, address) as seen:
        page = seen.page
        page.wait_for_selector("#prompt")

        def tab_to(selector: str) -> None:
            for _ in range(60):
                page.keyboard.press("Tab")
                if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                    return
            raise AssertionError(f"Tab does not reach {selector}")

        tab_to("#prompt")
        page.keyboard.press("Control+a")
        page.keyboard.type("Who wrote Moby Dick?")
        tab_to(".steer select")
        page.keyboard.press("Control+Enter")
        seen.settled()
        tab_to("[data-name=Steered] .token")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        tokens = seen.answer("Steered").locator(".token")
        assert tokens.nth(2).evaluate("item => item === document.activeElement")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        sent, told = seen.exchanges()[1]
        policy = next(
            item
            for item in httpx.get(f"{address}/v1/steering").json()["policies"]
            if sent["steering"] in ({"policy": item["name"]}, own_of(item))
        )
        watch = policy["watches"][0]
        z = (traced(told)[2]["projections"][0] - watch["boundary"]) / watch["separation"]
        tip = page.get_by_role("tooltip").text_content().replace("−", "-")
        assert f"{z:+.2f} class separations" in tip
        assert ("not edited" in tip) is not any(traced(told)[2]["edited"])
        page.keyboard.press("Escape")
        assert page.get_by_role("tooltip").count() == 0


def own_of(policy: dict[str, Any]) -> dict[str, Any]:
    """A policy as a request's own steering."""
    return {name: policy[name] for name in ("direction", "method", "layers", "strength", "position", "toward")}


def test_the_copied_requests_are_the_one_that_was_sent(browser, address):
    pytest.importorskip("openai")
    with visit(browser, address, permissions=["clipboard-read", "clipboard-write"]) as seen:
        seen.run()
        sent, told = seen.exchanges()[1]
        assert sent.pop("stream") is True
        assert sent.pop("steering_trace") is True
        seen.page.get_by_text("Copy as curl").click()
        seen.page.get_by_text("curl copied").wait_for()
        words = shlex.split(seen.page.evaluate("navigator.clipboard.readText()"))
        assert words[:2] == ["curl", f"{address}/v1/chat/completions"]
        assert json.loads(words[words.index("-d") + 1]) == sent
        answer = httpx.post(words[1], json=sent, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == content(told)
        seen.page.get_by_text("Copy as Python").click()
        seen.page.get_by_text("Python copied").wait_for()
        program = seen.page.evaluate("navigator.clipboard.readText()")
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
        assert ran.stdout.startswith(content(told) + "\n")
        assert answer["steering"]["edit_id"] in ran.stdout


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(browser, address, scheme):
    with visit(browser, address, viewport={"width": 360, "height": 780}, color_scheme=scheme, has_touch=True) as seen:
        seen.page.locator(".steer > summary").click()
        choose(seen.page, "Steer with", "own")
        seen.run("A-word-that-is-much-longer-than-the-screen-is-wide-" * 4)
        seen.answer("Steered").locator(".token").last.click()
        seen.page.get_by_text("Copy as Python").click()
        assert seen.page.evaluate("document.documentElement.scrollWidth") == 360


def test_ready_texts_follow_the_concept(browser, address):
    with visit(browser, address) as seen:
        choose(seen.page, "Steer with", "policy:a-bounded-one")  # along `dishonesty`
        ready = seen.page.locator(".chips").first.get_by_role("button")
        ready.nth(1).click()
        assert seen.page.input_value("#system") == ready.nth(1).text_content()
        assert [item.get_attribute("aria-pressed") for item in ready.all()] == ["false", "true", "false"]
        choose(seen.page, "Steer with", "policy:honest")  # along `made`, for which the page has no texts
        seen.page.wait_for_selector(".chips", state="detached")


def test_what_the_server_refuses_is_said_where_the_answer_would_be(browser, address):
    with visit(browser, address, faults="400") as seen:
        choose(seen.page, "Steer with", "policy:a-bounded-one")
        seen.page.fill("#strength-exact", "9.5")
        seen.run()
        error = seen.answer("Steered").get_by_role("alert").text_content()
        assert "9.5" in error
        assert seen.answer("Unsteered").get_attribute("data-state") == "done"


def test_a_study_is_linked_where_the_server_has_one(browser, pilot, address, tmp_path):
    page = tmp_path / "report.html"
    page.write_text("<title>What we found</title>")
    with live(service(pilot, report=page)) as url, visit(browser, url) as seen:
        seen.page.get_by_role("link", name="Study report").click()
        assert seen.page.title() == "What we found"
    with visit(browser, address) as seen:
        seen.page.wait_for_selector("#about strong")
        assert seen.page.get_by_role("link").count() == 0


def test_a_locked_server_shows_its_answer_only(browser, pilot):
    with live(service(pilot, catalog=catalog(pilot, "locked"))) as url, visit(browser, url) as seen:
        seen.page.get_by_text("Locked: ").wait_for()
        assert seen.page.get_by_role("combobox", name="Steer with").is_disabled()
        seen.run()
        ((sent, told),) = seen.exchanges()
        assert "steering" not in sent
        assert seen.answer("Unsteered").count() == 0
        assert seen.answer("Steered").locator(".text").text_content() == content(told)
        assert seen.answer("Steered").locator("[data-mark=edited]").count() > 0


def test_a_key_is_asked_for_and_kept_for_the_tab_only(browser, pilot):
    with live(service(pilot, keys=keys("ann"))) as url, visit(browser, url, faults="401") as seen:
        seen.page.get_by_text("This server asks for an API key.").wait_for()
        seen.page.get_by_label("API key").fill(key_of("ann"))
        seen.page.keyboard.press("Enter")
        seen.run()
        assert seen.answer("Steered").get_attribute("data-state") == "done"
        assert seen.page.evaluate("[Object.values(sessionStorage), localStorage.length]") == [[key_of("ann")], 0]
        seen.page.get_by_text("Copy as Python").click()
        assert key_of("ann") not in seen.page.locator(".copy textarea").input_value()


def test_an_answer_is_text_whatever_it_says(browser, pilot):
    with ExitStack() as stack:
        url = stack.enter_context(live(service(pilot, scheduler=FakeScheduler(TRICKS))))
        seen = stack.enter_context(visit(browser, url, viewport={"width": 360, "height": 780}))
        seen.page.on("dialog", lambda dialog: seen.complaints.append(dialog.message))
        seen.run()
        assert seen.answer("Steered").locator(".text").text_content() == "".join(TRICKS)
        assert seen.page.locator(".text :is(img, script)").count() == 0
        assert seen.page.evaluate("document.documentElement.scrollWidth") == 360


def test_a_fault_in_mid_answer_keeps_what_was_said(browser, pilot):
    scheduler = FakeScheduler(("so ", "far"), fault=EngineError("activations are not finite; lower the strength"))
    with live(service(pilot, scheduler=scheduler)) as url, visit(browser, url) as seen:
        seen.run()
        assert seen.answer("Steered").locator(".text").text_content() == "so far"
        assert "lower the strength" in seen.answer("Steered").get_by_role("alert").text_content()


class Unhurried(FakeScheduler):
    """Twenty pieces a second, for ever."""

    async def _run(self, asked: Any) -> Any:
        async for piece in super()._run(asked):
            await asyncio.sleep(0.05)
            yield piece


def test_escape_stops_both_answers_and_frees_the_server(browser, pilot):
    scheduler = Unhurried(endless=True)
    with live(service(pilot, scheduler=scheduler)) as url, visit(browser, url) as seen:
        seen.page.fill("#prompt", "For ever?")
        seen.page.keyboard.press("Control+Enter")
        seen.page.wait_for_selector("[data-name=Steered] .token")
        seen.page.keyboard.press("Escape")
        seen.settled()
        assert seen.answer("Steered").get_attribute("data-state") == "stopped"
        assert seen.answer("Unsteered").get_attribute("data-state") == "stopped"
        assert len(scheduler.tickets) == 2
        assert all(ticket.cancelled.wait(10) for ticket in scheduler.tickets)
