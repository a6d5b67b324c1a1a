"""Requests that can't be sent are refused before they are, with the field's name."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from inspect import signature
from typing import Any, get_type_hints

import numpy as np
import pytest
from google.protobuf.struct_pb2 import Struct

from loopsway.client import Client, ExampleQuery, IdQuery, InvalidQueryError, LoopswayError, SketchQuery
from loopsway.client.channel import channel_options
from loopsway.client.options import InfluenceOptions
from loopsway.client.requests import influences_request
from loopsway.client.responses import influence_results
from loopsway.v1 import attribution_pb2 as pb

ONE = [IdQuery("a")]
WRONG: dict[str, tuple[Callable[[Any], Any], str | None, str]] = {
    "one query": (lambda c: c.find_influences(IdQuery("a")), "queries", r"write \[query\]"),
    "a string": (lambda c: c.find_influences(["a"]), "queries[0]", "is a str, expected an ExampleQuery"),
    "no JSON": (lambda c: c.find_influences([ExampleQuery({1, 2})]), "queries[0].example_json", "set is not JSON"),
    "NaN": (lambda c: c.find_influences([ExampleQuery(float("nan"))]), "queries[0].example_json", "as JSON"),
    "no numbers": (lambda c: c.find_influences([SketchQuery("x", "f")]), "queries[0].sketch.values", "not an array"),
    "ragged": (lambda c: c.find_influences([SketchQuery([[1], [1, 2]], "f")]), "queries[0].sketch.values", "not an"),
    "huge k": (lambda c: c.find_influences(ONE, k=1 << 40), "k", "whole number of 32 bits"),
    "half k": (lambda c: c.find_influences(ONE, k=0.5), "k", "k is 0.5, expected a whole number"),
    "mode": (lambda c: c.find_influences(ONE, resolve="both"), "resolve", "expected one of query_step, train_step"),
    "matrix": (lambda c: c.find_influences(ONE, resolve="step_matrix"), "resolve", "expected one of"),
    "no steps": (lambda c: c.find_influences(ONE, steps=[]), "steps", "leave it None for all"),
    "no steps of trajectories": (lambda c: c.get_trajectories(ONE, ["a"], steps=()), "steps", "leave it None for all"),
    "step": (lambda c: c.find_influences(ONE, steps=[0, 1 << 31]), "steps[1]", "whole number of 32 bits"),
    "one id": (lambda c: c.get_trajectories(ONE, "a"), "example_ids", r"write \['a'\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_request_that_cannot_be_sent_is_named(case: str) -> None:
    call, field, message = WRONG[case]
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidQueryError, match=message) as caught:
        call(client)
    assert caught.value.field == field


def test_a_keyword_that_is_none_is_named_and_both_methods_take_the_same() -> None:
    known = set(get_type_hints(InfluenceOptions))
    defaults = signature(influences_request).parameters
    assert known == set(defaults) - {"queries"}
    with Client("127.0.0.1:1") as client:
        for ask in (client.find_influences, client.stream_influences):
            with pytest.raises(TypeError, match="'wher'"):
                ask(ONE, wher="id == 'a'")  # type: ignore[call-arg]


def test_integers_of_numpy_are_integers() -> None:
    with Client("127.0.0.1:1", timeout_s=5) as client, pytest.raises(ConnectionError):
        client.find_influences(ONE, k=np.int64(3), steps=np.arange(2))  # type: ignore[arg-type]


def test_errors_survive_pickling_as_between_processes() -> None:
    error = InvalidQueryError("k: wrong", field="k")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.field) == (InvalidQueryError, "k: wrong", "k")
    assert issubclass(InvalidQueryError, LoopswayError)


def test_loopback_never_goes_through_a_proxy() -> None:
    both = "ipv4:127.0.0.1:1,127.0.0.2:1"
    there = ("127.0.0.1:1", "localhost:1", "[::1]:1", both)
    away = ("host:1", f"{both},192.0.2.7:1", "ipv4:192.0.2.7:1,127.0.0.1:1")
    for target, is_loopback in [*((each, True) for each in there), *((each, False) for each in away)]:
        assert (("grpc.enable_http_proxy", 0) in channel_options(target, 1)) == is_loopback


def test_metadata_comes_back_as_plain_values_not_finite_ones_too() -> None:
    metadata = Struct()
    metadata.update({"b": 3, "a": 0.5, "text": "3", "flag": True, "none": None, "inf": math.inf, "list": [1, "x"]})
    ranking = pb.Ranking(proponents=[pb.Influencer(example_id="e", metadata=metadata)])
    response = pb.FindInfluencesResponse(results=[pb.QueryInfluences(total=ranking)])
    got = influence_results(response)[0].total.proponents[0].metadata
    assert got == {"a": 0.5, "b": 3, "flag": True, "inf": math.inf, "list": [1, "x"], "none": None, "text": "3"}
    assert list(got) == sorted(got)
    assert isinstance(got["b"], int)
