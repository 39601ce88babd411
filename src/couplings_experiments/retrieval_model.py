"""The retriever: words to unit vectors, small enough to be trained from nothing on a processor in a minute.

One encoder serves all variants, for questions and texts alike. A word's vector is that of the word plus the mean of its
letter sequences', both looked up by hash, so that a word that was never trained on has one as well. Two convolutions
let it see its neighbours.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from couplings_experiments.data.docstrings import words


@dataclass(frozen=True)
class Shape:
    """Of the encoder: width, convolutions, and how many vectors the hashes of words and of letters share."""

    width: int = 64
    layers: int = 2
    buckets: int = 2**14


@dataclass(frozen=True)
class Texts:
    """Texts as words: ``ids`` (n, L) index `Lexicon.words`, -1 where a text has ended."""

    ids: Tensor

    @property
    def mask(self) -> Tensor:
        """True where there is a word, (n, L)."""
        return self.ids >= 0

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, rows: Tensor) -> Texts:
        """Some of them, no longer than the longest of these."""
        ids = self.ids[rows]
        return Texts(ids[:, : max(1, int((ids >= 0).sum(1).max()))])


class Lexicon:
    """The words of some texts, each with the numbers that its vector is looked up by."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self._index: dict[str, int] = {}

    def read(self, texts: Sequence[str], limit: int) -> Texts:
        """The first ``limit`` words of each text; words that are new are taken up."""
        rows = []
        for text in texts:
            row = []
            for word in words(text)[:limit]:
                if word not in self._index:
                    self._index[word] = len(self.words)
                    self.words.append(word)
                row.append(self._index[word])
            rows.append(row)
        ids = torch.full((len(rows), max([1, *map(len, rows)])), -1)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
        return Texts(ids)


@cache
def pieces(word: str, buckets: int) -> tuple[int, tuple[int, ...]]:
    """The bucket of a word, and those of its sequences of three and four letters; the halves do not overlap."""
    marked = f"<{word}>"
    half = buckets // 2
    letters = {marked[i : i + size] for size in (3, 4) for i in range(len(marked) - size + 1)}
    return (
        zlib.crc32(marked.encode()) % half,
        tuple(sorted(half + zlib.crc32(part.encode()) % half for part in letters)),
    )


class Encoder(nn.Module):
    """Unit vectors of words in their context.

    Args:
        shape: see `Shape`.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.table = nn.Parameter(torch.randn(shape.buckets, width) * width**-0.5)
        self.near = nn.ModuleList(nn.Linear(3 * width, width) for _ in range(shape.layers))
        self.back = nn.ModuleList(nn.Linear(width, width) for _ in range(shape.layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(shape.layers))
        self.out = nn.Linear(width, width)
        with torch.no_grad():  # at first a word is nearly itself, whatever stands beside it
            for back in self.back:
                for parameter in back.parameters():
                    parameter.mul_(0.1)
            self.out.weight.copy_(torch.eye(width))

    def forward(self, texts: Texts, lexicon: Lexicon) -> Tensor:
        """Vectors (n, L, width): of length 1, or 0 where a text has ended."""
        mask = texts.mask.to(self.table.device)
        x = self._words(texts, lexicon)
        for norm, near, back in zip(self.norms, self.near, self.back, strict=True):
            inner = norm(x).masked_fill(~mask.unsqueeze(-1), 0)
            padded = nn.functional.pad(inner, (0, 0, 1, 1))
            beside = torch.cat([padded[:, :-2], inner, padded[:, 2:]], -1)
            x = x + back(nn.functional.gelu(near(beside)))
        return nn.functional.normalize(self.out(x), dim=-1).masked_fill(~mask.unsqueeze(-1), 0)

    def _words(self, texts: Texts, lexicon: Lexicon) -> Tensor:
        """Vectors of words alone, each looked up once however often it occurs, (n, L, width)."""
        present, place = texts.ids.clamp(min=0).unique(return_inverse=True)
        found = [pieces(lexicon.words[index], self.shape.buckets) for index in present.tolist()]
        device = self.table.device
        whole = torch.tensor([word for word, _ in found], device=device)
        letters = torch.tensor([part for _, parts in found for part in parts], device=device)
        lengths = torch.tensor([len(parts) for _, parts in found], device=device)
        means = nn.functional.embedding_bag(letters, self.table, lengths.cumsum(0) - lengths, mode="mean")
        return nn.functional.embedding(place.to(device), self.table[whole] + means)


def pooled(vectors: Tensor) -> Tensor:
    """One vector of length 1 for each text, (n, width): the direction of its words' mean; masked words are 0."""
    return nn.functional.normalize(vectors.sum(1), dim=-1)
