"""One question to a server and all that it answers: the rankings, and the trajectories of the examples in them.

Knows the client, and nothing of how an answer is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from .curves import Curve, Curves

if TYPE_CHECKING:
    from loopsway.client import Client, Influencer, InfluenceResult, Query, Ranking

Resolve = Literal["query_step", "train_step", "same_step"]

AXES: dict[Resolve, str] = {
    "query_step": "step of the query's loop",
    "train_step": "step of the training example's loop",
    "same_step": "step of both loops",
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server said about one query.

    Attributes:
        question: the query, as people read it.
        result: with the trajectories of its examples; those ranked over the whole loop come first, proponents before
            opponents.
    """

    question: str
    resolve: Resolve
    result: InfluenceResult

    def curves(self, most: int) -> Curves:
        """The trajectories of up to `most` proponents and as many opponents."""
        total = self.result.total
        drawn: list[Curve] = []
        if self.result.trajectories is not None:
            influences, errors = self.result.trajectories.influences, self.result.trajectories.standard_errors  # [n, S]
            rows = [*range(len(total.proponents))[:most]]
            rows += [len(total.proponents) + row for row in range(len(total.opponents))[:most]]
            ranked = (*total.proponents, *total.opponents)
            drawn = [
                Curve(
                    label=name(ranked[row]),
                    total=ranked[row].influence,
                    influences=[float(value) for value in influences[row]],
                    standard_errors=[float(value) for value in errors[row]],
                )
                for row in rows
            ]
        return Curves(
            title=f"Influence of training examples on {self.question}",
            axis=AXES[self.resolve],
            curves=drawn,
            without_gradient=() if self.resolve == "train_step" else self.result.query.steps_without_gradient,
        )

    def to_json(self) -> dict[str, Any]:
        """The whole answer as a JSON document."""
        result = self.result
        document: dict[str, Any] = {
            "index": result.index,
            "generation": result.generation,
            "fingerprint": result.fingerprint,
            "resolve": self.resolve,
            "recall": result.recall,
            "coverage": result.coverage,
            "query": asdict(result.query),
            "total": asdict(result.total),
            "steps": [asdict(ranking) for ranking in result.steps],
            "trajectories": {"example_ids": [], "influences": [], "standard_errors": []},
        }
        if result.trajectories is not None:
            ids = _ids(result.total)
            document["trajectories"] = {
                "example_ids": ids,
                "influences": result.trajectories.influences[: len(ids)].tolist(),
                "standard_errors": result.trajectories.standard_errors[: len(ids)].tolist(),
            }
        return document


def ask(
    client: Client,
    query: Query,
    question: str,
    *,
    k: int,
    num_proponents: int | None = None,
    num_opponents: int | None = None,
    resolve: Resolve,
    steps: Sequence[int] | None = None,
    where: str = "",
    exact: bool = True,
    index: str = "",
) -> Answer:
    """Asks for the rankings and their trajectories at once; arguments as for `Client.find_influences`."""
    (result,) = client.find_influences(
        [query],
        k=k,
        num_proponents=num_proponents,
        num_opponents=num_opponents,
        resolve=resolve,
        steps=steps,
        where=where,
        exact=exact,
        trajectories=True,
        index=index,
    )
    return Answer(question=question, resolve=resolve, result=result)


def name(influencer: Influencer) -> str:
    """What people call an example: its description, else its id."""
    return influencer.description or influencer.example_id


def _ids(total: Ranking) -> list[str]:
    return [influencer.example_id for influencer in (*total.proponents, *total.opponents)]
