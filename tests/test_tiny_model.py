"""What the demo and the server tests rely on: small models, the same each time, that depend on all of the prompt."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvsdk.demo import models

ANSWER = 24


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def _greedy(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """`ANSWER` greedy tokens for each of `prompts`, which have one length and are computed side by side."""
    tokens = torch.tensor(prompts)
    answer = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=ANSWER, do_sample=False, pad_token_id=0
    )
    return answer[:, tokens.shape[1] :].tolist()


def _prompt(length: int, vocab: int = 1024) -> list[int]:
    return torch.randint(4, vocab, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> PreTrainedModel:
    return _load(tiny_llama)


@pytest.mark.parametrize("make", [models.make_tiny_llama, models.make_tiny_deepseek_v2])
def test_the_same_arguments_give_the_same_bytes(make, tmp_path):
    assert _digests(make(tmp_path / "a")) == _digests(make(tmp_path / "b"))


def test_another_seed_gives_other_weights_and_the_same_tokenizer(tmp_path):
    first = _digests(models.make_tiny_llama(tmp_path / "a", seed=0))
    second = _digests(models.make_tiny_llama(tmp_path / "b", seed=1))
    assert {name for name in first if first[name] != second[name]} == {"model.safetensors"}


def test_sizes_and_dtype_are_those_asked_for(tmp_path):
    model = _load(models.make_tiny_llama(tmp_path, dtype="bfloat16", layers=2, vocab=600))
    assert (model.dtype, model.config.num_hidden_layers, model.config.vocab_size) == (torch.bfloat16, 2, 600)


def test_a_vocabulary_too_small_for_the_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab=300"):
        models.make_tiny_llama(tmp_path, vocab=300)


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_deepseek_v2"])
def test_an_answer_is_the_same_each_time_and_says_more_than_one_thing(fixture, request):
    model = _load(request.getfixturevalue(fixture))
    [first], [again] = (_greedy(model, [_prompt(150)]) for _ in range(2))
    assert first == again
    assert len(set(first)) > ANSWER // 2


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_deepseek_v2"])
def test_changing_one_early_token_changes_the_answer(fixture, request):
    """Nearly always: a token may weigh too little to make another one the likeliest in any of the next `ANSWER`."""
    model = _load(request.getfixturevalue(fixture))
    prompt = _prompt(200)
    changed = []
    for position in range(0, 64, 4):
        other = list(prompt)
        other[position] = 4 + (other[position] + 1) % 1000
        changed.append(other)
    original, *answers = _greedy(model, [prompt, *changed])
    assert sum(answer == original for answer in answers) <= 2


def test_the_end_token_is_never_the_likeliest(llama):
    prompts = [[token] * 8 for token in range(4, 1024, 8)]
    with torch.inference_mode():
        likeliest = llama(torch.tensor(prompts)).logits.argmax(-1)
    assert llama.config.eos_token_id not in likeliest


def test_every_token_of_the_model_is_one_of_the_tokenizer_and_text_survives(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, local_files_only=True)
    assert len(tokenizer) == json.loads((tiny_llama / "config.json").read_text())["vocab_size"]
    text = "San Francisco is a city; äöü, 东京, \n\ttabs"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("San Francisco is a").input_ids) > 1


def test_the_chat_template_marks_the_turns(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, local_files_only=True)
    turns = [{"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>hello<|assistant|>"
    assert tokenizer(text).input_ids[0] == tokenizer.convert_tokens_to_ids("<|user|>")
