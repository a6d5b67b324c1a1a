"""The Python client of a Loopsway server: `Client` blocks, `AsyncClient` awaits, and both give the same answers.

Needs grpcio, protobuf and numpy alone: none of torch, faiss and zarr.
"""

from __future__ import annotations

from loopsway.wire import DenseGradient, FactoredGradient, GradientPiece, QueryGradients, RowGradient

from .client import AsyncClient, Client
from .errors import (
    DeadlineError,
    FailedPreconditionError,
    InvalidQueryError,
    LoopswayError,
    NotFoundError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from .queries import ExampleQuery, IdQuery, Query, SketchQuery
from .results import (
    CheckpointInfo,
    IndexInfo,
    Influencer,
    InfluenceResult,
    Neighbor,
    QuerySummary,
    Ranking,
    ScoreChunk,
    Trajectories,
)

__all__ = [
    "AsyncClient",
    "CheckpointInfo",
    "Client",
    "DeadlineError",
    "DenseGradient",
    "ExampleQuery",
    "FactoredGradient",
    "FailedPreconditionError",
    "GradientPiece",
    "IdQuery",
    "IndexInfo",
    "InfluenceResult",
    "Influencer",
    "InvalidQueryError",
    "LoopswayError",
    "Neighbor",
    "NotFoundError",
    "OverloadedError",
    "Query",
    "QueryGradients",
    "QuerySummary",
    "Ranking",
    "RowGradient",
    "ScoreChunk",
    "ServerError",
    "SketchQuery",
    "Trajectories",
    "UnavailableError",
]
