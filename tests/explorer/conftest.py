"""Explorers of real servers of a small index whose texts are full of markup, and a real browser."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import BrowserContext, Page, sync_playwright

from loopsway.client import AsyncClient, Client
from loopsway.explorer import Explorer
from loopsway.indexer import build_index, load_task
from loopsway.service import Settings
from serving import CONFIG, Gate, asked_for, running, without_model

TASK_FILE = Path(__file__).with_name("markup_task.py")
TASK_SPEC, LONG_SPEC = f"{TASK_FILE}:MarkupTask", f"{TASK_FILE}:LongTask"
OUTPUT = Path(__file__).parents[1] / "output" / "explorer"  # the screenshots; git ignores it
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@dataclass(frozen=True, kw_only=True)
class Explored:
    """A gRPC server, and an explorer of it.

    Attributes:
        gate: where tests can hold the server's model.
        client: of the same server.
    """

    url: str
    target: str
    gate: Gate
    client: Client


@pytest.fixture(scope="session")
def markup_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("indices") / "markup.index"
    build_index(load_task(TASK_SPEC), path, CONFIG, task_spec=TASK_SPEC, progress=False)
    return path


@contextmanager
def exploring(target: str, timeout_s: float = 60) -> Iterator[str]:
    """Runs an explorer of the server at the target in a thread; gives its address."""
    explorer = Explorer.bind(lambda: AsyncClient(target, timeout_s=timeout_s))
    thread = threading.Thread(target=explorer.server.run, args=[[explorer.listener]])
    thread.start()
    try:
        yield explorer.url
    finally:
        explorer.server.should_exit = True
        thread.join(60)
        explorer.listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def explore(markup_index: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Explored]]:
    """Starts servers and explorers that end with the module: `explore(model=True, timeout_s=60, **settings)`."""
    with ExitStack() as stack:

        def start(*, model: bool = True, timeout_s: float = 60, **limits: Any) -> Explored:
            gate = Gate(tmp_path_factory.mktemp("gate"))
            asked = asked_for(markup_index, gate, TASK_SPEC) if model else without_model(markup_index)
            settings = Settings(indices=(asked,), **{"port": 0, "grace_s": 1.0} | limits)
            _, port = stack.enter_context(running(settings))
            target = f"127.0.0.1:{port}"
            url = stack.enter_context(exploring(target, timeout_s))
            return Explored(url=url, target=target, gate=gate, client=stack.enter_context(Client(target)))

        yield start


@pytest.fixture(scope="module")
def explored(explore: Callable[..., Explored]) -> Explored:
    """With default limits."""
    return explore()


def chromium() -> str:
    """Where chromium is. Where it must be (NEEDS_CHROMIUM, as in CI), its absence is a failure."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None and os.environ.get("NEEDS_CHROMIUM"):
        pytest.fail("there is no chromium, and NEEDS_CHROMIUM is set; apt-get install chromium")
    if found is None:
        pytest.skip("there is no chromium; apt-get install chromium")
    return found


@pytest.fixture(scope="module")  # no longer: while it runs, no asynchronous test could
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    path = chromium()
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("browser"), executable_path=path, args=FLAGS, headless=True
        )
        context.set_default_timeout(20_000)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        yield context
        context.close()


@pytest.fixture
def page(browser: BrowserContext) -> Iterator[Page]:
    """A new page of 1440 x 1000, which asked no other host and met no error at the end, beside refused questions."""
    page = browser.new_page()
    page.set_viewport_size({"width": 1440, "height": 1000})
    hosts: set[str] = set()
    errors: list[str] = []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname or "127.0.0.1"))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    yield page
    page.close()
    assert hosts <= {"127.0.0.1"}
    assert not [error for error in errors if not error.startswith("Failed to load resource")]
