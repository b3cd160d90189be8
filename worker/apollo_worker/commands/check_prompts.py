"""What `apollo-ipc check` asks: text of several kinds, as the served tokenizer cuts it, and random ids."""

from __future__ import annotations

import httpx
import torch

from apollo_ipc.process.serving import VllmServer

PROMPT_TOKENS = 64
TIMEOUT_S = 60.0
NUM_RANDOM = 6
# English prose, question and answer, code, German, JSON, French: each longer than a prompt in any vocabulary.
TEXTS = (
    "The harbour was quiet when the ferry came in. Two men tied the ropes, a dog barked at the gulls, "
    "and the woman from the ticket office counted her coins once more before she locked the door and "
    "walked home along the wall. Nobody had asked her where the money of the last summer had gone, and "
    "she did not intend to tell them tonight, either. The lamp above the stairs went out.",
    "Question: How does a refrigerator keep food cold? Answer: A liquid with a low boiling point "
    "evaporates inside thin tubes and takes heat from the air around them. A compressor presses the "
    "vapour together, it becomes hot, gives its heat to the room behind the machine, turns into a "
    "liquid again, and the circle begins anew, many times an hour, until the thermostat is content.",
    'def mean(values):\n    """The arithmetic mean; 0.0 for an empty list."""\n    total = 0.0\n    for '
    "value in values:\n        total += value\n    return total / len(values) if values else 0.0\n\n\n"
    'if __name__ == "__main__":\n    print(mean([1, 2, 3.5]), mean([]))\n    for name in ("left", '
    '"right", "centre"):\n        print(f"{name:>8}", mean([len(name), 7]))\n',
    "Am Morgen lag Nebel über dem Fluss, und die Brücke war nur zur Hälfte zu sehen. Der Bäcker öffnete "
    "als Erster seinen Laden; später kamen die Kinder, die auf dem Weg zur Schule noch schnell ein "
    "Brötchen kauften, und am Ende der Straße hielt der Bus, der wie jeden Tag sieben Minuten zu spät "
    "war.",
    '{"order": 4711, "items": [{"name": "lamp", "price": 39.5, "count": 2}, {"name": "cable", "price": '
    '4.25, "count": 10}], "total": 121.5, "paid": false, "address": {"street": "12 Mill Lane", "city": '
    '"York"}, "notes": ["ring twice", "leave it at the back door"], "created": "2024-03-09T17:45:00Z"}',
    "Le marché commence à sept heures. On y trouve des pommes, du fromage, des fleurs et parfois un "
    "vieux livre que personne ne voulait plus. En 1987 le prix du pain était de 3,20 francs; "
    "aujourd'hui on paie 1,15 euro. Mon grand-père disait toujours que le bon moment pour acheter du "
    "poisson est avant midi.",
)


def text_prompts(server: VllmServer) -> torch.Tensor:
    """(B, S) int64, cut to one length; no rows where vLLM serves without a tokenizer."""
    rows = []
    for text in TEXTS:
        body = {"model": server.model_name, "prompt": text}
        answer = httpx.post(f"{server.url}/tokenize", json=body, timeout=TIMEOUT_S)
        if answer.status_code == 200:
            rows.append(answer.json()["tokens"][:PROMPT_TOKENS])
    whole = [row for row in rows if len(row) == PROMPT_TOKENS]
    return torch.tensor(whole, dtype=torch.int64).reshape(-1, PROMPT_TOKENS)


def random_prompts(vocab_size: int, seed: int) -> torch.Tensor:
    """(NUM_RANDOM, S) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (NUM_RANDOM, PROMPT_TOKENS), generator=generator)
