"""The web app: the page's files, and one POST for each thing that the page asks.

Each request becomes calls of the client; each answer is plain JSON, each failure a problem document (RFC 9457).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from loopsway.client import AsyncClient, LoopswayError

from . import documents, problems
from .asking import Asker
from .guard import Guard
from .questions import DrawQuestion, ExampleQuestion, InfluenceQuestion

PAGE = Path(__file__).with_name("page")
PLOTLY = Path(str(files("plotly"))) / "package_data"

Answer: TypeAlias = Callable[[Asker, Any], Awaitable[Any]]


def create_app(connect: Callable[[], AsyncClient], *, hosts: frozenset[str] = frozenset()) -> Starlette:
    """The app, which asks through the client that `connect` makes when the app starts.

    Args:
        connect: called once, within the event loop that runs the app.
        hosts: names by which browsers may reach it, beside localhost and IP addresses.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        async with connect() as client:
            app.state.asker = Asker(client)
            yield

    app = Starlette(
        lifespan=lifespan,
        routes=[
            Route("/api/indices", _answered(_indices), methods=["POST"]),
            Route("/api/examples", _answered(_examples), methods=["POST"]),
            Route("/api/influences", _answered(_influences), methods=["POST"]),
            Route("/api/example", _answered(_example), methods=["POST"]),
            Mount("/plotly", _OneFile("plotly.min.js", directory=PLOTLY)),
            Mount("/", _PageFiles(directory=PAGE, html=True)),
        ],
        exception_handlers={LoopswayError: problems.of_client, HTTPException: problems.of_http},
    )
    app.add_middleware(Guard, hosts=hosts)
    return app


def _answered(answer: Answer) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return JSONResponse(await answer(request.app.state.asker, await request.body()))

    return endpoint


async def _indices(asker: Asker, _body: bytes) -> Any:
    return {"indices": [documents.index(each) for each in await asker.indices()]}


async def _examples(asker: Asker, body: bytes) -> Any:
    return {"examples": [documents.example(each) for each in await asker.draw(DrawQuestion.read(body))]}


async def _influences(asker: Asker, body: bytes) -> Any:
    return documents.influences(await asker.influences(InfluenceQuestion.read(body)))


async def _example(asker: Asker, body: bytes) -> Any:
    question = ExampleQuestion.read(body)
    return documents.one_example(question.example_id, await asker.example(question))


class _PageFiles(StaticFiles):
    """Files that a browser asks about again each time, so that an upgrade is seen."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


class _OneFile(_PageFiles):
    """One file of a folder, and no other."""

    def __init__(self, name: str, *, directory: Path) -> None:
        super().__init__(directory=directory)
        self._name = name

    async def get_response(self, path: str, scope: Scope) -> Response:
        if path != self._name:
            raise HTTPException(404)
        return await super().get_response(path, scope)
