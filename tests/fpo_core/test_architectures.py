"""Each architecture: its places against recomputed tensors, and the pass against plain forwards."""

from contextlib import ExitStack

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fpo_core.data.batches import PairIds, collate
from fpo_core.errors import FPOError
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.architectures import ARCHITECTURES, architecture_of
from fpo_core.models.attention import attention_by_parts
from fpo_core.models.forward import forward_pairs, scored_activations
from fpo_core.models.hooks import activations_at
from fpo_core.models.load import load_model
from fpo_core.models.shape import model_frame
from tests.tiny import make_tokenizer

VOCABULARY, HIDDEN, LAYERS, WINDOW = 100, 32, 3, 6
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 2,
    "eos_token_id": 1,
}  # fmt: skip
GEMMA = {"sliding_window": WINDOW, "query_pre_attn_scalar": 8}
VISION = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
          "intermediate_size": 8, "patch_size": 14}  # fmt: skip

# By name: model type and settings. Windows are shorter than the pairs.
MODELS = {
    "gemma": ("gemma", SHAPE),
    "gemma2": ("gemma2", {**SHAPE, **GEMMA, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {**SHAPE, **GEMMA, "sliding_window_pattern": 2}),
    "gemma3-multimodal": (
        "gemma3",
        {"text_config": {**SHAPE, **GEMMA, "sliding_window_pattern": 2}, "vision_config": VISION,
         "mm_tokens_per_image": 4, "image_token_index": 99, "boi_token_index": 98,
         "eoi_token_index": 97},
    ),
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4,
                      "n_positions": 64, "initializer_range": 0.3}),
    "gpt-neox": ("gpt_neox", SHAPE),
    "gpt-neox-sequential": ("gpt_neox", {**SHAPE, "use_parallel_residual": False}),
    "gpt-oss": (
        "gpt_oss",
        {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "llama": ("llama", SHAPE),
    "mistral": ("mistral", {**SHAPE, "sliding_window": WINDOW}),
    "mistral-no-window": ("mistral", {**SHAPE, "sliding_window": None}),
    "mixtral": ("mixtral", {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("olmo2", SHAPE),
    "olmo3": ("olmo3", {**SHAPE, "sliding_window": WINDOW}),
    "phi3": ("phi3", {**SHAPE, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", SHAPE),
    "qwen2-window": ("qwen2", {**SHAPE, "use_sliding_window": True, "sliding_window": WINDOW,
                               "max_window_layers": 1}),
    "qwen3": ("qwen3", SHAPE),
    "qwen3-moe": (
        "qwen3_moe",
        {**SHAPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "smollm3": ("smollm3", {**SHAPE, "no_rope_layers": [1, 0, 1]}),
}  # fmt: skip
NO_SDPA = ("gemma2", "gpt-oss")

PAIRS = [
    PairIds("a", [2, 5, 9, 13, 40, 41, 42], [7, 8, 21, 30, 31, 1], [30, 1]),
    PairIds("b", [2, 3], [11, 1], [12, 44, 45, 46, 47, 48, 49, 50, 1]),
]
IDS = torch.tensor([[2, 5, 9, 13, 40, 41, 42, 7, 8, 21, 30], [2, *range(10, 20)]])


def make(name: str, attention: str = "eager"):
    """A random model of the architecture; its norms' weights are random too."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for key, weight in model.named_parameters():
        if ("norm" in key or ".ln_" in key) and key.endswith("weight"):
            torch.nn.init.normal_(weight, mean=1.0, std=0.3)
    return model


def streams_before_the_mlp(model, run):
    """Return each block's residual stream without what its MLP adds, from other modules' inputs."""
    decoder = model.get_decoder()
    blocks = decoder.h if hasattr(decoder, "h") else decoder.layers
    parallel = getattr(decoder.config, "use_parallel_residual", decoder.config.model_type == "phi")
    seen: dict[int, torch.Tensor] = {}
    with ExitStack() as hooks:

        def on_input(module, layer):
            def keep(_module, inputs):
                seen[layer] = inputs[0]

            hooks.callback(module.register_forward_pre_hook(keep).remove)

        def add_output(module, layer):
            def add(_module, _inputs, output):
                seen[layer] = seen[layer] + output[0]

            hooks.callback(module.register_forward_hook(add).remove)

        for layer, block in enumerate(blocks):
            if parallel:  # attention and MLP both read the block's input
                on_input(block, layer)
                add_output(getattr(block, "attention", None) or block.self_attn, layer)
            elif decoder.config.model_type.startswith("olmo"):  # the MLP reads the stream itself
                on_input(block.mlp, layer)
            else:
                names = ("pre_feedforward_layernorm", "ln_2", "post_attention_layernorm")
                on_input(next(getattr(block, n) for n in names if hasattr(block, n)), layer)
        run()
    return seen


def test_every_architecture_of_the_table_is_tested():
    kinds = {make(name).get_decoder().config.model_type for name in MODELS}
    assert kinds == set(ARCHITECTURES)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_places_are_the_tensors_that_transformers_adds_up(name):
    model = make(name)
    states = []

    def run():
        states.extend(model(input_ids=IDS, output_hidden_states=True).hidden_states)

    before_mlp = streams_before_the_mlp(model, run)
    for layer in range(LAYERS):
        resid_post = activations_at(model, Hookpoint(layer), IDS)
        mlp_out = activations_at(model, Hookpoint(layer, "mlp_out"), IDS)
        if layer < LAYERS - 1:
            torch.testing.assert_close(resid_post, states[layer + 1])
        torch.testing.assert_close(before_mlp[layer] + mlp_out, resid_post)
        assert mlp_out.norm() > 0.01 * resid_post.norm()
    final = activations_at(model, Hookpoint(LAYERS - 1, "final_norm"), IDS)
    torch.testing.assert_close(final, states[LAYERS])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "eager") for name in MODELS]
    # transformers has no SDPA for soft-capped logits and attention sinks
    + [(name, kind) for name in MODELS if name not in NO_SDPA for kind in ("sdpa", "by parts")],
)
def test_the_pass_over_pairs_is_the_plain_forward_of_each_response(name, attention):
    by_parts = attention == "by parts"
    model = make(name, attention_by_parts("sdpa", "cpu") if by_parts else attention)
    places = [Hookpoint(1, "mlp_out"), Hookpoint(LAYERS - 1)]
    batch = collate(PAIRS, pad_id=0)
    found = forward_pairs(model, batch, places)
    early = scored_activations(model, batch, places)
    for row, pair in enumerate(PAIRS):
        for side, response in enumerate((pair.chosen, pair.rejected)):
            number, ids = 2 * row + side, torch.tensor([[*pair.prompt, *response]])
            scored = slice(len(pair.prompt) - 1, ids.shape[1] - 1)
            logps = torch.log_softmax(model(input_ids=ids).logits[0, scored].double(), -1)
            want = logps.gather(1, torch.tensor(response)[:, None]).sum()
            torch.testing.assert_close(found.logps[number], want, rtol=1e-5, atol=1e-4)
            for index, place in enumerate(places):
                plain = activations_at(model, place, ids)[0, scored]
                rows = batch.response == number
                torch.testing.assert_close(
                    found.activations[index][rows], plain, rtol=1e-4, atol=1e-4
                )
                assert torch.equal(early[index], found.activations[index])


def test_mlp_out_of_a_checkpointed_block_keeps_values_and_gradients():
    """Its module is inside the block that activation checkpointing computes a second time."""
    results = []
    for checkpointing in (False, True):
        model = make("gemma2").train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        out = forward_pairs(model, collate(PAIRS), [Hookpoint(1, "mlp_out")])
        (out.logps.sum() + out.activations[0].square().sum()).backward()
        gradient = model.model.layers[0].mlp.up_proj.weight.grad
        results.append((out.logps.detach(), out.activations[0].detach(), gradient))
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(after, before)


def test_an_unknown_architecture_is_named_with_those_that_are_known():
    config = AutoConfig.for_model("cohere", **SHAPE)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        FPOError, match=r"'cohere' is not supported.* Supported: gemma, .*, smollm3\. Cho"
    ):
        activations_at(model, Hookpoint(0), IDS)


@pytest.mark.parametrize("name", MODELS)
def test_sdpa_is_refused_where_transformers_has_none(name, tmp_path):
    model = make(name)
    assert architecture_of(model).sdpa == type(model)._supports_sdpa
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    frame = model_frame(str(tmp_path))
    assert frame == (model.get_decoder().config.model_type, HIDDEN, LAYERS)
    if name in NO_SDPA:
        with pytest.raises(FPOError, match=r"Set model\.attention to eager"):
            load_model(tmp_path, dtype="float32", attention="sdpa")
    else:
        load_model(tmp_path, dtype="float32", attention="sdpa")


@pytest.mark.parametrize("name", ["gpt2", "gemma3-multimodal"])
def test_a_layer_beyond_the_model_is_named(name):
    with pytest.raises(FPOError, match=r"there is no layer 3, the model has layers 0 to 2"):
        activations_at(make(name), Hookpoint(LAYERS, "mlp_out"), IDS)
