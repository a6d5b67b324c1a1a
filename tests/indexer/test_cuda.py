"""On a CUDA device: sketches, the compiled product kernel, and builds are those of the processor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from looped import MODELS, LoopedTask, collate, losses, make_examples, make_model
from loopsway.indexer import ExampleSketcher, SketchConfig, StepSketcher, build_index, open_index
from loopsway.indexer.config import LayerPath
from loopsway.indexer.gradients.forms import OuterProduct
from loopsway.indexer.sketches.sketch import DeviceHash, Sketches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
# Relative, of float32 sketches: sums in another order.
TOLERANCE = 1e-5


def on_cuda(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: values.to(CUDA) for name, values in batch.items()}


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.cpu() - want).norm() / want.norm())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("width", [None, 256, 8192])
@pytest.mark.parametrize("layer_path", ["auto", "product", "fourier"])
def test_sketches_are_those_of_the_processor(kind: type[nn.Module], width: int | None, layer_path: LayerPath) -> None:
    config, batch = SketchConfig(width=width, layer_path=layer_path), collate(make_examples(6))
    model = make_model(kind)
    want = StepSketcher(model, model.loop, config).sketch(losses, batch)
    there = make_model(kind).to(CUDA)
    got = StepSketcher(there, there.loop, config).sketch(losses, on_cuda(batch))
    assert got.device.type == "cuda"
    assert difference(got, want) < TOLERANCE


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("width", [64, 8192])
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(64, 64, 32), (130, 70, 45), (20, 150, 1), (1024, 256, 128)])
def test_the_compiled_kernel_agrees_with_torch_on_the_processor(
    rows: int, columns: int, tokens: int, width: int, scaled: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, tokens, size, generator=generator) for size in (rows, columns))
    scale = 0.1 + torch.rand(rows, columns, generator=generator)
    values = []
    for device in (torch.device("cpu"), CUDA):
        hashes = DeviceHash.of_parameters({"w": (rows, columns)}, width=width, seed=0, checkpoint="a", device=device)
        scales = {"w": scale.to(device)} if scaled else {}
        sketches = Sketches(hashes, 3, 2, width=width, layer_path="product", device=device, scales=scales)
        sketches.add("w", 1, OuterProduct(left.to(device), right.to(device)))
        values.append(sketches.values)
    assert torch.equal(values[1][:, 0].cpu(), torch.zeros(3, width)), "another step was written to"
    assert difference(values[1], values[0]) < TOLERANCE


@pytest.mark.parametrize("layer_path", ["product", "fourier"])
def test_autocast_is_as_close_to_float32_as_on_the_processor(layer_path: LayerPath) -> None:
    def half(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(batch["tokens"].device.type, dtype=torch.bfloat16):
            return losses(model, batch)

    config, batch = SketchConfig(width=8192, layer_path=layer_path), collate(make_examples(6))
    here, there = make_model(MODELS[0]), make_model(MODELS[0]).to(CUDA)
    exact = StepSketcher(here, here.loop, config).sketch(losses, batch)
    got = StepSketcher(there, there.loop, config).sketch(half, on_cuda(batch))
    assert difference(got, exact) < 5e-2


@pytest.mark.parametrize("kind", [model.__name__ for model in MODELS])
@pytest.mark.parametrize("bits", [1, 16])
def test_a_build_has_the_answers_of_a_build_on_the_processor(tmp_path: Path, kind: str, bits: int) -> None:
    task, config = LoopedTask(kind), SketchConfig(width=1024, bits=bits)  # pyright: ignore[reportArgumentType]
    build_index(task, tmp_path / "there.index", config=config, device="cuda", batch_size=16, progress=False)
    build_index(task, tmp_path / "here.index", config=config, batch_size=16, progress=False)
    queries = ExampleSketcher(task, config).sketch(make_examples(3, seed=1)).values
    there = ExampleSketcher(task, config, device="cuda").sketch(make_examples(3, seed=1)).values
    assert difference(torch.as_tensor(np.asarray(there)), torch.as_tensor(np.asarray(queries))) < TOLERANCE
    indices = [
        open_index(tmp_path / "here.index"),
        open_index(tmp_path / "there.index"),
        open_index(tmp_path / "there.index", device="cuda"),
    ]
    ids = indices[0].examples.column("id").to_pylist()
    found = [index.trajectories(np.asarray(queries), ids) for index in indices]
    scale = np.abs(found[0]).max()
    for other in found[1:]:  # a sign bit of a coordinate that is zero to rounding may differ
        assert np.abs(other - found[0]).max() < (0.02 if bits == 1 else 2e-3) * scale


@pytest.mark.parametrize("kind", MODELS[:2])
def test_the_same_batch_gives_the_same_bits(kind: type[nn.Module]) -> None:
    model, batch = make_model(kind).to(CUDA), on_cuda(collate(make_examples(6)))
    sketcher = StepSketcher(model, model.loop, SketchConfig(layer_path="product"))
    first = sketcher.sketch(losses, batch)
    assert torch.equal(sketcher.sketch(losses, batch), sketcher.sketch(losses, batch))
    assert difference(sketcher.sketch(losses, batch), first.cpu()) < TOLERANCE  # the first batch is learned from


FAULT = """
import torch
from loopsway.indexer.memory import is_device_fault, is_out_of_memory
values = torch.zeros(3, device="cuda")
for attempt in range(2):
    try:
        values[torch.full((1,), 7, device="cuda")].cpu()
    except RuntimeError as error:
        print(is_device_fault(error), is_out_of_memory(error), flush=True)
"""


def test_a_failed_assertion_on_the_device_is_a_fault_of_it_and_so_is_every_call_after_it() -> None:
    ended = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout.splitlines() == ["True False"] * 2, ended.stderr
