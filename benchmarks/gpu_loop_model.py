"""The models of gpu_loop.py: public shapes, random weights, written to disk in bounded memory.

Not vLLM's `dummy` loader: `--load-format apollo` delegates to vLLM's `auto`, the map from checkpoint tensors
to vLLM's storage is derived from the shards' names, the worker compares what it has mapped with them bit for
bit, and a sync writes them anew. So there are shards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from apollo_ipc.demo.models import CHAT_TEMPLATE, END_OF_TEXT, TURN_END, TURN_START, make_config

SHAPES_27B = Path(__file__).parents[1] / "tests" / "assets" / "qwen3.5-27b" / "config.json"
SHARD_BYTES = 4 * 10**9
STD = 0.02
NOISE_ELEMENTS = 33_554_393  # a prime: no two rows of a matrix begin at the same place of it
PIECE_BYTES = 2**24

# Qwen/Qwen3-0.6B and Qwen/Qwen3-8B, config.json.
_QWEN3 = {
    "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "eos_token_id": 258, "bos_token_id": None,
}  # fmt: skip
_QWEN3_SIZES = {
    "0.6b": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "tie_word_embeddings": False,
    },
}  # fmt: skip
# A vision tower as small as the class allows, of which nothing is served: see `needs_vision_part`.
_VISION = {
    "depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "num_position_embeddings": 64,
}  # fmt: skip


def text_config(arch: str, preset: str) -> transformers.PreTrainedConfig:
    """arch, preset: a pair of gpu_loop.PRESETS."""
    if preset == "tiny":
        config = make_config(arch)
    elif arch == "qwen3":
        config = transformers.Qwen3Config(**_QWEN3, **_QWEN3_SIZES[preset], dtype="bfloat16")
    else:
        config = transformers.AutoConfig.from_pretrained(SHAPES_27B)
    config.architectures = ["Qwen3ForCausalLM" if arch == "qwen3" else "Qwen3_5ForCausalLM"]
    return config


def with_vision_part(config: transformers.PreTrainedConfig) -> transformers.PreTrainedConfig:
    """A whole Qwen3_5ForConditionalGeneration around the text model: vLLM 0.26 loads no other Qwen3.5."""
    vision = {**_VISION, "out_hidden_size": config.hidden_size}
    whole = transformers.Qwen3_5Config(text_config=config.to_dict(), vision_config=vision, dtype="bfloat16")
    whole.tie_word_embeddings = config.tie_word_embeddings
    whole.architectures = ["Qwen3_5ForConditionalGeneration"]
    return whole


class RandomModel:
    """`config.json` and a tokenizer at once, the weights by `write`.

    A matrix is normal with a standard deviation of 0.02; a vector is what the architecture initialises it to
    plus as much noise.
    """

    def __init__(self, directory: Path, arch: str, preset: str, *, has_vision_part: bool = False):
        self.directory = directory
        config = text_config(arch, preset)
        self.vocab_size: int = config.vocab_size
        if has_vision_part:
            config = with_vision_part(config)
        self._classes = AutoModelForImageTextToText if has_vision_part else AutoModelForCausalLM
        with torch.device("meta"):
            model = self._classes.from_config(config, dtype=torch.bfloat16)
        tied = set(model.all_tied_weights_keys)
        self.shapes = {name: t for name, t in model.state_dict().items() if name not in tied}
        self._tiny_config = make_config(arch)
        if has_vision_part:
            self._tiny_config = with_vision_part(self._tiny_config)
        directory.mkdir(parents=True, exist_ok=True)
        self._recipe = directory / "gpu_loop.json"
        self.is_written = self._recipe.exists() and self._recipe.read_text() == self._described(config)
        if not self.is_written:
            config.save_pretrained(directory)
            make_tokenizer(self.vocab_size).save_pretrained(directory)
        self._description = self._described(config)

    def _described(self, config: transformers.PreTrainedConfig) -> str:
        shapes = {name: [str(t.dtype), list(t.shape)] for name, t in self.shapes.items()}
        return json.dumps({"architectures": config.architectures, "tensors": shapes})

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in self.shapes.values())

    @property
    def num_parameters(self) -> int:
        return sum(t.numel() for t in self.shapes.values())

    def write(self, say: Callable[[str], None]) -> None:
        """The shards. One block of noise, read from another place for each tensor, is all that is held."""
        torch.manual_seed(0)
        noise = (torch.randn(NOISE_ELEMENTS) * STD).bfloat16()
        centers, weight_map, start = self._centers(), {}, 0
        shards = list(_parts(self.shapes, SHARD_BYTES))
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            with (self.directory / file).open("wb") as out:
                out.write(_header({name: self.shapes[name] for name in names}))
                for name in names:
                    for piece in self._values(name, noise, start, centers):
                        out.write(piece)
                    start = (start + 7_919 * 1_009) % NOISE_ELEMENTS
            weight_map |= dict.fromkeys(names, file)
            say(f"shard {number} of {len(shards)}")
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(index))
        self._recipe.write_text(self._description)
        self.is_written = True

    def _values(
        self, name: str, noise: Tensor, start: int, centers: dict[str, Tensor]
    ) -> Iterator[memoryview]:
        """The tensor's bytes in pieces."""
        tensor = self.shapes[name]
        if (center := centers.get(_kind(name))) is not None and tensor.dim() == 1:
            places = (start + torch.arange(tensor.numel())) % NOISE_ELEMENTS
            values = (center.item() + noise[places].float()).to(tensor.dtype)
            yield values.view(torch.uint8).numpy().data
            return
        assert tensor.dtype == torch.bfloat16, f"{name}: {tensor.dtype}"
        source, left = noise.view(torch.uint8).numpy().data, tensor.nbytes
        at = 2 * start
        while left:
            piece = source[at : at + min(left, PIECE_BYTES)]
            yield piece
            left -= len(piece)
            at = (at + len(piece)) % len(source)

    def _centers(self) -> dict[str, Tensor]:
        """What each kind of vector is initialised to on average, by a small model of the architecture."""
        model = self._classes.from_config(self._tiny_config, dtype=torch.bfloat16)
        return {_kind(name): t.float().mean() for name, t in model.state_dict().items() if t.dim() == 1}


def _kind(name: str) -> str:
    """The name without its layer's number."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _parts(shapes: dict[str, Tensor], limit_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in shapes.items():
        if names and size + tensor.nbytes > limit_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _header(shapes: dict[str, Tensor]) -> bytes:
    """safetensors: 8 bytes of length (little-endian), then JSON, padded so that the data is aligned to 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in shapes.items():
        dtype = {torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype]
        entries[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at := at + tensor.nbytes],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """apollo_ipc.demo's tokenizer with a name for every id, since a random model produces them all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, END_OF_TEXT, TURN_START, TURN_END]
    tokens += [f"w{number}" for number in range(len(tokens), vocab_size)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT, TURN_START, TURN_END])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=END_OF_TEXT)
    fast.chat_template = CHAT_TEMPLATE
    return fast
