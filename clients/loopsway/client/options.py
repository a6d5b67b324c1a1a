"""What can be asked about queries, as keywords that several methods of both clients take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

Resolve = Literal["query_step", "train_step", "same_step"]
TrajectoryResolve = Literal["query_step", "train_step", "same_step", "step_matrix"]
By = Literal["cosine", "inner_product"]


class InfluenceOptions(TypedDict, total=False):
    """Keywords of `find_influences` and `stream_influences`; each may be left out.

    Attributes:
        k: how many proponents, and how many opponents, in each ranking. Left out: 10.
        num_proponents: how many proponents instead, perhaps 0. None: k.
        num_opponents: how many opponents instead. None: k.
        resolve: whether steps are the query's ("query_step", as when it is left out), the training example's, or the
            same of both.
        steps: the steps to rank. None: all.
        where: a filter over the examples, such as 'source == "web" and length < 200'. Empty: all.
        exact: whether every stored code is read, as when it is left out; or the index's FAISS files are searched, with
            the result's `recall`.
        trajectories: whether the result has the `trajectories` of all examples in it.
        require_full_coverage: whether an answer of fewer than all shards of the index, which a result's `coverage`
            tells, is refused with an UnavailableError instead.
        index: may be left out when the server serves exactly one.
    """

    k: int
    num_proponents: int | None
    num_opponents: int | None
    resolve: Resolve
    steps: Sequence[int] | None
    where: str
    exact: bool
    trajectories: bool
    require_full_coverage: bool
    index: str
