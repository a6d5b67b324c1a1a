"""Models from their own code in `transformers`, tiny and random: the same oracle, no special case for any of them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looped import PADDING, collate, make_examples, make_model
from loopsway.indexer import Loop, SketchConfig, StepSketcher
from untied import sketch_of, untied_gradients

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
    pytest.skip("needs transformers 5.24, which has all of these looped models", allow_module_level=True)

EXACT, SKETCHED = SketchConfig(width=None), SketchConfig(width=512)
TOLERANCE = 1e-5

SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
    "pad_token_id": PADDING,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
LAYERS = ["model.layers.*"]

# Class, sizes of its own, loop body and number of steps.
LOOPED: dict[str, tuple[str, dict[str, Any], list[str], int]] = {
    "ALBERT": (
        "AlbertForMaskedLM",
        {"embedding_size": 6, "num_hidden_layers": 4, "inner_group_num": 2},
        ["albert.encoder.albert_layer_groups.0"],
        4,
    ),
    "ALBERT of two groups": (
        "AlbertForMaskedLM",
        {"embedding_size": 6, "num_hidden_layers": 4, "num_hidden_groups": 2},
        ["albert.encoder.albert_layer_groups.*"],
        2,  # what the second group does belongs to the last step of the first, which is the marker
    ),
    "Dory": (
        "DoryForCausalLM",
        {"num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1, "n_recurrent_loops": 3},
        ["model.layers.1", "model.layers.2"],
        3,
    ),
    "HRM": (
        "HrmTextForCausalLM",
        {"num_hidden_layers": 1, "H_cycles": 2, "L_cycles": 2, "L_bp_cycles": [2, 2]},
        ["model.L_module", "model.H_module"],
        4,
    ),
    "HRM, truncated": (
        "HrmTextForCausalLM",
        {"num_hidden_layers": 1, "H_cycles": 2, "L_cycles": 2},
        ["model.L_module", "model.H_module"],
        4,
    ),
    "Inkling 2 Loop": (
        "Inkling2LoopForCausalLM",
        {
            **EXPERTS,
            "unpadded_vocab_size": 11,
            "num_hidden_layers": 4,
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 1,
            "swa_head_dim": 4,
            "sliding_window_size": 4,
            "d_rel": 3,
            "rel_extent": 8,
            "n_routed_experts": 4,
            "n_layers_per_attn_res_block": 1,
            "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid", "hybrid"],
            "loop_layer_index_start": 1,
            "loop_layer_index_end": 3,
            "loop_num_passes": 3,
            "loop_gate_rank": 3,
        },
        ["model.layers.1", "model.layers.2", "model.message_input"],
        3,
    ),
}
ORDINARY: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "GPT-2": ("GPT2LMHeadModel", {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}, ["transformer.h.*"]),
    "Llama": ("LlamaForCausalLM", {}, LAYERS),
    "Gemma 3": ("Gemma3ForCausalLM", {"sliding_window": 4, "num_hidden_layers": 3}, LAYERS),
    "Qwen 3": ("Qwen3ForCausalLM", {}, LAYERS),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {}, ["gpt_neox.layers.*"]),
    "T5": (
        "T5ForConditionalGeneration",
        {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
        ["encoder.block.*", "decoder.block.*"],
    ),
    "Mamba": ("MambaForCausalLM", {"state_size": 4, "time_step_rank": 2}, ["backbone.layers.*"]),
    "LFM 2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}, LAYERS),
    "Qwen 3 Next": (
        "Qwen3NextForCausalLM",
        {
            **EXPERTS,
            "num_experts": 3,
            "shared_expert_intermediate_size": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
        },
        LAYERS,
    ),
    "GPT-OSS": ("GptOssForCausalLM", {**EXPERTS, "num_local_experts": 3, "sliding_window": 4}, LAYERS),
    "Zamba 2": (
        "Zamba2ForCausalLM",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "attention_head_dim": 8,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 4,
            "mamba_headdim": 4,
            "n_mamba_heads": 4,
            "num_mem_blocks": 1,
            "adapter_rank": 2,
            "use_shared_attention_adapter": True,
            "chunk_size": 4,
        },
        LAYERS,
    ),
    "DeepSeek 3": (
        "DeepseekV3ForCausalLM",
        {
            **EXPERTS,
            "num_key_value_heads": 2,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 4,
            "q_lora_rank": 4,
            "qk_rope_head_dim": 2,
            "qk_nope_head_dim": 2,
            "v_head_dim": 4,
        },
        LAYERS,
    ),
}
MIXTURES = {
    "Mixtral": ("MixtralForCausalLM", {"num_experts_per_tok": 2, "num_local_experts": 3}),
    "Qwen 3 MoE": ("Qwen3MoeForCausalLM", {**EXPERTS, "num_experts": 3}),
}


def tiny(name: str, sizes: dict[str, Any], *, experts: str | None = None) -> Any:
    """A random model in eval mode; sizes that its configuration does not know are left out."""
    kind = getattr(transformers, name)
    known = kind.config_class.__dataclass_fields__
    config = kind.config_class(**{key: value for key, value in (SIZES | sizes).items() if key in known or key in sizes})
    model = make_model(lambda: kind(config))
    if experts is not None and "num_experts_per_tok" in sizes:
        model.set_experts_implementation(experts)
    return model


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Each example's mean loss over its own tokens: of the next one, or for a masked model of the same."""
    tokens, arguments = batch["tokens"], {}
    if model.config.is_encoder_decoder:  # pyright: ignore[reportAttributeAccessIssue]
        arguments["decoder_input_ids"] = tokens
    logits = model(tokens, attention_mask=(tokens != PADDING).long(), use_cache=False, **arguments).logits
    shift = 0 if type(model).__name__.endswith("MaskedLM") else 1
    targets, logits = tokens[:, shift:], logits[:, : logits.shape[1] - shift]
    each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * (targets != PADDING)
    return each.sum(1) / (targets != PADDING).sum(1)


def check(model: nn.Module, loop: Loop, num_steps: int, *, reference: nn.Module | None = None) -> None:
    """Two batches through one sketcher, exact and sketched; the reference, if another, has the same weights."""
    sketcher, coarse = StepSketcher(model, loop, EXACT), StepSketcher(model, loop, SKETCHED)
    for seed, count in enumerate((5, 1)):
        batch = collate(make_examples(count, seed))
        batch.pop("labels")
        want, names = untied_gradients(reference or model, loop, losses, batch)
        got = sketcher.sketch(losses, batch)
        assert list(sketcher.parameters) == names
        assert got.shape == want.shape
        assert got.shape[1] == num_steps
        error = float((got - want).norm() / want.norm())
        assert error <= TOLERANCE, f"batch {seed} of {count}: relative error {error:.2g}"
        want = sketch_of(want, sketcher.parameters, SKETCHED)
        error = float((coarse.sketch(losses, batch) - want).norm() / want.norm())
        assert error <= TOLERANCE, f"batch {seed} of {count}: the sketch's relative error {error:.2g}"


@pytest.mark.parametrize(("name", "outside"), [*((name, False) for name in LOOPED), ("ALBERT", True), ("Dory", True)])
def test_looped_models_have_the_step_gradients_of_untied_parameters(name: str, outside: bool) -> None:
    kind, sizes, body, steps = LOOPED[name]
    loop = Loop(body=body, outside=outside)
    check(tiny(kind, sizes), loop, steps + 2 * outside, reference=tiny(kind, sizes, experts="eager"))


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_models_are_loops_of_one_step(name: str) -> None:
    kind, sizes, body = ORDINARY[name]
    check(tiny(kind, sizes), Loop(body=body), 1, reference=tiny(kind, sizes, experts="eager"))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_right_however_they_are_multiplied(name: str, implementation: str) -> None:
    kind, sizes = MIXTURES[name]
    model, reference = (tiny(kind, sizes, experts=each) for each in (implementation, "eager"))
    check(model, Loop(body=LAYERS), 1, reference=reference)  # grouped_mm has no float64


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Dory", "HRM, truncated", "Inkling 2 Loop"])  # ALBERT's code has no checkpointing
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    kind, sizes, body, _ = LOOPED[name]
    model, batch = tiny(kind, sizes), collate(make_examples(4))
    want = StepSketcher(model, Loop(body=body), EXACT).sketch(losses, batch)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()  # the library checkpoints in training alone; there is no dropout in these
    got = StepSketcher(model, Loop(body=body), EXACT).sketch(losses, batch)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", ["ALBERT", "Dory"])
def test_only_the_adapters_of_peft_are_attributed(name: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    kind, sizes, body, steps = LOOPED[name]
    targets = {"ALBERT": ["query", "ffn"], "Dory": ["q_proj", "down_proj"]}[name]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(tiny(kind, sizes), config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data *= 0.3  # random ones of full size make float32 itself wrong by more than the tolerance
    loop = Loop(body=[f"base_model.model.{part}" for part in body])
    assert all("lora_" in key for key in StepSketcher(adapted, loop, EXACT).parameters)
    check(adapted, loop, steps)


def test_conv1d_of_the_library_is_attributed() -> None:
    from transformers.pytorch_utils import Conv1D

    class Looped(nn.Module):
        config = transformers.PretrainedConfig()

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body = nn.Embedding(11, 8), nn.Sequential(Conv1D(12, 8), nn.GELU(), Conv1D(8, 12))

        def forward(self, tokens: Tensor, **_options: Any) -> Any:
            state = self.embed(tokens)
            for _ in range(3):
                state = state + self.body(state)
            return transformers.modeling_outputs.CausalLMOutput(logits=F.linear(state, self.embed.weight))

    model = make_model(Looped)
    check(model, Loop(body=["body"]), 3)
    check(model, replace(Loop(body=["body"]), outside=True), 5)
