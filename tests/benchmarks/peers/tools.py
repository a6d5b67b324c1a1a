"""Each tool's whole per-example gradients, or their inner products, as its documentation says to get them.

N examples. A tool's projection is turned off, so that right can be told from wrong; its kinds are the sets of
parameters that it claims to take, the largest first.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # dattri compiles its projections: minutes here, and nothing else

import torch
from models import Subject, losses
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, TensorDataset

ALL, BIASES, WEIGHTS = "all", "weights, biases", "weights"


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One row of the table.

    Attributes:
        name: with the option that matters.
        kinds: of parameters, see Subject.parameters.
        gram: (subject, model, tokens, kind) to inner products [N, N] of whole gradients.
        steps: (subject, model, tokens, kind) to the gradients at each step [N, S, P], in the order of its own
            parameters; None if the tool has no steps.
    """

    name: str
    kinds: tuple[str, ...]
    gram: Callable[[Subject, nn.Module, Tensor, str], Tensor]
    steps: Callable[[Subject, nn.Module, Tensor, str], Tensor] | None = None


class Logits(nn.Module):
    """A model whose output is a tensor: what Captum takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


class MeanLoss(Logits):
    """A model that computes the mean of its losses: what dattri takes for its queries."""

    def forward(self, tokens: Tensor) -> Any:
        return SimpleNamespace(loss=losses(self.model, tokens).mean())


def _inner(gradients: Tensor) -> Tensor:
    flat = gradients.detach().double().flatten(1)
    return flat @ flat.T


def ours_steps(subject: Subject, model: nn.Module, tokens: Tensor, kind: str) -> Tensor:
    from loopsway.indexer import Loop, SketchConfig, StepSketcher

    del kind
    sketcher = StepSketcher(model, Loop(body=list(subject.body)), SketchConfig(width=None))
    return sketcher.sketch(losses, tokens)


def ours(subject: Subject, model: nn.Module, tokens: Tensor, kind: str) -> Tensor:
    return _inner(ours_steps(subject, model, tokens, kind).sum(1))


def reference_steps(subject: Subject, model: nn.Module, tokens: Tensor, kind: str) -> Tensor:
    """step-decomposed-influence, its exact estimator."""
    from sdi import FullGradientTracInSDI

    targets = subject.body if kind == ALL else subject.linear_modules(model)
    estimator = FullGradientTracInSDI(model=model, target_modules=[model.get_submodule(name) for name in targets])
    features = estimator.featurize_loader(loader=[tokens], loss_fn=losses)
    return torch.cat([values.flatten(2) for values in features.phi.values()], dim=2)


def reference(subject: Subject, model: nn.Module, tokens: Tensor, kind: str) -> Tensor:
    return _inner(reference_steps(subject, model, tokens, kind).sum(1))


def bergson(subject: Subject, model: Any, tokens: Tensor, kind: str) -> Tensor:
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset as Table

    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # as bergson's own loading does
    targets = {name.removeprefix(f"{model.base_model_prefix}.") for name in subject.linear_modules(model)}
    table = Table.from_dict({"input_ids": tokens.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        config = IndexConfig(run_path=str(Path(folder, "run")))
        config.partial_run_path.mkdir()
        processor = GradientProcessor(projection_dim=None, include_bias=kind == BIASES)
        collector = InMemoryCollector(
            model=model.base_model, data=table, cfg=config, processor=processor, target_modules=targets
        )
        batches = [list(range(len(tokens)))]
        CollectorComputer(model, table, collector=collector, batches=batches, cfg=config).run_with_collector_hooks()
    return _inner(torch.cat([values.flatten(1) for values in collector.gradients.values()], dim=1))


def dattri_logra(subject: Subject, model: nn.Module, tokens: Tensor, kind: str) -> Tensor:
    """LoGra is this attributor with random matrices in place of the identity."""
    from dattri.algorithm.block_projected_if.block_projected_if import BlockProjectedIFAttributor
    from dattri.task import AttributionTask

    del kind
    wrapped = MeanLoss(model)  # its test gradients are those of a batch's mean loss
    task = AttributionTask(
        loss_func=lambda model, batch, device: model(**batch).loss, model=wrapped, checkpoints=wrapped.state_dict()
    )
    identity = {"device": "cpu", "proj_dim": -1, "proj_max_batch_size": 64, "proj_type": "identity"}
    with tempfile.TemporaryDirectory() as folder:
        attributor = BlockProjectedIFAttributor(
            task, [f"model.{name}" for name in subject.linear_modules(model)], hessian="Identity", offload="none",
            cache_dir=folder, sparsifier_kwargs=dict(identity), projector_kwargs=dict(identity),
        )  # fmt: skip
        loader = DataLoader(_Named(tokens), batch_size=len(tokens))
        attributor.cache(loader)
        return attributor.attribute(loader, loader)


def dattri_tracin(subject: Subject, model: nn.Module, tokens: Tensor, kind: str) -> Tensor:
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    def loss(parameters: Any, data: tuple[Tensor, ...]) -> Tensor:
        return losses(lambda batch: functional_call(model, parameters, batch), data[0][None]).sum()

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = TracInAttributor(
        task, torch.ones(1), normalized_grad=False, layer_name=subject.parameters(model, kind),
        projector_kwargs={"proj_type": "identity", "device": "cpu"},
    )  # fmt: skip
    loader = DataLoader(TensorDataset(tokens), batch_size=len(tokens))
    return attributor.attribute(loader, loader)


def kronfluence(shared: bool, post_processed: bool) -> Callable[[Subject, nn.Module, Tensor, str], Tensor]:
    """Kronfluence with the identity for a Hessian.

    Args:
        shared: its option for parameters that are used more than once.
        post_processed: take per-example gradients through its hook for changing them, which here changes nothing.
    """

    def gram(subject: Subject, model: nn.Module, tokens: Tensor, kind: str) -> Tensor:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task

        del kind

        class Summed(Task):
            enable_post_process_per_sample_gradient = post_processed

            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                del sample
                return losses(model, batch[0]).sum()

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return losses(model, batch[0]).sum()

            def get_influence_tracked_modules(self) -> list[str]:
                return modules

        modules = subject.linear_modules(model)
        data, task = TensorDataset(tokens), Summed()
        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer(
                "gram", prepare_model(model, task), task, cpu=True, output_dir=folder, disable_tqdm=True
            )
            options = FactorArguments(strategy="identity", has_shared_parameters=shared)
            analyzer.fit_all_factors("identity", data, factor_args=options)
            count = len(tokens)
            analyzer.compute_pairwise_scores("gram", "identity", data, data, count, count)
            return analyzer.load_pairwise_scores("gram")["all_modules"]

    return gram


def logix(subject: Subject, model: nn.Module, tokens: Tensor, kind: str) -> Tensor:
    from logix import LogIX

    del kind
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "logix.yaml")
        settings.write_text(f"root_dir: {folder}\n")
        run = LogIX("gram", config=str(settings))
        run.watch(model, name_filter=subject.linear_modules(model))
        run.setup({"grad": ["log"]})
        with run(data_id=[str(row) for row in range(len(tokens))]):
            losses(model, tokens).sum().backward()
        log = run.get_log()
        return run.compute_influence(log, log, precondition=False)["influence"]


def trak(subject: Subject, model: nn.Module, tokens: Tensor, kind: str) -> Tensor:
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import NoOpProjector

    class Loss(AbstractModelOutput):
        def __init__(self) -> None:
            super().__init__()

        @staticmethod
        def get_output(model: nn.Module, weights: Any, buffers: Any, example: Tensor) -> Tensor:
            return losses(lambda batch: functional_call(model, (weights, buffers), batch), example[None]).sum()

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Sequence[Tensor]) -> Tensor:
            return torch.ones(len(batch[0]), 1)

    with tempfile.TemporaryDirectory() as folder:
        run = TRAKer(
            model=model, task=Loss(), train_set_size=len(tokens), save_dir=folder, device="cpu",
            projector=NoOpProjector(device="cpu"), use_half_precision=False, logging_level=50,
            grad_wrt=subject.parameters(model, kind),
        )  # fmt: skip
        run.load_checkpoint(model.state_dict(), model_id=0)
        run.featurize((tokens,), num_samples=len(tokens))
        gradients = torch.from_numpy(run.saver.current_store["grads"].copy())
        return _inner(gradients * run.normalize_factor)


def captum(vectorised: bool) -> Callable[[Subject, nn.Module, Tensor, str], Tensor]:
    """Captum's TracInCP.

    Args:
        vectorised: all examples of a batch at once, for Linear and Conv2d; else one backward for each example.
    """

    def gram(subject: Subject, model: nn.Module, tokens: Tensor, kind: str) -> Tensor:
        from captum.influence import TracInCP

        class Loss(nn.Module):
            reduction = "sum" if vectorised else "none"

            def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
                each = losses(lambda _: SimpleNamespace(logits=logits), labels)
                return each.sum() if vectorised else each

        layers = subject.body if kind == ALL else subject.linear_modules(model)
        run = TracInCP(
            Logits(model), TensorDataset(tokens, tokens), ["only"], checkpoints_load_func=lambda *_: 1.0,
            layers=[f"model.{name}" for name in layers], loss_fn=Loss(), batch_size=len(tokens),
            sample_wise_grads_per_batch=vectorised,
        )  # fmt: skip
        return run.influence((tokens, tokens)).detach()

    return gram


class _Named(Dataset):
    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[index]}


TOOLS = (
    Tool(name="loopsway", kinds=(ALL,), gram=ours, steps=ours_steps),
    Tool(name="step-decomposed-influence", kinds=(ALL, BIASES), gram=reference, steps=reference_steps),
    Tool(name="bergson", kinds=(BIASES, WEIGHTS), gram=bergson),
    Tool(name="dattri, LoGra", kinds=(BIASES,), gram=dattri_logra),
    Tool(name="dattri, TracIn", kinds=(ALL,), gram=dattri_tracin),
    Tool(name="Kronfluence", kinds=(BIASES,), gram=kronfluence(shared=False, post_processed=False)),
    Tool(
        name="Kronfluence, has_shared_parameters", kinds=(BIASES,), gram=kronfluence(shared=True, post_processed=False)
    ),
    Tool(
        name="Kronfluence, the same, post-processed",
        kinds=(BIASES,),
        gram=kronfluence(shared=True, post_processed=True),
    ),
    Tool(name="LogIX", kinds=(WEIGHTS,), gram=logix),
    Tool(name="TRAK", kinds=(ALL,), gram=trak),
    Tool(name="Captum TracInCP", kinds=(ALL,), gram=captum(vectorised=False)),
    Tool(name="Captum TracInCP, vectorised", kinds=(BIASES,), gram=captum(vectorised=True)),
)
