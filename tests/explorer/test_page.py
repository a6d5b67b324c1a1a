"""The page in a real chromium: what it shows is what the client answers, and it works by keyboard and address."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect

from loopsway.client import ExampleQuery, IdQuery
from loopsway.indexer import build_index, load_task
from loopsway.service import IndexSettings, Settings
from serving import CONFIG, QUERIES, Gate, asked_for, running
from silence import read_in_shards

from .conftest import LONG_SPEC, TASK_SPEC, Explored, exploring

QUERY = json.dumps(QUERIES[0])
STEPS = 3


def opened(page: Page, explored: Explored, **view: Any) -> Page:
    """The page at a view of the index; waits until the answer is drawn, where the view asks."""
    page.goto(f"{explored.url}?{urlencode({'index': 'markup'} | view)}")
    if "example" in view or "id" in view:
        answered(page)
    return page


def answered(page: Page) -> None:
    expect(page.locator("#status")).to_contain_text("Answered")
    expect(page.locator("html:not([data-busy])")).to_be_attached()


def address(page: Page) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).query).items()}


def shown_ids(page: Page, kind: str) -> list[str]:
    return page.locator(f".ranking:has([id^={kind}-]) .id").all_inner_texts()


def saved(page: Page, button: str) -> bytes:
    with page.expect_download() as download:
        page.locator(f"#{button}").click()
    return Path(download.value.path()).read_bytes()


def saved_rows(page: Page, button: str) -> list[dict[str, str]]:
    text = saved(page, button).decode()
    assert "\r\n" in text
    return list(csv.DictReader(io.StringIO(text, newline="")))


@contextmanager
def held(gate: Gate) -> Iterator[None]:
    """The server's model waits meanwhile."""
    gate.hold()
    try:
        yield
    finally:
        gate.open()


def test_a_typed_query_shows_the_clients_rankings(page: Page, explored: Explored) -> None:
    opened(page, explored)
    page.locator("#query").fill(QUERY)
    page.locator("#k").fill("4")
    page.locator("#query").press("Control+Enter")
    answered(page)
    (expected,) = explored.client.find_influences([ExampleQuery(QUERIES[0])], k=4)
    assert shown_ids(page, "proponents") == [each.example_id for each in expected.total.proponents]
    assert shown_ids(page, "opponents") == [each.example_id for each in expected.total.opponents]
    assert address(page)["example"] == QUERY
    first = expected.total.proponents[0]
    row = page.locator(".ranking tbody tr").first
    shown = row.locator(".influence").inner_text()
    assert float(shown.split("±")[0].replace("\u2212", "-")) == pytest.approx(first.influence, rel=0.01)
    mark = row.locator(".mark").get_attribute("aria-label")
    assert mark == ("significant" if first.significant else "within two standard errors of zero")


def test_arrow_keys_walk_through_the_steps(page: Page, explored: Explored) -> None:
    opened(page, explored, example=QUERY)
    (expected,) = explored.client.find_influences([ExampleQuery(QUERIES[0])])
    page.locator("#step-all").focus()
    for step in range(STEPS):
        page.keyboard.press("ArrowRight")
        expect(page.locator(f"#step-{step}")).to_be_focused()
        expect(page.locator(f"#step-{step}")).to_have_attribute("aria-selected", "true")
        expect(page.locator("caption").first).to_contain_text(f"Proponents at step {step}")
        assert address(page)["step"] == str(step)
        assert shown_ids(page, "proponents") == [each.example_id for each in expected.steps[step].proponents]
    page.keyboard.press("ArrowRight")
    expect(page.locator(f"#step-{STEPS - 1}")).to_be_focused()
    page.keyboard.press("Home")
    expect(page.locator("#step-all")).to_be_focused()
    assert "step" not in address(page)
    page.keyboard.press("End")
    expect(page.locator(f"#step-{STEPS - 1}")).to_have_attribute("aria-selected", "true")


@pytest.mark.parametrize("step", range(STEPS))
def test_a_click_on_the_trajectory_chooses_the_step_below(page: Page, explored: Explored, step: int) -> None:
    opened(page, explored, example=QUERY)
    tab, chart = page.locator(f"#step-{step}").bounding_box(), page.locator("#trajectory").bounding_box()
    assert tab is not None
    assert chart is not None
    middle = tab["x"] + tab["width"] / 2
    page.mouse.move(middle, chart["y"] + 40)
    page.mouse.click(middle, chart["y"] + 42)
    expect(page.locator(f"#step-{step}")).to_have_attribute("aria-selected", "true")


def test_everything_is_reached_by_the_keyboard_alone(page: Page, explored: Explored) -> None:
    opened(page, explored, example=QUERY, k=2)
    reached: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        visible = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
        assert page.evaluate(visible) or page.evaluate("document.activeElement.closest('.switch') !== null"), reached
        if reached[-1] == "example-link mono":  # a neighbour: the last of the page
            break
    for name in ("index", "theme", "query", "k", "where", "ask", "share", "step-all", "rankings", "proponents-0",
                 "row-ask", "ask-selected", "save-matrix-csv", "save-trajectory-png"):  # fmt: skip
        assert name in reached, (name, reached)


def test_an_example_that_is_clicked_is_shown_with_its_matrix_text_and_metadata(page: Page, explored: Explored) -> None:
    opened(page, explored, example=QUERY)
    (expected,) = explored.client.find_influences([ExampleQuery(QUERIES[0])])
    chosen = expected.total.opponents[1]
    page.locator("#opponents-1").click()
    expect(page.locator("#example-title")).to_contain_text(chosen.example_id)
    assert address(page)["selected"] == chosen.example_id
    expect(page.locator("#matrix .heatmaplayer image, #matrix .heatmaplayer .hm")).not_to_have_count(0)
    assert page.locator(".example-text").inner_text() == chosen.description
    assert page.locator(".metadata dd").all_inner_texts() == ["none", *map(str, list(chosen.metadata.values())[1:])]
    rows = saved_rows(page, "save-matrix-csv")
    matrix = explored.client.get_trajectories([ExampleQuery(QUERIES[0])], [chosen.example_id], resolve="step_matrix")
    assert len(rows) == STEPS * STEPS
    for row in rows:
        expected_value = matrix.influences[0, 0, int(row["train_step"]), int(row["query_step"])]
        assert float(row["influence"]) == pytest.approx(expected_value, rel=1e-4, abs=1e-6)
    page.locator("#matrix-data summary").click()
    expect(page.locator("#matrix-data td")).to_have_count(STEPS * STEPS)
    page.locator("#trajectory-data summary").click()
    expect(page.locator("#trajectory-data tbody tr")).to_have_count(STEPS)


def test_an_example_ranked_at_a_step_alone_joins_the_trajectories(page: Page, explored: Explored) -> None:
    opened(page, explored, example=QUERY, k=1, selected="tiny-20")
    expect(page.locator(".legend-entry[aria-pressed=true]")).to_have_count(1)
    rows = [row for row in saved_rows(page, "save-trajectory-csv") if row["example_id"] == "tiny-20"]
    curve = explored.client.get_trajectories([ExampleQuery(QUERIES[0])], ["tiny-20"]).influences[0, 0]
    assert [float(row["influence"]) for row in rows] == pytest.approx(curve, rel=1e-4, abs=1e-6)


def test_an_example_becomes_the_query_and_back_goes_back(page: Page, explored: Explored) -> None:
    opened(page, explored, example=QUERY)
    before = page.url
    ids = shown_ids(page, "proponents")
    page.locator(".row-ask").first.click()
    expect(page.locator("#asked")).to_contain_text(f"training example {ids[0]}")
    answered(page)
    assert address(page)["id"] == ids[0]
    (expected,) = explored.client.find_influences([IdQuery(ids[0])])
    assert shown_ids(page, "proponents") == [each.example_id for each in expected.total.proponents]
    page.locator("#ask-selected").click()
    page.go_back()
    page.go_back()
    expect(page.locator("#asked")).to_contain_text('{"tokens"')
    answered(page)
    assert page.url == before
    assert shown_ids(page, "proponents") == ids
    page.go_forward()
    expect(page.locator("#asked")).to_contain_text(f"training example {ids[0]}")


def test_an_address_brings_the_same_view_back(page: Page, explored: Explored) -> None:
    view = {"example": QUERY, "resolve": "train_step", "k": 3, "where": "row < 20", "step": 1, "selected": "tiny-3"}
    opened(page, explored, **view)
    assert address(page) == {"index": "markup"} | {name: str(value) for name, value in view.items()}
    expect(page.locator("#step-1")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#example-title")).to_contain_text("tiny-3")
    expect(page.locator("#axis")).to_have_text("step of the training example's loop")
    assert page.locator("#where").input_value() == "row < 20"
    (expected,) = explored.client.find_influences(
        [ExampleQuery(QUERIES[0])], k=3, resolve="train_step", where="row < 20"
    )
    assert shown_ids(page, "opponents") == [each.example_id for each in expected.steps[1].opponents]
    page.locator("#share").click()
    expect(page.locator("#share")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == page.url


@pytest.mark.parametrize(
    "search", ["?step=99&example=%7B", "?k=x&index=none&id=1", "?resolve=%3Cscript%3E&id=tiny-1", "?selected=a&step=-1"]
)
def test_an_address_that_makes_no_sense_is_told_or_shows_the_start(page: Page, explored: Explored, search: str) -> None:
    page.goto(explored.url + search)
    expect(page.locator("#alert .problem, .field-error p, #drawn li").first).to_be_visible()


def test_an_index_and_whose_steps_are_chosen(page: Page, explored: Explored, markup_index: Path) -> None:
    both = [IndexSettings(name=name, path=str(markup_index), task=TASK_SPEC) for name in ("markup", "again")]
    settings = Settings(indices=tuple(both), port=0, grace_s=1.0)
    with running(settings) as (_, port), exploring(f"127.0.0.1:{port}") as url:
        page.goto(f"{url}?{urlencode({'index': 'markup', 'example': QUERY})}")
        answered(page)
        page.get_by_label("Index", exact=True).select_option("again")
        expect(page.locator("#drawn li")).to_have_count(6)
        expect(page.locator("#answer")).to_be_hidden()
        assert address(page) == {"index": "again"}
        page.get_by_label("a training id").check(force=True)
        page.locator("#query").fill("tiny-3")
        page.get_by_label("Steps of", exact=True).select_option("the training example")
        page.locator("#ask").click()
        answered(page)
        expect(page.locator("#facts")).to_contain_text("again, generation 1")
        expect(page.locator("#axis")).to_have_text("step of the training example's loop")
        (expected,) = explored.client.find_influences([IdQuery("tiny-3")], resolve="train_step")
        page.locator("#step-2").click()
        expect(page.locator("caption").first).to_contain_text("Proponents at step 2")
        assert shown_ids(page, "proponents") == [each.example_id for each in expected.steps[2].proponents]
        page.go_back()
        page.go_back()
        expect(page.locator("#asked")).to_contain_text('{"tokens"')
        assert page.get_by_label("Index", exact=True).input_value() == "markup"


def test_a_query_is_picked_from_training_examples_that_are_drawn(page: Page, explored: Explored) -> None:
    opened(page, explored)
    expect(page.locator("#drawn li")).to_have_count(6)
    first = page.locator("#drawn .id").all_inner_texts()
    page.locator("#draw").click()
    expect(page.locator("#drawn .id").first).not_to_have_text(first[0])
    chosen = page.locator("#drawn .id").nth(2).inner_text()
    page.locator("#drawn button").nth(2).click()
    expect(page.locator("#asked")).to_contain_text(chosen)
    answered(page)


def test_a_filter_narrows_and_one_that_keeps_nothing_says_so(page: Page, explored: Explored) -> None:
    opened(page, explored, example=QUERY)
    page.locator("#where").fill("row in [3, 5]")
    page.locator("#where").press("Enter")
    expect(page.locator("#facts")).to_contain_text("where row in [3, 5]")
    answered(page)
    assert set(shown_ids(page, "proponents") + shown_ids(page, "opponents")) == {"tiny-3", "tiny-5"}
    page.locator("#where").fill("row < 0")
    page.locator("#where").press("Enter")
    expect(page.locator("#status")).to_have_text("Answered: no training example was found.")
    expect(page.locator(".nothing")).to_have_count(2)
    expect(page.locator("#example")).to_be_hidden()


def test_a_filter_that_can_not_be_read_is_told_beside_its_field_at_its_place(page: Page, explored: Explored) -> None:
    opened(page, explored, example=QUERY)
    page.locator("#where").fill("  row < < 3")
    page.locator("#where").press("Enter")
    error = page.locator("#where-error")
    expect(error).to_contain_text("invalid syntax at character 7")
    line, caret = error.locator("pre").inner_text().split("\n")
    assert (line, caret.index("▲")) == ("row < < 3", 6)
    expect(page.locator("#where")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#where")).to_be_focused()
    assert page.evaluate("document.activeElement.value.slice(document.activeElement.selectionStart, -2)") == "<"
    page.locator("#where").fill("row < 3")
    page.locator("#where").press("Enter")
    answered(page)
    expect(error).to_be_empty()
    expect(page.locator("#where")).not_to_have_attribute("aria-invalid", "true")


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("example", '{"tokens": ', "not JSON"),
        ("example", '{"tokens": [9]}', "expected 6 whole numbers"),
        ("id", "tiny-99", "tiny-99"),
        ("id", "", "id"),
    ],
)
def test_a_wrong_query_is_told_beside_its_field(
    page: Page, explored: Explored, kind: str, text: str, said: str
) -> None:
    opened(page, explored)
    page.get_by_label("a training id" if kind == "id" else "an example", exact=True).check(force=True)
    page.locator("#query").fill(text)
    page.locator("#ask").click()
    expect(page.locator("#query-error")).to_contain_text(said)
    expect(page.locator("#query")).to_have_attribute("aria-invalid", "true")


def test_loading_is_shown_and_said(page: Page, explored: Explored) -> None:
    opened(page, explored, example=QUERY)
    with held(explored.gate):
        page.locator("#ask").click()
        expect(page.locator("#progress")).to_be_visible()
        expect(page.locator("#answer")).to_have_attribute("aria-busy", "true")
        expect(page.locator("#status")).to_have_text("Asking the server…")
    answered(page)
    expect(page.locator("#progress")).to_be_hidden()


def test_a_later_question_wins_over_an_earlier_one(page: Page, explored: Explored) -> None:
    opened(page, explored, example=QUERY)
    with held(explored.gate):
        page.locator("#ask").click()
        page.locator("#query").fill(json.dumps(QUERIES[1]))
        page.locator("#ask").click()
    answered(page)
    (expected,) = explored.client.find_influences([ExampleQuery(QUERIES[1])])
    assert shown_ids(page, "proponents") == [each.example_id for each in expected.total.proponents]


def test_a_server_that_is_away_is_told_and_asked_again(page: Page, markup_index: Path) -> None:
    with running(Settings(indices=(asked_for(markup_index, task=TASK_SPEC),), port=0)) as (_, port):
        pass  # its port is free again
    with exploring(f"127.0.0.1:{port}", timeout_s=5) as url:
        page.goto(url)
        expect(page.locator("#alert")).to_contain_text(f"127.0.0.1:{port}")
        settings = Settings(indices=(asked_for(markup_index, task=TASK_SPEC),), port=port, grace_s=1.0)
        with running(settings):
            for _ in range(10):
                page.get_by_role("button", name="Try again").click()
                expect(page.locator("html:not([data-busy])")).to_be_attached()
                if page.locator("#alert .problem").count() == 0:
                    break
            expect(page.locator("#drawn li")).to_have_count(6)


def test_an_index_without_its_model_says_so(page: Page, explore: Callable[..., Explored]) -> None:
    opened(page, explore(model=False))
    page.locator("#drawn button").first.click()
    expect(page.locator("#query-error")).to_contain_text("is served without its model")


def test_an_answer_without_a_shard_says_so_until_it_is_whole(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "markup.index"
    build_index(load_task(TASK_SPEC), path, CONFIG, task_spec=TASK_SPEC, block_rows=16, progress=False)
    settings = Settings(indices=(asked_for(path, task=TASK_SPEC),), port=0, grace_s=1.0)
    with running(settings) as (server, port), exploring(f"127.0.0.1:{port}", timeout_s=10) as url:
        [engine] = server.catalog.values()
        shards = read_in_shards(engine.index, 3, silent=[1])  # rows 16 to 31
        page.goto(f"{url}?{urlencode({'id': 'tiny-1', 'k': 48, 'selected': 'tiny-20'})}")
        answered(page)
        expect(page.locator("#partial")).to_contain_text("Only 67 % of the index's shards answered")
        expect(page.locator("#status")).to_contain_text("A part of the index did not answer.")
        rows = {int(each.removeprefix("tiny-")) for each in shown_ids(page, "proponents")}
        assert rows
        assert not rows & set(range(16, 32))
        expect(page.locator("#example")).to_contain_text("Of the shards that answered; others may hold closer ones.")
        expect(page.locator("#example")).to_contain_text("hold no text or metadata of it")
        expect(page.locator("#matrix .heatmaplayer")).to_be_attached()
        shards.silent = ()
        page.locator("#ask-again").click()
        expect(page.locator("#partial")).to_be_hidden()
        expect(page.locator("#example")).not_to_contain_text("Of the shards that answered")
        expect(page.locator(".neighbors li")).to_have_count(5)
        expect(page.locator(".metadata")).to_contain_text("20")


def test_training_text_is_shown_as_text(page: Page, explored: Explored) -> None:
    opened(page, explored, example=QUERY, selected="tiny-7")
    text = page.locator(".example-text")
    expect(text).to_contain_text('<img src=x onerror="document.title=1"> <b>row 7</b> &amp;')
    expect(page.locator(".metadata")).to_contain_text("<script>document.title=7</script>")
    assert page.locator("main img, main b, main script, #trajectory a").count() == 0
    picture = saved(page, "save-trajectory-png")
    assert struct.unpack(">II", picture[16:24]) == (2000, 1240)
    assert page.title() == f"{QUERY} · Loopsway explorer"


def test_tables_are_saved_as_csv_and_charts_as_png(page: Page, explored: Explored) -> None:
    opened(page, explored, example=QUERY, k=2)
    rows = saved_rows(page, "save-rankings")
    (expected,) = explored.client.find_influences([ExampleQuery(QUERIES[0])], k=2)
    expected_rows = [
        (str("" if ranking.step is None else ranking.step), sign, each)
        for ranking in (expected.total, *expected.steps)
        for sign, those in (("proponent", ranking.proponents), ("opponent", ranking.opponents))
        for each in those
    ]
    for row, (step, sign, each) in zip(rows, expected_rows, strict=True):
        assert (row["step"], row["sign"], row["example_id"]) == (step, sign, each.example_id)
        assert row["description"] == each.description
        assert row["metadata.source"] == each.metadata["source"]
        assert float(row["influence"]) == pytest.approx(each.influence, rel=1e-4, abs=1e-6)
    for button in ("save-trajectory-png", "save-matrix-png"):
        assert saved(page, button).startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("width", [1440, 390])
def test_many_steps_and_those_outside_the_loop_stand_in_line_with_the_chart(
    page: Page, tmp_path: Path, width: int
) -> None:
    path = tmp_path / "markup.index"
    build_index(load_task(LONG_SPEC), path, CONFIG, task_spec=LONG_SPEC, progress=False)
    settings = Settings(indices=(asked_for(path, task=LONG_SPEC),), port=0, grace_s=1.0)
    page.set_viewport_size({"width": width, "height": 1000})
    with running(settings) as (_, port), exploring(f"127.0.0.1:{port}") as url:
        page.goto(f"{url}?{urlencode({'example': QUERY, 'step': 30})}")
        answered(page)
        expect(page.locator("caption").first).to_contain_text("Proponents before the loop")
        for step, place in [(31, "after the loop"), (4, "at step 4"), (17, "at step 17")]:
            page.locator(f"#step-{step}").click()
            expect(page.locator("caption").first).to_contain_text(f"Proponents {place}")
            tab = page.locator(f"#step-{step}").bounding_box()
            band = page.locator("#trajectory .shapelayer path").first.bounding_box()  # marks the chosen step
            assert tab is not None
            assert band is not None
            assert (tab["x"], tab["width"]) == (
                pytest.approx(band["x"], abs=1.5),
                pytest.approx(band["width"], abs=1.5),
            )
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def luminance(page: Page, what: Locator, name: str) -> float:
    colour = what.evaluate(f"element => getComputedStyle(element).{name}")
    return sum(float(part) for part in re.findall(r"[\d.]+", colour)[:3]) / (3 * 255)


def test_dark_and_light_follow_the_system_until_one_is_chosen(page: Page, explored: Explored) -> None:
    page.emulate_media(color_scheme="dark")
    opened(page, explored, example=QUERY)
    body, label = page.locator("body"), page.locator("#trajectory .ytick text").first
    assert luminance(page, body, "backgroundColor") < 0.2 < 0.5 < luminance(page, label, "fill")
    page.emulate_media(color_scheme="light")
    expect(page.locator("#theme")).to_have_text("Auto")
    assert luminance(page, body, "backgroundColor") > 0.8
    page.locator("#theme").click()
    page.locator("#theme").click()
    expect(page.locator("#theme")).to_have_text("Dark")
    assert luminance(page, body, "backgroundColor") < 0.2
    page.reload()
    answered(page)
    expect(page.locator("#theme")).to_have_text("Dark")
    assert luminance(page, body, "backgroundColor") < 0.2
    page.locator("#theme").click()
    expect(page.locator("#theme")).to_have_text("Auto")


def test_a_phone_scrolls_in_one_direction_alone(page: Page, explored: Explored) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    opened(page, explored, example=QUERY)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator("#proponents-3").click()
    expect(page.locator("#example-title")).to_be_in_viewport()


def test_two_pages_share_nothing_but_the_explorer(browser: BrowserContext, page: Page, explored: Explored) -> None:
    opened(page, explored, example=QUERY)
    other = browser.new_page()
    opened(other, explored, id="tiny-1")
    expect(page.locator("#asked")).to_contain_text("tokens")
    expect(other.locator("#asked")).to_contain_text("tiny-1")
    other.close()
