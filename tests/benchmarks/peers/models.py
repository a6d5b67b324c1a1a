"""Small random models from transformers' own code, and the gradients that every tool is held against.

N examples, S steps, P parameters. The loss of an example is next-token cross-entropy, summed over its tokens: the
one that all the tools can be given (bergson has no other). ALBERT is no causal model, but its gradients are as good a
test.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM, DoryConfig, DoryForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

VOCABULARY = 64
NUM_EXAMPLES, NUM_TOKENS = 6, 12
LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and what in it is attributed.

    Attributes:
        name: for the table.
        make: the model, with the same random weights each time.
        body: names of the modules that are applied again and again; the first is entered once in each step.
        num_steps: S, times that the body is applied in a forward.
    """

    name: str
    make: Callable[[], nn.Module]
    body: tuple[str, ...]
    num_steps: int

    def __str__(self) -> str:
        return f"{self.name}, {self.num_steps} step" + ("s" if self.num_steps > 1 else "")

    def linear_modules(self, model: nn.Module) -> list[str]:
        """Names of the body's nn.Linear and Conv1D."""
        return [name for name, module in model.named_modules() if isinstance(module, LINEAR) and self._in_body(name)]

    def parameters(self, model: nn.Module, kind: str) -> list[str]:
        """Names of the body's parameters.

        Args:
            model: from `make`.
            kind: "weights" or "weights, biases" (of the body's linear layers) or "all".
        """
        names = [name for name, _ in model.named_parameters() if self._in_body(name)]
        if kind == "all":
            return names
        ends = ("weight", "bias") if kind == "weights, biases" else ("weight",)
        wanted = {f"{module}.{end}" for module in self.linear_modules(model) for end in ends}
        return [name for name in names if name in wanted]

    def _in_body(self, name: str) -> bool:
        return any(name == part or name.startswith(part + ".") for part in self.body)


def losses(model: Callable[[Tensor], Any], tokens: Tensor) -> Tensor:
    """Each example's own loss, [N]."""
    logits = model(tokens).logits[:, :-1].transpose(1, 2)
    return F.cross_entropy(logits, tokens[:, 1:], reduction="none").sum(1)


def examples(count: int = NUM_EXAMPLES, seed: int = 1) -> Tensor:
    """Random tokens, [N, T] int64."""
    return torch.randint(0, VOCABULARY, (count, NUM_TOKENS), generator=torch.Generator().manual_seed(seed))


def exact_step_gradients(subject: Subject, model: nn.Module, tokens: Tensor, names: Sequence[str]) -> Tensor:
    """[N, S, P] float64: autograd, one example at a time, with fresh copies of the parameters at each step."""
    model = copy.deepcopy(model).double()
    owners = [(model.get_submodule(owner), leaf) for owner, _, leaf in (name.rpartition(".") for name in names)]
    values = [getattr(owner, leaf).detach() for owner, leaf in owners]
    for owner, leaf in owners:
        del owner._parameters[leaf]  # so that a plain tensor can stand in its place
    copies: list[list[Tensor]] = []

    def begin_step(*_: object) -> None:
        copies.append([value.clone().requires_grad_() for value in values])
        for (owner, leaf), fresh in zip(owners, copies[-1], strict=True):
            setattr(owner, leaf, fresh)

    model.get_submodule(subject.body[0]).register_forward_pre_hook(begin_step)
    rows = []
    for example in tokens:
        copies.clear()
        loss = losses(model, example[None]).sum()
        assert len(copies) == subject.num_steps
        gradients = torch.autograd.grad(loss, [fresh for step in copies for fresh in step])
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        rows.append(flat.unflatten(0, (subject.num_steps, -1)))
    return torch.stack(rows)


def albert() -> nn.Module:
    config = AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=16, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=NUM_TOKENS,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return _seeded(AlbertForMaskedLM, config)


def dory() -> nn.Module:
    config = DoryConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, n_input_layers=1, n_output_layers=1, n_recurrent_loops=3,
        max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return _seeded(DoryForCausalLM, config)


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=NUM_TOKENS, use_cache=False,
        bos_token_id=None, eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return _seeded(GPT2LMHeadModel, config)


def gpt2_of_linear() -> nn.Module:
    return with_linear(gpt2())


def with_linear(model: nn.Module) -> nn.Module:
    """The same model with nn.Linear in place of Conv1D, as Kronfluence's own GPT-2 example does it."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv1D):
                linear = nn.Linear(child.nx, child.nf)
                linear.weight.data.copy_(child.weight.data.T)
                linear.bias.data.copy_(child.bias.data)
                setattr(module, name, linear)
    return model


def _seeded(model_class: Callable[..., nn.Module], config: Any) -> nn.Module:
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        for parameter in model.parameters():  # so that biases and scales that start equal differ
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


LAYERS = ("transformer.h.0", "transformer.h.1")
SUBJECTS = (
    Subject(name="AlbertForMaskedLM", make=albert, body=("albert.encoder.albert_layer_groups.0",), num_steps=4),
    Subject(name="DoryForCausalLM", make=dory, body=("model.layers.1", "model.layers.2"), num_steps=3),
    Subject(name="GPT2LMHeadModel", make=gpt2, body=LAYERS, num_steps=1),
    Subject(name="the same of nn.Linear", make=gpt2_of_linear, body=LAYERS, num_steps=1),
)
