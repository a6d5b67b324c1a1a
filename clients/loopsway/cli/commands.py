"""The group that holds the commands."""

from __future__ import annotations

import click

from .bench import bench
from .build import build
from .change import add, compact, delete, prune
from .demo import demo
from .energy import energy
from .evaluate import evaluate
from .explore import explore
from .export import export
from .health import health
from .inspection import inspect
from .neighbors import neighbors
from .query import query
from .reload import reload
from .reproduce import reproduce
from .score import score
from .serve import serve
from .token import token
from .train import train
from .verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="loopsway", message="%(package)s %(version)s")
def loopsway() -> None:
    """Which training examples shaped a looped transformer's answer, and at which pass through its loop.

    Start with `loopsway demo`, or in this order: train, build, inspect, serve, query.
    """


for command in (
    *(train, build, add, delete, compact, prune, inspect, verify, export),
    *(score, neighbors, energy),
    *(serve, health, reload, token, query, bench, explore, demo, reproduce, evaluate),
):
    loopsway.add_command(command)
