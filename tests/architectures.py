"""Tiny models of many architectures, with weights that give distributions with peaks, for the tests of both passes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from grpo_gsm8k.trainer.architecture import attention_implementation

VOCAB = 60
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DENSE = {**SIZES, **HEADS, **IDS}
WIDE = {**DENSE, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 3.0,
    "original_max_position_embeddings": 32,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", DENSE),
    "qwen2-dropout": ("Qwen2Config", {**DENSE, "attention_dropout": 0.3}),
    "qwen2-window": (
        "Qwen2Config",
        {**DENSE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", WIDE),
    "llama": ("LlamaConfig", DENSE),
    "llama-dynamic": (
        "LlamaConfig",
        {**DENSE, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral": ("MistralConfig", {**WIDE, "sliding_window": None}),
    "mistral-window": ("MistralConfig", {**WIDE, "sliding_window": 5}),
    "gemma": ("GemmaConfig", WIDE),
    "gemma2": (
        "Gemma2Config",
        {**WIDE, "sliding_window": 5, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5},
    ),
    "gemma3": ("Gemma3TextConfig", {**WIDE, "sliding_window": 5, "final_logit_softcapping": 3.0}),
    "cohere": ("CohereConfig", {**DENSE, "logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", {**DENSE, "logit_scale": 0.25, "sliding_window": 5}),
    "granite": (
        "GraniteConfig",
        {
            **DENSE,
            "logits_scaling": 6.0,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.35,
            "attention_dropout": 0.1,
        },
    ),
    "gpt2": ("GPT2Config", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, **IDS}),
    "gpt-neo": (
        "GPTNeoConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "max_position_embeddings": 96,
            "resid_dropout": 0.1,
            **IDS,
        },
    ),
    "gpt-neox": ("GPTNeoXConfig", {**DENSE, "hidden_dropout": 0.1}),
    "gpt-j": (
        "GPTJConfig",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "rotary_dim": 4, **IDS},
    ),
    "gpt-bigcode": (
        "GPTBigCodeConfig",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, **IDS},
    ),
    "phi": ("PhiConfig", {**DENSE, "resid_pdrop": 0.1}),
    "phi3": ("Phi3Config", {**DENSE, "resid_pdrop": 0.1}),
    "phi3-longrope": ("Phi3Config", {**DENSE, "original_max_position_embeddings": 32, "rope_parameters": LONGROPE}),
    "stablelm": ("StableLmConfig", DENSE),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 96,
            "word_embed_proj_dim": 16,
            "layerdrop": 0.5,
            "dropout": 0.2,
            **IDS,
        },
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1, **IDS},
    ),
    "mpt": ("MptConfig", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 96, **IDS}),
    "falcon": (
        "FalconConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS},
    ),
    "falcon-alibi": (
        "FalconConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "alibi": True,
            "new_decoder_architecture": False,
            "hidden_dropout": 0.1,
            **IDS,
        },
    ),
    "codegen": (
        "CodeGenConfig",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "rotary_dim": 4, **IDS},
    ),
    "starcoder2": ("Starcoder2Config", {**DENSE, "residual_dropout": 0.1, "sliding_window": None}),
    "olmo": ("OlmoConfig", DENSE),
    "olmo2": ("Olmo2Config", DENSE),
    "olmo3": ("Olmo3Config", {**DENSE, "sliding_window": 5}),
    "smollm3": ("SmolLM3Config", DENSE),
    "glm4": ("Glm4Config", WIDE),
    "ernie": ("Ernie4_5Config", WIDE),
    "exaone4": ("Exaone4Config", {**DENSE, "sliding_window": 5, "sliding_window_pattern": 2}),
    "nanochat": ("NanoChatConfig", {**DENSE, "final_logit_softcapping": 3.0}),
    "seed-oss": ("SeedOssConfig", {**WIDE, "residual_dropout": 0.1}),
    "hunyuan": ("HunYuanDenseV1Config", WIDE),
    "helium": ("HeliumConfig", WIDE),
    "arcee": ("ArceeConfig", DENSE),
    "apertus": ("ApertusConfig", DENSE),
    "nemotron": ("NemotronConfig", WIDE),
    "hyperclovax": ("HyperCLOVAXConfig", {**WIDE, "logits_scaling": 0.5}),
    "minicpm3": ("MiniCPM3Config", {**DENSE, **MLA, "num_key_value_heads": 4, "dim_model_base": 8}),
    "biogpt": ("BioGptConfig", {**DENSE, "layerdrop": 0.5}),
    "modernbert-decoder": (
        "ModernBertDecoderConfig",
        {**DENSE, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**DENSE, **EXPERTS, "shared_expert_intermediate_size": 24, "output_router_logits": True},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**WIDE, **EXPERTS}),
    "mixtral": ("MixtralConfig", {**DENSE, "num_local_experts": 4, "router_jitter_noise": 0.3}),
    "olmoe": ("OlmoeConfig", {**DENSE, "num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": (
        "PhimoeConfig",
        {**DENSE, "num_local_experts": 4, "input_jitter_noise": 0.1, "router_jitter_noise": 0.1},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            **WIDE,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "granite-moe": (
        "GraniteMoeConfig",
        {**DENSE, "num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 3.0},
    ),
    "deepseek-v2": (
        "DeepseekV2Config",
        {
            **DENSE,
            **MLA,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "head_dim": 8,
        },
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **DENSE,
            **MLA,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            **WIDE,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 6,
            "no_rope_layers": [1, 0],
        },
    ),
    "dbrx": (
        "DbrxConfig",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 96,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
            **IDS,
        },
    ),
    "mamba": ("MambaConfig", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, **IDS}),
    "mamba2": (
        "Mamba2Config",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            **IDS,
        },
    ),
    "falcon-mamba": (
        "FalconMambaConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, **IDS},
    ),
    "recurrent-gemma": (
        "RecurrentGemmaConfig",
        {**DENSE, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 32, "logits_soft_cap": 3.0},
    ),
    "lfm2": (
        "Lfm2Config",
        {
            **DENSE,
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention"] * 2,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "qwen3-next": ("Qwen3NextConfig", {**WIDE, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 24}),
    "granite-swa": ("GraniteSWAConfig", {**DENSE, "sliding_window": 5, "logits_scaling": 2.0}),
    "vaultgemma": (
        "VaultGemmaConfig",
        {**WIDE, "sliding_window": 5, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5},
    ),
    "inkling": (
        "InklingTextConfig",
        {
            **WIDE,
            "swa_head_dim": 8,
            "sliding_window_size": 5,
            "rel_extent": 16,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            **WIDE,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 5,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            **WIDE,
            "sliding_window": 5,
            "final_logit_softcapping": 3.0,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "glm4-moe": (
        "Glm4MoeConfig",
        {
            **WIDE,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
    ),
    "ernie-moe": (
        "Ernie4_5_MoeConfig",
        {**WIDE, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    ),
    "lfm2-moe": (
        "Lfm2MoeConfig",
        {**DENSE, **EXPERTS, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "qwen3.5": ("Qwen3_5TextConfig", {**WIDE, **LINEAR}),
    "falcon-h1": (
        "FalconH1Config",
        {**DENSE, **MAMBA2, "mamba_d_ssm": 64, "lm_head_multiplier": 0.4, "embedding_multiplier": 2.0},
    ),
    "granite-moe-hybrid": (
        "GraniteMoeHybridConfig",
        {
            **DENSE,
            **MAMBA2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
            "layer_types": ["mamba", "attention"],
            "logits_scaling": 3.0,
        },
    ),
    "bamba": ("BambaConfig", {**DENSE, **MAMBA2, "attn_layer_indices": [1]}),
    "jamba": (
        "JambaConfig",
        {
            **DENSE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "zamba": (
        "ZambaConfig",
        {
            **DENSE,
            "num_key_value_heads": 4,
            "num_hidden_layers": 6,
            "attn_layer_period": 3,
            "attn_layer_offset": 2,
            "mamba_d_state": 8,
            "n_mamba_heads": 2,
        },
    ),
    "zamba2": (
        "Zamba2Config",
        {
            **DENSE,
            "num_key_value_heads": 4,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "num_mem_blocks": 1,
            "hybrid_layer_ids": [1],
            "adapter_rank": 4,
        },
    ),
    "nemotron-h": (
        "NemotronHConfig",
        {
            **DENSE,
            "head_dim": 8,
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
        },
    ),
    "minimax": (
        "MiniMaxConfig",
        {
            **WIDE,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 8,
        },
    ),
    "rwkv": (
        "RwkvConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 96, **IDS},
    ),
}


def config_of(name: str) -> Any:
    """A fresh config of one of `CONFIGS`."""
    kind, fields = CONFIGS[name]
    return getattr(transformers, kind)(**copy.deepcopy(fields))


SCALES = {"zamba": 0.8, "qwen3-next": 1.0}  # of the weights; here float32 loses more digits than elsewhere


def make(name: str, seed: int = 0) -> Any:
    """A model in evaluation mode, its attention computed in full."""
    config = config_of(name)
    kwargs = {}
    if implementation := attention_implementation(config):
        kwargs["attn_implementation"] = implementation
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **kwargs)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5 * SCALES.get(name, 1.2))
    return model.eval()
