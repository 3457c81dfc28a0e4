"""What an SAE's ``cfg.json`` in sae-lens' disk format declares, of any of its versions.

Every key is honoured, refused by name, or in a list of those that change nothing about encoding.
"""

import re
from typing import Any, Literal, NamedTuple, get_args

from fpo_core.errors import FPOError
from fpo_core.sae.architectures import ARCHITECTURES

# What is done to each token's activation first; ``normalize.py`` does it.
Normalization = Literal["none", "constant_norm_rescale", "layer_norm"]
NORMALIZATIONS = get_args(Normalization)

_TRANSCODER = "it predicts an MLP's output from its input and is no SAE of one place"
_CHECKPOINT = "it is a training checkpoint; save it with sae-lens' save_inference_model"
_NOT_SUPPORTED = {
    "abstopk": "its features have signs; those that are constrained here fire or do not",
    "matching_pursuit": "it picks features one after the other, so no feature can be had by itself",
    "temporal": "a token's features depend on the tokens before it, other responses' too",
    "transcoder": _TRANSCODER,
    "skip_transcoder": _TRANSCODER,
    "jumprelu_transcoder": _TRANSCODER,
    "jumprelu_skip_transcoder": _TRANSCODER,
    "batchtopk": _CHECKPOINT,
    "matryoshka_batchtopk": _CHECKPOINT,
}
_FACTOR = (
    "its scaling factor is not in the file; fold it in with sae-lens' "
    "fold_activation_norm_scaling_factor(factor) and save the SAE again"
)

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_point_layer": "hook_layer",
    "activation_fn_str": "activation_fn",
}
_HONOURED = """
    activation_fn activation_fn_kwargs apply_b_dec_to_input architecture d_in d_sae
    finetuning_scaling_factor hf_hook_name hf_hook_name_out hook_head_index hook_layer
    hook_layer_out hook_name hook_name_out k metadata model_from_pretrained_kwargs
    normalize_activations prepend_bos rescale_acts_by_decoder_norm reshape_activations
"""
# Where it came from, how it was trained, how to show it. `dtype` is how sae-lens would hold the
# weights: here they are what the file has, in float32.
_IGNORED = """
    act_store_device activations_mixing_fraction adam_beta1 adam_beta2 autocast autocast_lm
    aux_loss_coefficient b_dec_init_method cached_activations_path checkpoint_path compile_llm
    compile_sae context_size d_out dataset_path dataset_trust_remote_code
    dead_feature_estimation_method dead_feature_threshold dead_feature_window
    decoder_heuristic_init decoder_heuristic_init_norm decoder_init_norm decoder_orthogonal_init
    device disable_concat_sequences dtype eval_batch_size_prompts eval_every_n_wandb_logs
    exclude_special_tokens expansion_factor feature_reinit_scale feature_sampling_method
    feature_sampling_window finetuning_method finetuning_tokens from_pretrained_path
    ghost_grad_scaling git_commit hook_eval init_encoder_as_decoder_transpose is_dataset_tokenized
    jumprelu_bandwidth jumprelu_init_threshold jumprelu_sparsity_loss_mode jumprelu_ste_to_input
    jumprelu_tanh_scale l0_coefficient l0_warm_up_steps l1_coefficient l1_warm_up_steps
    llm_compilation_mode llm_device log_activations_store_to_wandb log_optimizer_state_to_wandb
    log_to_wandb log_weights_to_wandb logger lp_norm lr lr_decay_steps lr_end lr_scheduler_name
    lr_warm_up_steps matryoshka_widths model_class_name model_kwargs model_name
    mse_loss_normalization n_batches_for_norm_estimate n_batches_in_buffer n_checkpoints
    n_eval_batches n_restart_cycles name neuronpedia_id noise_scale normalize_sae_decoder
    output_path pre_act_loss_coefficient prefetch_llm_batches resume resume_from_checkpoint
    run_name sae_compilation_mode sae_lens_training_version sae_lens_version save_final_checkpoint
    scale_sparsity_penalty_by_decoder_norm seed seqpos_slice sequence_separator_token
    sparsity_penalty store_batch_size store_batch_size_prompts streaming target_l0
    tokens_per_buffer topk_threshold_lr total_training_samples total_training_tokens
    train_batch_size train_batch_size_samples train_batch_size_tokens training_architecture
    training_architecture_details training_tokens unique_id use_cached_activations
    use_chat_formatting use_ghost_grads use_matryoshka_aux_loss use_sparse_activations verbose
    version wandb_entity wandb_id wandb_log_frequency wandb_project
"""
_LAYER = re.compile(r"\b(?:blocks|layers|h)\.(\d+)\b")
# How TransformerLens was told to load the model. The Hugging Face model's activations at the sites
# here do not depend on these; center_writing_weights is honoured.
_HARMLESS_PROCESSING = {
    "center_unembed", "default_padding_side", "default_prepend_bos", "device_map", "dtype",
    "first_n_layers", "fold_ln", "fold_value_biases", "n_devices",
    "refactor_factored_attn_matrices", "revision", "torch_dtype", "trust_remote_code",
}  # fmt: skip


class SaeConfig(NamedTuple):
    """How an SAE computes and where it says that it reads."""

    architecture: str
    d_in: int
    d_sae: int
    centred: bool
    hook: str = ""
    hf_hook: str = ""
    prepend_bos: bool = False
    k: int | None = None
    rescaled: bool = False  # acts and top-k are of pre-activations times the decoder's norms
    normalization: Normalization = "none"
    removes_mean: bool = False
    input_scale: float = 1.0  # folded into the weights when they are read


def parse_config(
    given: dict[str, Any], name: str, *, input_scale: float | None = None
) -> SaeConfig:
    """Read a ``cfg.json`` of sae-lens, version 6 or before.

    Args:
        given: the file's content.
        name: the SAE's, for messages.
        input_scale: factor on the activations that a file beside it has.

    Raises:
        FPOError: something is declared that is not honoured here, or not known.
    """
    config = {_RENAMED.get(key, key): value for key, value in given.items()}
    unknown = sorted(config.keys() - set(_HONOURED.split()) - set(_IGNORED.split()))
    if unknown:
        raise FPOError(
            f"SAE {name}: what {', '.join(unknown)} of its cfg.json does to its features is not "
            f"known; if it does nothing, remove it from the file"
        )
    # Before version 6, what is metadata now stood beside the rest.
    declared = {**config, **_object(config, "metadata", name)}
    architecture, k = _architecture(config, name)
    _refuse_declared(config, declared, architecture, name)
    _check_places(declared, name)
    return SaeConfig(
        architecture,
        read_count(config, "d_in", name),
        read_count(config, "d_sae", name),
        centred=bool(config.get("apply_b_dec_to_input", True)),
        hook=str(declared.get("hook_name") or ""),
        hf_hook=str(declared.get("hf_hook_name") or ""),
        prepend_bos=bool(declared.get("prepend_bos", _is_before_6(declared))),
        k=k,
        rescaled=bool(config.get("rescale_acts_by_decoder_norm")),
        normalization=_normalization(config, input_scale, name),
        removes_mean=_removes_mean(declared, name),
        input_scale=1.0 if input_scale is None else input_scale,
    )


def _is_before_6(declared: dict[str, Any]) -> bool:
    """Whether a version before 6 wrote the file, whose defaults are others; it named none."""
    major = str(declared.get("sae_lens_version") or 0).partition(".")[0]
    return not (major.isdecimal() and int(major) >= 6)


def _object(config: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise FPOError(f"SAE {name}: {key} of its cfg.json is no object; fetch the file again")
    return dict(value)


def read_count(config: dict[str, Any], key: str, name: str) -> int:
    """Return a setting that has to be a whole number of at least one.

    Args:
        config: the settings.
        key: of the count.
        name: the SAE's, for messages.

    Raises:
        FPOError: it is missing or no count.
    """
    value: Any = config.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 1 <= value < 1 << 53 or value != int(value):
        raise FPOError(f"SAE {name}: {key} of its configuration is {value!r}, expected a count")
    return int(value)


def _architecture(config: dict[str, Any], name: str) -> tuple[str, int | None]:
    """The architecture, and k of a TopK one; before version 6 that was an activation function."""
    architecture = config.get("architecture") or "standard"
    activation = config.get("activation_fn") or "relu"
    options = _object(config, "activation_fn_kwargs", name)
    if activation == "topk":
        architecture, config = "topk", {"k": config.get("k"), **options}
    elif activation != "relu":
        raise FPOError(
            f"SAE {name}: activation_fn={activation!r} is not supported; supported: relu, topk"
        )
    if options.get("signed"):
        raise FPOError(f"SAE {name}: signed=true is not supported: {_NOT_SUPPORTED['abstopk']}")
    if architecture not in ARCHITECTURES:
        why = f" ({_NOT_SUPPORTED[architecture]})" if architecture in _NOT_SUPPORTED else ""
        raise FPOError(
            f"SAE {name}: architecture {architecture!r} is not supported{why}; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    return architecture, read_count(config, "k", name) if architecture == "topk" else None


def _refuse_declared(
    config: dict[str, Any], declared: dict[str, Any], architecture: str, name: str
) -> None:
    if config.get("rescale_acts_by_decoder_norm") and architecture != "topk":
        raise FPOError(
            f"SAE {name}: rescale_acts_by_decoder_norm=true is for topk, its architecture is "
            f"{architecture}; fold the decoder's norms into the weights"
        )
    if config.get("finetuning_scaling_factor"):
        raise FPOError(
            f"SAE {name}: finetuning_scaling_factor=true is not supported; fold the factors into "
            f"the decoder's weights"
        )
    hook = str(declared.get("hook_name") or "")
    reshape = config.get("reshape_activations") or ("hook_z" if hook.endswith("_z") else "none")
    if reshape != "none":
        raise FPOError(
            f"SAE {name}: reshape_activations={reshape!r} is not supported: it reads attention "
            f"heads; choose one of the residual stream or an MLP's output"
        )
    if declared.get("hook_head_index") is not None:
        raise FPOError(
            f"SAE {name}: hook_head_index={declared['hook_head_index']} is not supported: it reads "
            f"one attention head; choose one of the residual stream or an MLP's output"
        )


def _check_places(declared: dict[str, Any], name: str) -> None:
    """Refuse an SAE that reads one place and predicts another, or whose layers disagree."""
    for key in ("hook_name", "hf_hook_name", "hook_layer"):
        place, out = declared.get(key), declared.get(f"{key}_out")
        if out not in (None, "", place):
            raise FPOError(
                f"SAE {name}: it reads {place} and predicts {out} ({key}_out); such a transcoder "
                f"is not supported, choose an SAE"
            )
    layer = declared.get("hook_layer")
    for key in ("hook_name", "hf_hook_name"):
        named = _LAYER.search(str(declared.get(key) or ""))
        if named and layer is not None and str(layer) != named[1]:
            raise FPOError(
                f"SAE {name}: {key}={declared[key]!r} and hook_layer={layer} of its cfg.json "
                f"disagree. Correct the wrong one"
            )


def _normalization(config: dict[str, Any], input_scale: float | None, name: str) -> Normalization:
    kind: Any = config.get("normalize_activations") or "none"
    if kind is True:
        kind = "expected_average_only_in"
    if input_scale is not None:
        if kind == "expected_average_only_in":
            return "none"
        raise FPOError(
            f"SAE {name}: activation_scaler.json has a scaling factor, but cfg.json says "
            f"normalize_activations={kind!r}. Remove the file if the factor is in the weights"
        )
    if kind not in NORMALIZATIONS:
        why = _FACTOR if kind == "expected_average_only_in" else "fold it into the weights"
        raise FPOError(
            f"SAE {name}: normalize_activations={kind!r} is not supported: {why}. Supported: "
            f"{', '.join(NORMALIZATIONS)}"
        )
    return kind


def _removes_mean(declared: dict[str, Any], name: str) -> bool:
    processing = _object(declared, "model_from_pretrained_kwargs", name)
    centred = bool(processing.pop("center_writing_weights", False))
    unknown = sorted(processing.keys() - _HARMLESS_PROCESSING)
    if unknown:
        raise FPOError(
            f"SAE {name}: it was trained on a model that was loaded with {', '.join(unknown)} "
            f"(model_from_pretrained_kwargs), and what that does to the activations is not known; "
            f"if it does nothing, remove it from its cfg.json"
        )
    return centred
