"""How the page looks and reads: accessibility rules in both themes, and screenshots for people to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlencode

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from loopsway.cli.child import running_server

from .conftest import OUTPUT, Explored, chromium, exploring

QUERY = json.dumps({"tokens": [0, 1, 2, 3, 4, 5]})
RULES = {"resultTypes": ["violations"], "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}
WIDE, PHONE = {"width": 1440, "height": 1000}, {"width": 390, "height": 844}
VIEWS: dict[str, dict[str, object]] = {
    "start": {},
    "answer": {"example": QUERY, "step": 1},
    "error": {"example": QUERY, "where": "row < < 3"},
}


def settled(page: Page) -> None:
    expect(page.locator("#drawn li, .ranking, .field-error p").first).to_be_visible()
    expect(page.locator("html:not([data-busy])")).to_be_attached()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("name", "size"),
    [("start", WIDE), ("answer", WIDE), ("answer", PHONE), ("error", WIDE)],
    ids=["start", "answer", "answer on a phone", "error"],
)
def test_no_accessibility_rule_is_broken(
    page: Page, explored: Explored, name: str, size: dict[str, int], scheme: Literal["light", "dark"]
) -> None:
    page.set_viewport_size({"width": size["width"], "height": size["height"]})
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{explored.url}?{urlencode({'index': 'markup'} | VIEWS[name])}")
    settled(page)
    for summary in page.locator(".data summary:visible").all():
        summary.click()
    results = Axe().run(page, options=RULES).response
    found = [(rule["id"], rule["impact"], [node["html"][:160] for node in rule["nodes"]])
             for rule in results["violations"]]  # fmt: skip
    assert not found
    assert len(results["passes"]) > 20, "the rules were not applied"


@pytest.mark.parametrize(("needed", "outcome"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_without_a_chromium_these_tests_are_skipped_and_in_ci_they_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, needed: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("NEEDS_CHROMIUM", needed)
    with pytest.raises(outcome, match="apt-get install chromium"):
        chromium()


@pytest.mark.timeout(600)  # the first test that asks for the demo trains its model
def test_screenshots_of_the_demos_index(
    demonstrated: tuple[Path, str], page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout, _ = demonstrated
    monkeypatch.chdir(checkout)  # the index names its training by a path from here
    OUTPUT.mkdir(parents=True, exist_ok=True)
    asked = {"index": "parity", "example": '{"bits": "0101010101"}', "k": 5}
    shots: list[tuple[str, dict[str, int], Literal["light", "dark"], Mapping[str, object]]] = [
        ("light", WIDE, "light", asked),
        ("dark", WIDE, "dark", asked | {"step": 0}),
        ("phone", PHONE, "light", asked),
        ("start", WIDE, "light", {"index": "parity"}),
        ("filter", WIDE, "light", asked | {"where": "lenght < 8"}),
    ]
    with (
        running_server(["runs/demo/parity.index"], checkout) as port,
        exploring(f"127.0.0.1:{port}") as url,
    ):
        for name, size, scheme, view in shots:
            page.set_viewport_size({"width": size["width"], "height": size["height"]})
            page.emulate_media(color_scheme=scheme)
            page.goto(f"{url}?{urlencode(view)}")
            settled(page)
            picture = page.screenshot(path=OUTPUT / f"{name}.png", full_page=True)
            assert len(picture) > 20_000, "the picture is empty"
