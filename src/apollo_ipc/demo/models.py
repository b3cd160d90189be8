"""Small random models of real architectures, with a real byte-level tokenizer and a chat template.

Nothing is downloaded: configuration, weights and tokenizer are made in code and saved with `save_pretrained`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 320  # 256 bytes, three marks, and room up to a multiple of 64

# ChatML. The generation marks tell `apply_chat_template` which tokens the assistant produced; its end-of-turn
# mark is one of them, since the model must learn to stop.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<tool_call>' + call['function']['name'] + ' ' + call['function']['arguments'] | tojson }}"
    "{{ '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": 258,
    "bos_token_id": 256,
    "pad_token_id": 256,
    "torch_dtype": "bfloat16",
}

_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
}
_EXPERTS = {  # of a mixture of experts; each class has a name of its own for their number
    "num_hidden_layers": 3,
    "moe_intermediate_size": 128,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}

# architecture -> (configuration class in transformers, what differs from _COMMON)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5": (
        "Qwen3_5TextConfig",
        {
            **_DELTA_NET,
            "head_dim": 64,
            "num_hidden_layers": 4,  # three gated delta net layers, then one of full attention
            "tie_word_embeddings": False,
        },
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 64, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": False}),
    "llama": (
        "LlamaConfig",
        {
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "mistral": ("MistralConfig", {"head_dim": 64, "sliding_window": None, "tie_word_embeddings": False}),
    "gemma": ("GemmaConfig", {"head_dim": 64}),
    "gemma2": ("Gemma2Config", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 1024}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 1024}),
    "phi3": ("Phi3Config", {"tie_word_embeddings": False}),
    "granite": (
        "GraniteConfig",
        {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    ),
    "olmo2": ("Olmo2Config", {"tie_word_embeddings": False}),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 2048, "n_inner": 512},
    ),
    "gpt_neox": ("GPTNeoXConfig", {"tie_word_embeddings": False}),
    "stablelm": ("StableLmConfig", {"tie_word_embeddings": False, "use_qkv_bias": True}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "glm4": ("Glm4Config", {"head_dim": 64, "tie_word_embeddings": False}),
    "smollm3": ("SmolLM3Config", {"tie_word_embeddings": True}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "opt": (
        "OPTConfig",
        {"ffn_dim": 512, "word_embed_proj_dim": 256, "num_key_value_heads": None},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_EXPERTS, "head_dim": 64, "num_experts": 8, "mlp_only_layers": [1], "norm_topk_prob": True},
    ),
    "qwen3.5_moe": (
        "Qwen3_5MoeTextConfig",
        {
            **_EXPERTS,
            **_DELTA_NET,
            "head_dim": 64,
            "num_experts": 8,
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 128,
        },
    ),
    "mixtral": ("MixtralConfig", {**_EXPERTS, "num_local_experts": 4, "sliding_window": None}),
    "gpt_oss": (
        "GptOssConfig",
        {**_EXPERTS, "head_dim": 64, "num_local_experts": 4, "intermediate_size": 128, "sliding_window": 128},
    ),
    "olmoe": ("OlmoeConfig", {**_EXPERTS, "num_experts": 8, "intermediate_size": 128}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            **_EXPERTS,
            "head_dim": 64,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "granite_moe": (
        "GraniteMoeConfig",
        {**_EXPERTS, "num_local_experts": 8, "intermediate_size": 128, "logits_scaling": 4.0},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_EXPERTS,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 96,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
        },
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; ids 256 to 258 are the marks. Decoding any ids gives back their text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT, TURN_START, TURN_END])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=END_OF_TEXT, model_max_length=2048
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_config(arch: str, **changes: Any) -> transformers.PreTrainedConfig:
    """The configuration of `arch`, a key of ARCHITECTURES, with `changes`. Raises KeyError."""
    class_name, own = ARCHITECTURES[arch]
    values = {**_COMMON, **own, **changes}
    return getattr(transformers, class_name)(**{k: v for k, v in values.items() if v is not None})


def make_model(
    directory: Path,
    arch: str = "qwen3.5",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> Path:
    """Writes a random model of `arch` with tokenizer to `directory`; the same one for the same `seed`."""
    config = make_config(arch, **changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    # Norms and biases are born as ones and zeros; real checkpoints are not so tidy, and a view that is off by
    # one tensor must not go unseen.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not name.endswith(("A_log", "dt_bias")):
                parameter.add_(torch.randn_like(parameter) * 0.02)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory
