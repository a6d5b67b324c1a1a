"""The client works where none of the heavy packages can be imported."""

from __future__ import annotations

import subprocess
import sys

WITHOUT_HEAVY_PACKAGES = """
import asyncio, sys
from importlib.abc import MetaPathFinder

BARRED = ("torch", "faiss", "zarr", "pyarrow", "safetensors", "grpc_status", "google.rpc",
          "loopsway.indexer", "loopsway.service", "loopsway.tasks")

class Bar(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == barred or name.startswith(barred + ".") for barred in BARRED):
            raise AssertionError(f"the client imported {name}")

sys.meta_path.insert(0, Bar())
import numpy as np
from loopsway.client import AsyncClient, Client, ExampleQuery, IdQuery, SketchQuery, UnavailableError

queries = [ExampleQuery({"bits": "0101"}), IdQuery("a"), SketchQuery(np.ones((2, 64)), "cafe")]

async def use():
    async with AsyncClient("127.0.0.1:1", timeout_s=5) as client:
        try:
            await client.get_trajectories(queries, ["a"])
        except UnavailableError as error:
            print(error)

with Client("127.0.0.1:1", timeout_s=5) as client:
    try:
        client.find_influences(queries)
    except ConnectionError as error:
        print(error)
asyncio.run(use())
"""


def test_the_client_is_used_without_torch_faiss_and_zarr() -> None:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_HEAVY_PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    blocking, awaited = done.stdout.splitlines()
    for said in (blocking, awaited):
        assert said.startswith("no Loopsway server answers at 127.0.0.1:1: start one (`loopsway serve")
