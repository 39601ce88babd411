"""Similarity of token sets, attention, beam search."""

from __future__ import annotations

import torch
from law_entry import Operator, Outputs, Settings, Source, Tensors, turned
from torch import Tensor
from torch.nn.functional import one_hot

import couplings as cp

NO_EPSILON = dict.fromkeys(("hard limit", "flat limit"), "no epsilon")
SIMILAR = NO_EPSILON | {"order": "one score a pair"}


def _tokens(source: Source) -> tuple[Tensors, Settings]:
    d, length = 3, int(source.integers(1, 5))
    return {
        "q": source.scores(source.ROWS, length, d),
        "x": source.scores(source.m, source.n, d),
        "q_mask": source.mask(source.ROWS, length),
        "x_mask": source.mask(source.m, source.n),
    }, {}


def _directions(source: Source) -> tuple[Tensors, Settings]:
    """Without ties, which rounding of the lengths would break in one way or the other."""
    tensors, settings = _tokens(source)
    return {k: t + source.randn(*t.shape) if k in "qx" else t for k, t in tensors.items()}, settings


def _paired(source: Source) -> tuple[Tensors, Settings]:
    tensors, settings = _tokens(source)
    x, mask = tensors["x"], tensors["x_mask"]
    take = source.integers(0, len(x) - 1, source.ROWS)
    return {**tensors, "x": x[take] + source.randn(source.ROWS, 1, 3), "x_mask": mask[take]}, settings


def _candidates(source: Source) -> tuple[Tensors, Settings]:
    tensors, settings = _tokens(source)
    x = source.scores(source.ROWS, source.m, source.n, 3)
    return {**tensors, "x": x, "x_mask": source.mask(*x.shape[:-1])}, settings


AXES = {"q": "bld", "x": "cnd", "q_mask": "bl", "x_mask": "cn"}
PAIR_AXES = {"q": "bld", "x": "bnd", "q_mask": "bl", "x_mask": "bn"}
CANDIDATE_AXES = {"q": "bld", "x": "bcnd", "q_mask": "bl", "x_mask": "bcn"}


def _grid(t: Tensors) -> Tensor:
    grid = torch.einsum("bld,cnd->bcln", t["q"], t["x"]).masked_fill(~t["x_mask"][:, None], -torch.inf)
    return grid.amax(-1).masked_fill(~t["q_mask"][:, None], 0).sum(-1)


def _pair_grid(t: Tensors) -> Tensor:
    grid = torch.einsum("bld,bnd->bln", t["q"], t["x"]).masked_fill(~t["x_mask"][:, None], -torch.inf)
    return grid.amax(-1).masked_fill(~t["q_mask"], 0).sum(-1)


def _doubled(t: Tensors, source: Source):
    """Scores are linear in the queries, exactly for powers of two."""
    return t, {**t, "q": 2.0**20 * t["q"]}, lambda out: tuple(2.0**20 * o for o in out)


def _maxsim(
    name: str, draw, axes, out: str, sums, *, rows: str, free: str, cosine=False, turn=True, **options
) -> Operator:
    smooth = "temperature" in options
    return Operator(
        "maxsim",
        draw,
        lambda t, e, s: (
            cp.maxsim(t["q"], t["x"], query_mask=t["q_mask"], document_mask=t["x_mask"], **options),
        ),
        axes,
        (out,),
        name,
        poison="q" if "topk" in options else "x",
        free=free,
        rows=rows,
        masks={"l": "q_mask", "n": "x_mask"},
        learned=("q", "x"),
        scaled=("q", "x"),
        # turned, what ties no longer does, and of ties all count among the k largest
        invariances=(*[turned("q", "x")] * turn, *[_doubled] * (not (smooth or cosine))),
        sums=(lambda t, s, out: [(out[0], sums(t))]) if sums else None,
        without=SIMILAR | ({} if sums else {"sums": "tests/similarity, by pairs"}),
    )


def _found(t: Tensors, epsilon: float, s: Settings) -> Outputs:
    found = cp.maxsim_topk(t["q"], t["x"], 2, query_mask=t["q_mask"], document_mask=t["x_mask"])
    return (found.values.to(t["q"].dtype),)


SIMILARITY = [
    _maxsim("all pairs", _tokens, AXES, "bc", _grid, rows="bc", free="lndc"),
    _maxsim("smooth", _tokens, AXES, "bc", None, rows="bc", free="lndc", temperature=0.3),
    _maxsim(
        "cosine, mean",
        _directions,
        AXES,
        "bc",
        None,
        rows="bc",
        free="lndc",
        cosine=True,
        normalize=True,
        reduction="mean",
    ),
    _maxsim("topk", _tokens, AXES, "bc", None, rows="b", free="lndc", turn=False, topk=3),
    _maxsim("pairwise", _paired, PAIR_AXES, "b", _pair_grid, rows="b", free="lnd", layout="pairwise"),
    _maxsim(
        "candidates", _candidates, CANDIDATE_AXES, "bc", None, rows="b", free="lndc", layout="candidates"
    ),
    Operator(
        "chamfer",
        _tokens,
        lambda t, e, s: (cp.chamfer(t["q"], t["x"], x_mask=t["q_mask"], y_mask=t["x_mask"]),),
        AXES,
        ("bc",),
        free="lndc",
        rows="bc",
        masks={"l": "q_mask", "n": "x_mask"},
        learned=("q", "x"),
        scaled=("q",),
        invariances=(turned("q", "x"), _doubled),
        without=SIMILAR | {"sums": "tests/similarity, by pairs"},
    ),
    Operator(
        "maxsim_topk",
        _tokens,
        _found,
        AXES,
        ("bk",),
        free="lndc",
        rows="b",
        masks={"l": "q_mask", "n": "x_mask"},
        poison="q",
        invariances=(turned("q", "x"), _doubled),
        sums=lambda t, s, out: [(out[0], _grid(t).topk(2).values)],
        without=SIMILAR | {"gradients": "nothing is differentiated"},
    ),
]


# ------------------------------------------------------------------------------------------------ attention


def _heads(source: Source) -> tuple[Tensors, Settings]:
    length = int(source.integers(1, 4))
    tensors = {
        "x": source.randn(source.ROWS, length, 3),
        "k": source.randn(source.ROWS, source.n, 3),
        "v": source.randn(source.ROWS, source.n, 2),
        "mask": source.mask(source.ROWS, source.n),
    }
    return tensors, {"k": int(source.integers(1, source.n))}


def _attention(t: Tensors, epsilon: float, s: Settings) -> Outputs:
    mask = t["mask"].unsqueeze(-2)
    return cp.topk_attention(t["x"], t["k"], t["v"], s["k"], epsilon=epsilon, mask=mask, return_weights=True)


def _softmax(t: Tensors, s: Settings, k: int | None) -> Outputs:
    scores = t["x"] @ t["k"].mT / t["x"].shape[-1] ** 0.5
    scores = scores.masked_fill(~t["mask"].unsqueeze(-2), -torch.inf)
    if k is not None:
        scores = scores.masked_fill(scores < scores.topk(k).values[..., -1:], -torch.inf)
    weights = scores.softmax(-1)
    return weights @ t["v"], weights


def _same_for_all_keys(t: Tensors, source: Source):
    return t, {**t, "k": t["k"] + source.randn(t["k"].shape[0], 1, 3)}, lambda out: out


ATTENTION = Operator(
    "topk_attention",
    _heads,
    _attention,
    {"x": "bld", "k": "bnd", "v": "bne", "mask": "bn"},
    ("ble", "bln"),
    free="lnde",
    masks={"n": "mask"},
    learned=("x", "k", "v"),
    scaled=("x",),
    invariances=(_same_for_all_keys,),
    sums=lambda t, s, out: [(out[1].sum(-1), torch.ones_like(out[1][..., 0]))],
    hard=(lambda t, s: _softmax(t, s, s["k"]), 1e-7),
    flat=(lambda t, s: _softmax(t, s, None), 1e7),
    without={
        "half": "scores and weights in half precision, as in ordinary attention",
        "order": "weights rise with the scores: tests/attention, against the formula",
    },
)


# ----------------------------------------------------------------------------------------------------- beams


def _decoder(source: Source) -> tuple[Tensors, Settings]:
    words, width = source.n + 2, 3
    gold = one_hot(source.integers(0, words - 1, source.ROWS, 3), words).double()
    tensors = {
        "x": source.randn(source.ROWS, width),
        "embeddings": source.randn(words, width),
        "out": source.randn(words, width),
        "gold": gold,
        "start": one_hot(source.integers(0, words - 1, source.ROWS), words).double(),
    }
    return tensors, {"beam": int(source.integers(1, 4)), "mix": source.randn(width, width)}


DECODER_AXES = {"x": "bw", "embeddings": "vw", "out": "vw", "gold": "btv", "start": "bv"}


def _parts(t: Tensors, s: Settings):
    mix = s["mix"].to(t["x"].dtype)

    def step(embedding: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(state @ mix + embedding)
        return (state @ t["out"].mT).log_softmax(-1), state

    return (step, t["embeddings"], t["x"]), {"start": t["start"].argmax(-1)}


def _words(tokens: Tensor, t: Tensors) -> Tensor:
    return one_hot(tokens, t["embeddings"].shape[0]).to(t["x"].dtype)


def _beam(t: Tensors, epsilon: float, s: Settings) -> Outputs:
    given, options = _parts(t, s)
    found = cp.beam.beam_search(*given, beam=s["beam"], max_length=3, **options)
    return found.log_likelihoods, _words(found.tokens, t)


def _soft_beam(t: Tensors, epsilon: float, s: Settings) -> Outputs:
    given, options = _parts(t, s)
    gold = t["gold"].argmax(-1)
    found = cp.beam.soft_beam_search(*given, beam=s["beam"], gold=gold, epsilon=epsilon, **options)
    return found.log_likelihoods, found.gold_log_likelihoods, _words(found.tokens, t)


def _beam_loss(name: str):
    def call(t: Tensors, epsilon: float, s: Settings) -> Outputs:
        given, options = _parts(t, s)
        if name != "teacher_forcing_loss":
            options |= {"beam": s["beam"], "epsilon": epsilon}
        return (getattr(cp.beam, name)(*given, t["gold"].argmax(-1), **options),)

    return call


SEARCH = {
    "padding": "lengths, not masks: tests/beam",
    "order": "a search",
    "invariance": "log-likelihoods are absolute",
    "hard limit": "tests/beam: at epsilon 0 it is beam search",
    "flat limit": "tests/beam",
    "half": "the decoder is the user's: its own rounding decides between words",
    "batch": "one batch dimension",
}
LOSS = SEARCH | {
    "rows": "a mean over sentences",
    "alone": "a mean over sentences",
    "nan": "a mean over sentences",
}


def _decoding(name: str, call, outputs, *, loss: bool, learned, sums=None, without=None) -> Operator:
    return Operator(
        f"beam.{name}",
        _decoder,
        call,
        DECODER_AXES,
        outputs,
        free="v",
        rows="" if loss else "b",
        learned=learned,
        sums=sums,
        without=(LOSS if loss else SEARCH) | (without or {}),
    )


def _never_likely(t: Tensors, s: Settings, out: Outputs):
    yield out[0], out[0].clamp_max(0)
    yield out[-1].sum(-1), torch.ones_like(out[-1][..., 0])


BEAMS = [
    _decoding(
        "beam_search",
        _beam,
        ("bk", "bktv"),
        loss=False,
        learned=(),
        sums=_never_likely,
        without={"gradients": "no gradient", "nan": "NaN is never among the best: the decoder is the user's"},
    ),
    _decoding(
        "soft_beam_search",
        _soft_beam,
        ("bk", "bk", "bktv"),
        loss=False,
        learned=("x", "embeddings", "out"),
        sums=_never_likely,
        without={"nan": "tokens are whole numbers; the likelihoods are NaN"},
    ),
    *(
        _decoding(
            name,
            _beam_loss(name),
            ("",),
            loss=True,
            learned=("x", "embeddings", "out"),
            sums=lambda t, s, out: [(out[0], out[0].clamp_min(0))],
        )
        for name in ("soft_beam_loss", "sequence_loss", "teacher_forcing_loss")
    ),
]

OPERATORS = [*SIMILARITY, ATTENTION, *BEAMS]
