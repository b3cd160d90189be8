"""The random projection of a gradient's smaller dimension, made from names and counters, never saved.

Legend: k = smaller dim of a parameter, c = larger dim ("channels"), r = rank; R_cr = G_ck P_kr.

Two kinds, both with E|R_j|^2 = |G_j|^2 for every channel j:
    Gaussian    P ~ N(0, 1/r), the paper's (arXiv:2412.05270); a dense product, 2 k c r operations
    BlockSign   each of the k rows of P has a single +1 or -1: R's columns are signed sums of k/r of G's. A
                CountSketch (Charikar et al. 2002) with buckets of equal size; k c operations, no product and,
                because r neighbours are only rotated among themselves, no gathering
"""

from __future__ import annotations

import functools
import math
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from apollo_worker.optimizer.rounding import hash_bits


class Gaussian(NamedTuple):
    P_kr: Tensor  # fp32, or what a backend multiplies in


class BlockSign(NamedTuple):
    """Row i of block b (of r neighbouring rows) goes to column (i + shift_b) % r, with its own sign.

    Two rows of one block never meet; two of different blocks do with probability 1/r, as under a permutation
    of all rows. Without the shifts rows r apart would meet in every draw: they may be the same feature of two
    attention heads.
    """

    shift_b: Tensor  # int64, below r; one for each block, of which the last may be short
    sign_k: Tensor  # fp32, +1 or -1
    rank: int

    def dense(self) -> Tensor:
        """P (k, r) fp32, for the reference."""
        row = torch.arange(len(self.sign_k), device=self.sign_k.device)
        P_kr = torch.zeros(len(row), self.rank, device=row.device)
        P_kr[row, (row + self.shift_b[row // self.rank]) % self.rank] = self.sign_k
        return P_kr


Sketch = Gaussian | BlockSign
PROJECTIONS = ("gaussian", "block_sign")
SEED_OF = {"gaussian": "projection", "block_sign": "block_sign"}  # purposes, for derive_seed


class Draw(NamedTuple):
    """All that a sketch depends on: the same draw makes the same sketch, after a restart too."""

    kind: str  # one of PROJECTIONS
    seed: int
    name: str  # the parameter's HF name
    refresh_index: Tensor  # 0-dim int64 on `device`: how often P was made anew; not waited for on a GPU
    min_dim: int  # k
    rank: int
    device: torch.device

    @property
    def derived_seed(self) -> int:
        return derive_seed(self.seed, self.name, SEED_OF[self.kind])


@functools.cache  # two a parameter and seed
def derive_seed(seed: int, name: str, purpose: str) -> int:
    """64 bits that depend on all three and on nothing else: not on order, process or device."""
    return int.from_bytes(blake2b(f"{seed}\0{name}\0{purpose}".encode(), digest_size=8).digest(), "little")


def projection(
    seed: int, name: str, refresh_index: int | Tensor, min_dim: int, rank: int, device: torch.device
) -> Tensor:
    """P (min_dim, rank) fp32 ~ N(0, 1/rank), made anew on `device` whenever it is needed.

    By Box-Muller from counter hashes: `refresh_index` may be a tensor on the device, and 27B's 280 million
    normals a step cost neither a CPU second nor a copy. The hashed bits are equal on all devices; log, cos
    and sin may differ in the last bit between a CPU and a GPU.
    """
    num_pairs = (min_dim * rank + 1) // 2
    bits = hash_bits(
        2 * num_pairs, derive_seed(seed, name, SEED_OF["gaussian"]), refresh_index, device=device
    )
    uniform = ((bits >> 8) & 0xFFFFFF).float().add_(0.5).mul_(2.0**-24)  # in (0, 1]
    radius = uniform[:num_pairs].log().mul_(-2.0 / rank).sqrt_()
    angle = uniform[num_pairs:] * (2.0 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[: min_dim * rank].view(min_dim, rank)


def block_sign(
    seed: int, name: str, refresh_index: int | Tensor, min_dim: int, rank: int, device: torch.device
) -> BlockSign:
    """The lowest of a row's hashed bits is its sign; the others of a block's first row are its shift."""
    bits = hash_bits(min_dim, derive_seed(seed, name, SEED_OF["block_sign"]), refresh_index, device=device)
    shift_b = ((bits[::rank] >> 1) & 0x3FFFFFFF) % rank
    return BlockSign(shift_b.long(), 1.0 - 2.0 * (bits & 1).float(), rank)


def make_sketch(draw: Draw) -> Sketch:
    arguments = draw.seed, draw.name, draw.refresh_index, draw.min_dim, draw.rank, draw.device
    return block_sign(*arguments) if draw.kind == "block_sign" else Gaussian(projection(*arguments))


def dense(sketch: Sketch) -> Tensor:
    """P (k, r) fp32 of either kind."""
    return sketch.P_kr.float() if isinstance(sketch, Gaussian) else sketch.dense()
