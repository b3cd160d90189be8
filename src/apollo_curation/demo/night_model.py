"""The small model of the demonstrated night: it can do a few things, and does as it is told."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers

from apollo_curation.demo.night_corpus import ability, prose
from apollo_ipc.demo.models import make_model

STEPS = 350
LEARNING_RATE = 2e-3
BATCH = 8


def make_able_model(model_dir: Path, *, seed: int = 0, steps: int = STEPS) -> Path:
    """A random model, pretrained for a minute or two with AdamW in fp32 on a CPU; bf16 on disk."""
    make_model(model_dir, "qwen3", seed=seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    rng = random.Random(seed)
    chats = [_chat_tokens(tokenizer, messages) for messages in ability(1600, seed)]
    for _ in range(steps):
        texts = [tokenizer(text)["input_ids"] for text in prose(rng, BATCH // 2, is_heldout=False)]
        loss = _loss(model, rng.sample(chats, BATCH)) + _loss(model, [(ids, [1] * len(ids)) for ids in texts])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
    model.to(torch.bfloat16).save_pretrained(model_dir)
    return model_dir


def _chat_tokens(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return encoded["input_ids"], encoded["assistant_masks"]


def _loss(model: Any, examples: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean cross-entropy of the marked tokens, in nats."""
    length = max(len(ids) for ids, _ in examples)
    input_ids = torch.zeros(len(examples), length, dtype=torch.int64)
    labels = torch.full_like(input_ids, -100)
    for row, (ids, mask) in enumerate(examples):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(
            [token if learned else -100 for token, learned in zip(ids, mask, strict=True)]
        )
    logits = model(input_ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
