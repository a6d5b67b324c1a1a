"""The explorer's HTTP side, asked over a socket: what it serves, what it refuses, and how failures are told."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from loopsway.client import AsyncClient, ExampleQuery, IdQuery, Influencer
from loopsway.explorer import Explorer
from loopsway.service import TokenSettings
from loopsway.service.tokens import digest, new_token
from serving import QUERIES

from .conftest import Explored, exploring

QUERY = {"example": json.dumps(QUERIES[0])}


def approx(expected: Any) -> Any:
    """A query that is sketched in a batch of another size differs by float32's rounding."""
    return pytest.approx(expected, rel=1e-4, abs=1e-6)


def send(
    url: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[HTTPResponse, bytes]:
    """One request; without a Host of its own, `headers` may bring one."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def ask(url: str, what: str, question: Any, **headers: str) -> tuple[HTTPResponse, Any]:
    sent = {"Content-Type": "application/json"} | headers
    response, body = send(url, "POST", f"/api/{what}", json.dumps(question).encode(), sent)
    return response, json.loads(body)


def assert_same(documents: list[dict[str, Any]], expected: tuple[Influencer, ...]) -> None:
    for document, each in zip(documents, expected, strict=True):
        assert document == {
            "example_id": each.example_id,
            "description": each.description,
            "metadata": dict(each.metadata),
            "influence": approx(each.influence),
            "standard_error": approx(each.standard_error),
            "significant": each.significant,
        }


def test_the_page_is_files_and_plotly_comes_from_its_package(explored: Explored) -> None:
    for path, kind, start in [
        ("/", "text/html", b"<!doctype html>"),
        ("/explorer.js", "text/javascript", b"//"),
        ("/explorer.css", "text/css", b"/*"),
        ("/plotly/plotly.min.js", "text/javascript", b"/**\n* plotly.js"),
    ]:
        response, body = send(explored.url, "GET", path)
        assert response.status == 200, path
        assert response.headers["Content-Type"].startswith(kind)
        assert body.startswith(start)
        again, nothing = send(explored.url, "GET", path, headers={"If-None-Match": response.headers["ETag"]})
        assert (again.status, nothing) == (304, b"")


@pytest.mark.parametrize(
    "path", ["/none", "/plotly/", "/plotly/datasets/iris.csv.gz", "/plotly/../app.py", "/..%2fapp.py", "/%2e%2e/app.py"]
)
def test_nothing_else_is_served(explored: Explored, path: str) -> None:
    response, body = send(explored.url, "GET", path)
    assert response.status == 404
    assert response.headers["Content-Type"] == "application/problem+json"
    assert json.loads(body)["status"] == 404


@pytest.mark.parametrize(("path", "host"), [("/", None), ("/none", None), ("/", "evil.example")])
def test_every_answer_forbids_foreign_code_frames_and_guessed_types(
    explored: Explored, path: str, host: str | None
) -> None:
    response, _ = send(explored.url, "GET", path, headers={"Host": host} if host else {})
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(("localhost:9", 200), ("LOCALHOST", 200), ("127.0.0.1:9", 200), ("[::1]:9", 200), ("192.0.2.7", 200)),
        *(("evil.example", 421), ("127.0.0.1.evil.example:9", 421), ("localhost.evil.example", 421), ("", 421)),
        *(("[::1", 421), ("user@evil.example", 421)),
    ],
)
def test_a_name_that_others_can_point_here_is_refused(explored: Explored, host: str, status: int) -> None:
    assert send(explored.url, "GET", "/", headers={"Host": host})[0].status == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_only_the_pages_own_origin_may_ask(explored: Explored, headers: dict[str, str], status: int) -> None:
    assert ask(explored.url, "indices", {}, **headers)[0].status == status


def test_the_pages_own_origin_may_ask(explored: Explored) -> None:
    assert ask(explored.url, "indices", {}, Origin=explored.url.rstrip("/"))[0].status == 200


def test_a_preflight_gets_no_leave_and_a_get_no_data(explored: Explored) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert send(explored.url, "OPTIONS", "/api/indices", headers=asked)[0].status == 403
    assert send(explored.url, "GET", "/api/indices")[0].status == 404


def test_a_body_beyond_the_limit_is_refused(explored: Explored) -> None:
    response, document = ask(explored.url, "influences", {"query": {"example": "x" * (1 << 20)}})
    assert response.status == 413
    assert "expected at most 1,048,576 bytes" in document["detail"]


def test_indices_are_those_of_the_server(explored: Explored) -> None:
    _, document = ask(explored.url, "indices", {})
    (index,) = document["indices"]
    expected = explored.client.get_index()
    assert (index["name"], index["num_examples"], index["num_steps"]) == ("markup", 48, expected.num_steps)
    assert index["checkpoints"] == ["early", "late"]


@pytest.mark.parametrize("resolve", ["query_step", "train_step", "same_step"])
def test_influences_are_the_clients_own(explored: Explored, resolve: Any) -> None:
    question = {"index": "markup", "query": QUERY, "resolve": resolve, "k": 3, "where": "row < 20"}
    response, document = ask(explored.url, "influences", question)
    assert response.status == 200
    query = ExampleQuery(QUERIES[0])
    (expected,) = explored.client.find_influences([query], k=3, resolve=resolve, where="row < 20")
    for ranking, own in zip(document["rankings"], [expected.total, *expected.steps], strict=True):
        assert ranking["step"] == own.step
        assert_same(ranking["proponents"], own.proponents)
        assert_same(ranking["opponents"], own.opponents)
    assert document["query"]["losses"] == approx(expected.query.losses)
    assert (document["recall"], document["coverage"]) == (expected.recall, expected.coverage) == (1, 1)
    ids = [each.example_id for each in (*expected.total.proponents, *expected.total.opponents)]
    curves = explored.client.get_trajectories([query], ids, resolve=resolve)
    for example_id, influences, errors in zip(ids, curves.influences[0], curves.standard_errors[0], strict=True):
        own = document["trajectories"][example_id]
        assert own == {"influences": approx(influences), "standard_errors": approx(errors)}
    ranked = (each for own in document["rankings"] for each in (*own["proponents"], *own["opponents"]))
    assert set(document["trajectories"]) == {each["example_id"] for each in ranked}


def test_one_example_is_the_clients_own_and_costs_no_model_call(explored: Explored) -> None:
    ask(explored.url, "influences", {"query": QUERY})
    calls = explored.gate.num_calls
    _, document = ask(explored.url, "example", {"query": QUERY, "example_id": "tiny-7"})
    assert explored.gate.num_calls == calls
    query = ExampleQuery(QUERIES[0])
    matrix = explored.client.get_trajectories([query], ["tiny-7"], resolve="step_matrix")
    assert np.array(document["matrix"]["influences"]) == approx(matrix.influences[0, 0])
    assert np.array(document["matrix"]["standard_errors"]) == approx(matrix.standard_errors[0, 0])
    curve = explored.client.get_trajectories([query], ["tiny-7"])
    assert document["trajectory"]["influences"] == approx(curve.influences[0, 0])
    assert document["shown"]["metadata"]["source"] == "<script>document.title=7</script>"
    [found] = explored.client.find_neighbors(["tiny-7"], k=5)
    assert [each["example_id"] for each in document["neighbors"]] == [each.example_id for each in found.neighbors]


def test_a_training_example_can_be_the_query(explored: Explored) -> None:
    _, document = ask(explored.url, "influences", {"query": {"id": "tiny-7"}, "k": 1})
    (expected,) = explored.client.find_influences([IdQuery("tiny-7")], k=1)
    assert_same(document["rankings"][0]["proponents"], expected.total.proponents)


def test_examples_are_drawn_within_the_filter_and_others_by_another_seed(explored: Explored) -> None:
    draws = [ask(explored.url, "examples", {"where": "row < 30", "seed": seed})[1]["examples"] for seed in (0, 0, 1)]
    ids = [[each["example_id"] for each in draw] for draw in draws]
    assert all(int(each["metadata"]["row"]) < 30 for draw in draws for each in draw)
    assert len(ids[0]) == 6
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("question", "status", "field", "position"),
    [
        ({"where": "row < < 3"}, 400, "where", 7),
        ({"where": "row <"}, 400, "where", None),  # the text says: at its end
        ({"where": "even and row < 2"}, 400, "where", 1),
        ({"where": 'row < "a"'}, 400, "where", None),
        ({"k": 0}, 400, "k", None),
        ({"k": "ten"}, 400, "k", None),
        ({"k": True}, 400, "k", None),
        ({"k": 1 << 40}, 400, "k", None),
        ({"resolve": "step_matrix"}, 400, "resolve", None),
        ({"query": None}, 400, "query", None),
        ({"query": {"example": '{"tokens": [1,}'}}, 400, "query", 15),
        ({"query": {"example": "[" * 100_000}}, 400, "query", None),
        ({"query": {"example": "1" * 5000}}, 400, "query", None),
        ({"query": {"example": '{"tokens": [NaN]}'}}, 400, "queries[0].example_json", None),
        ({"query": {"example": '{"tokens": [1]}'}}, 400, "queries[0].example_json", None),
        ({"query": {"id": "none"}}, 404, "queries[0].example_id", None),
        ({"index": "none"}, 404, "index", None),
    ],
)
def test_a_wrong_question_is_told_by_field_and_place(
    explored: Explored, question: dict[str, Any], status: int, field: str, position: int | None
) -> None:
    response, document = ask(explored.url, "influences", {"query": QUERY} | question)
    assert response.status == document["status"] == status, document
    assert response.headers["Content-Type"] == "application/problem+json"
    assert document["field"] == field, document
    assert document.get("position") == position, document
    assert document["detail"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_no_object_is_a_problem(explored: Explored, body: bytes) -> None:
    response, said = send(explored.url, "POST", "/api/influences", body, {"Content-Type": "application/json"})
    assert response.status == 400
    assert json.loads(said)["field"] == "body"


def test_a_server_that_failed_is_told_without_its_secrets(explored: Explored) -> None:
    example = json.dumps(QUERIES[0] | {"num_steps": 13})
    response, document = ask(explored.url, "influences", {"query": {"example": example}})
    assert response.status == 502, document
    assert "secret" not in document["detail"]


def test_an_index_without_its_model_refuses_examples_and_still_shows_some(explore: Callable[..., Explored]) -> None:
    explored = explore(model=False)
    response, document = ask(explored.url, "influences", {"query": QUERY})
    assert response.status == 409
    assert "model" in document["detail"]
    assert len(ask(explored.url, "examples", {})[1]["examples"]) == 6


def test_a_server_that_is_late_is_told(explore: Callable[..., Explored]) -> None:
    explored = explore(timeout_s=0.5)
    explored.gate.hold()
    try:
        response, document = ask(explored.url, "influences", {"query": QUERY})
    finally:
        explored.gate.open()
    assert response.status == 504, document
    assert "did not answer in time" in document["detail"]


def test_a_token_that_the_server_wants_and_the_explorer_lacks_is_told(explore: Callable[..., Explored]) -> None:
    tokens = (TokenSettings(name="reader", sha256=digest(new_token()), read=("*",)),)
    response, document = ask(explore(tokens=tokens).url, "indices", {})
    assert response.status == 403
    assert "token" in document["detail"]


def test_a_busy_server_is_told_with_when_to_come_back(explore: Callable[..., Explored]) -> None:
    explored = explore(max_waiting=1, retry_after_s=1.0)
    explored.gate.hold()
    with ThreadPoolExecutor() as pool:
        try:
            # A question is two calls: of the first, one runs, and one more may wait; so of the second, one is refused.
            first = pool.submit(ask, explored.url, "influences", {"query": QUERY})
            explored.gate.wait_until_entered()
            response, document = ask(explored.url, "influences", {"query": QUERY})
        finally:
            explored.gate.open()
    assert (response.status, response.headers["Retry-After"]) == (429, "1"), document
    first.result()


def test_no_server_is_told_with_what_to_do() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
        with exploring(target, timeout_s=5) as url:
            response, document = ask(url, "indices", {})
    assert response.status in (503, 504), document
    assert target in document["detail"]


def test_an_address_that_others_reach_is_refused_unless_forced() -> None:
    def connect() -> AsyncClient:
        raise AssertionError

    with pytest.raises(ValueError, match=r"host 0\.0\.0\.0 is not loopback"):
        Explorer.bind(connect, host="0.0.0.0")
    with pytest.raises(ValueError, match="is not loopback"):
        Explorer.bind(connect, host="example.org")
    explorer = Explorer.bind(connect, host="0.0.0.0", insecure_bind=True)
    explorer.listener.close()
    assert explorer.url.startswith("http://127.0.0.1:")


def test_a_taken_port_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"can't listen on 127.0.0.1:{port}"):
            Explorer.bind(lambda: AsyncClient("127.0.0.1:1"), port=port)
