"""Small models with random weights, made on the spot, whose greedy answers depend on all of the prompt.

A model that says the same whatever it read proves nothing about a KV cache. At the usual initialisation (a standard
deviation of 0.02) a random Llama does just that: attention averages over everything, the residual stream drowns it, and
one token comes out for ever. What matters is the gain of a matrix, its deviation times the square root of its inputs;
a gain of about 1.4 (a deviation of 0.12 at 128 inputs) keeps attention selective and the answers varied, and the wider
models here are scaled to that same gain.

Each checkpoint is a folder as Hugging Face lays it out: `config.json`, `model.safetensors`, a tokenizer with a chat
template. The same arguments give the same bytes. The end-of-text token's output row is zero, so that token is never the
likeliest and an answer is as long as `max_tokens` says.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

INITIALIZER_RANGE = 0.12
"""Standard deviation of the tiny models' weights, at `TINY_HIDDEN` inputs."""
TINY_HIDDEN = 128

BEGIN, END, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|assistant|>' if m['role'] == 'assistant' else '<|user|>' }}{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SENTENCES = (
    "San Francisco is a city by the bay, and the fog comes over the hills in the evening.",
    "Santa Clara is a city in the valley, where the orchards were and the chips are now.",
    "The prefill server reads the prompt and computes its keys and values, block by block.",
    "The decode server takes them over and answers one token after another.",
)


def make_tiny_llama(
    path: str | Path, *, dtype: str = "float32", layers: int = 4, vocab: int = 1024, seed: int = 0
) -> Path:
    """Write a Llama of about 1M parameters: 4 heads of 32, 2 KV heads, prompts of up to 8192 tokens.

    Args:
        path: the folder to write; made if it is not there.
        dtype: name of the weights' torch dtype.
        layers: number of decoder layers.
        vocab: number of tokens, of the tokenizer and of the model; at least 512.
        seed: of the weights; the tokenizer is the same for every seed.

    Returns:
        `path`.

    Raises:
        ValueError: `vocab` is too small for the bytes and the special tokens.
    """
    sizes = {"hidden_size": TINY_HIDDEN, "intermediate_size": 256, "heads": 4, "kv_heads": 2, "head_dim": 32}
    return _write_llama(Path(path), sizes, dtype=dtype, layers=layers, vocab=vocab, seed=seed, device="cpu")


def make_llama_1b(path: str | Path, device: str = "cpu", *, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """Write a Llama of the shape of Llama-3.2-1B but for its vocabulary: 0.98e9 parameters, 2.0 GB in bfloat16.

    Args:
        path: the folder to write; made if it is not there.
        device: where the weights are drawn; a GPU is quicker. Another device gives other weights for the same seed.
        dtype: name of the weights' torch dtype.
        seed: of the weights.
    """
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "heads": 32, "kv_heads": 8, "head_dim": 64}
    return _write_llama(Path(path), sizes, dtype=dtype, layers=16, vocab=2048, seed=seed, device=device)


def make_tiny_deepseek_v2(
    path: str | Path, *, dtype: str = "float32", layers: int = 3, vocab: int = 1024, seed: int = 0
) -> Path:
    """Write a DeepSeek-V2 with multi-head latent attention and dense layers only.

    A token's cache entry is 512 + 64 wide, because vLLM's CPU kernel for latent attention knows that width alone.
    Serve it in float32 with `--attention-backend CPU_MLA`: on a CPU with AMX, vLLM would choose a backend that
    refuses float32. The arguments are those of `make_tiny_llama`.
    """
    heads, nope, rope, value, rank = 4, 32, 64, 32, 512
    config = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": None,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "intermediate_size": 256,
        # Every layer comes before the first that would have experts.
        "first_k_dense_replace": layers,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "rope_scaling": None,
    }
    attention = {
        "q_proj": (heads * (nope + rope), TINY_HIDDEN),
        "kv_a_proj_with_mqa": (rank + rope, TINY_HIDDEN),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (heads * (nope + value), rank),
        "o_proj": (TINY_HIDDEN, heads * value),
    }
    return _write_checkpoint(
        Path(path), config, attention, TINY_HIDDEN, dtype=dtype, layers=layers, vocab=vocab, seed=seed, device="cpu"
    )


def _write_llama(path: Path, sizes: dict[str, int], **common: Any) -> Path:
    hidden, heads, kv_heads, head_dim = (sizes[k] for k in ("hidden_size", "heads", "kv_heads", "head_dim"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": sizes["intermediate_size"],
        "mlp_bias": False,
    }
    attention = {
        "q_proj": (heads * head_dim, hidden),
        "k_proj": (kv_heads * head_dim, hidden),
        "v_proj": (kv_heads * head_dim, hidden),
        "o_proj": (hidden, heads * head_dim),
    }
    return _write_checkpoint(path, config, attention, hidden, **common)


def _write_checkpoint(
    path: Path,
    config: dict[str, Any],
    attention: dict[str, tuple[int, ...]],
    hidden: int,
    *,
    dtype: str,
    layers: int,
    vocab: int,
    seed: int,
    device: str,
) -> Path:
    """Write config, weights and tokenizer of a decoder with RMS norms and a gated MLP, which is all that varies here.

    `attention` maps the names of a layer's attention parameters to their shapes; those of one dimension are norms.
    """
    tokenizer = _train_tokenizer(vocab)
    path.mkdir(parents=True, exist_ok=True)
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    deviation = INITIALIZER_RANGE * (TINY_HIDDEN / hidden) ** 0.5
    common = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": deviation,
        "bos_token_id": begin,
        "eos_token_id": end,
        "dtype": dtype,
    }
    (path / "config.json").write_text(json.dumps(config | common, indent=1))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": begin, "eos_token_id": end}))

    intermediate = config["intermediate_size"]
    layer = {f"self_attn.{name}": shape for name, shape in attention.items()}
    layer |= {f"mlp.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
    layer |= {"mlp.down_proj": (hidden, intermediate), "input_layernorm": (hidden,)}
    layer |= {"post_attention_layernorm": (hidden,)}
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        weight = torch.ones(shape, device=device)
        if len(shape) > 1:
            weight.normal_(std=deviation, generator=generator)
        weights[f"{name}.weight"] = weight.to(getattr(torch, dtype))
    weights["lm_head.weight"][end] = 0
    save_file({name: weight.cpu() for name, weight in weights.items()}, path / "model.safetensors", {"format": "pt"})

    tokenizer.save(str(path / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "model_max_length": common["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1))
    return path


def _train_tokenizer(vocab: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab` tokens, learnt from `SENTENCES` and from invented words to fill it up."""
    if vocab < 512:
        raise ValueError(f"vocab={vocab} is too small: 256 bytes, 4 special tokens and some merges; use at least 512")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BEGIN, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(vocab), trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(f"vocab={vocab} is too large for the built-in text: it gives {tokenizer.get_vocab_size()}")
    return tokenizer


def _corpus(vocab: int) -> Iterator[str]:
    yield from SENTENCES * 4
    rng = random.Random(0)
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in ("a", "e", "i", "o", "u", "ai", "en", "or")]
    for _ in range(vocab):
        yield " ".join("".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(8))
