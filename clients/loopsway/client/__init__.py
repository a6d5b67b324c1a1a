"""The Python client of a Loopsway server: `Client` blocks, `AsyncClient` awaits, and both give the same answers.

Needs grpcio, protobuf and numpy alone: none of torch, faiss and zarr.
"""

from __future__ import annotations

from loopsway.wire import DenseGradient, FactoredGradient, GradientPiece, QueryGradients, RowGradient

from .async_client import AsyncClient
from .client import Client
from .credentials import Tls
from .errors import (
    AuthenticationError,
    DeadlineError,
    FailedPreconditionError,
    InvalidQueryError,
    LoopswayError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    ServerError,
    UnavailableError,
)
from .options import InfluenceOptions
from .queries import ExampleQuery, IdQuery, Query, SketchQuery
from .results import (
    CheckpointInfo,
    ExampleNeighbors,
    IndexInfo,
    Influencer,
    InfluenceResult,
    InfluencerTrajectories,
    Neighbor,
    QuerySummary,
    Ranking,
    RefusedGeneration,
    ScoreChunk,
    Trajectories,
)

__all__ = [
    "AsyncClient",
    "AuthenticationError",
    "CheckpointInfo",
    "Client",
    "DeadlineError",
    "DenseGradient",
    "ExampleNeighbors",
    "ExampleQuery",
    "FactoredGradient",
    "FailedPreconditionError",
    "GradientPiece",
    "IdQuery",
    "IndexInfo",
    "InfluenceOptions",
    "InfluenceResult",
    "Influencer",
    "InfluencerTrajectories",
    "InvalidQueryError",
    "LoopswayError",
    "Neighbor",
    "NotFoundError",
    "OverloadedError",
    "PermissionDeniedError",
    "Query",
    "QueryGradients",
    "QuerySummary",
    "Ranking",
    "RefusedGeneration",
    "RowGradient",
    "ScoreChunk",
    "ServerError",
    "SketchQuery",
    "Tls",
    "Trajectories",
    "UnavailableError",
]
