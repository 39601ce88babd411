"""Contrastive batches larger than the encoders' memory: gradients of embeddings are cached, encoders run twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from couplings._checks import describe, reject

Encoder = Callable[..., Tensor]


def cached_backward(
    loss: Callable[..., Tensor], encoders: Sequence[Encoder], inputs: Sequence[Any], *, chunk_size: int
) -> Tensor:
    """``loss(encoders[0](inputs[0]), ...).backward()`` with the encoders' activations of one chunk at a time.

    First all chunks are embedded without a graph; then the loss of all embeddings is taken, and its gradient with
    respect to them; then each chunk is embedded again, with a graph, and takes its part of that gradient further
    (GradCache). The states of the random generators are restored for it, so that dropout draws the same again.
    Gradients add to ``.grad`` as with ``backward``, those of a temperature within ``loss`` included. The price is one
    more forward pass of the encoders.

    Layers that look at the whole batch see a chunk, and running statistics (batch norm) are updated in both passes. A
    ``DistributedDataParallel`` encoder exchanges gradients once, after its last chunk.

    Args:
        loss: of the embeddings, one for each encoder, to a scalar: for instance
            ``lambda a, b: clip_loss(a, b, temperature=t)``, ``couplings.distributed.contrastive`` included.
        encoders: a module or function for each input; one may be there twice.
        inputs: for each encoder a tensor, a tuple of tensors (its arguments) or a dict of tensors (its keyword
            arguments), with the batch along dimension 0.
        chunk_size: rows that are embedded at a time.

    Returns:
        The loss, (), without a graph.

    Raises:
        TypeError, ValueError: arguments that do not fit together; a loss that is no scalar.

    Reference:
        Gao, Zhang, Han, Callan: Scaling deep contrastive learning batch size under memory limited setup, RepL4NLP 2021.

    Example:
        >>> import torch
        >>> from couplings.losses import clip_loss
        >>> encoder, x = torch.nn.Linear(5, 3), torch.randn(8, 5)
        >>> loss = cached_backward(clip_loss, (encoder, encoder), (x, x + 0.1), chunk_size=2)
        >>> loss.shape, encoder.weight.grad.shape
        (torch.Size([]), torch.Size([3, 5]))
    """
    _check(loss, encoders, inputs, chunk_size)
    chunks = [list(_chunks(given, chunk_size)) for given in inputs]
    embeddings, states = [], []
    with torch.no_grad():
        for encoder, parts in zip(encoders, chunks, strict=True):
            found, before = [], []
            for part in parts:
                before.append(_Random(part))
                found.append(_embed(encoder, part))
            states.append(before)
            embeddings.append(torch.cat(found))
    # autocast keeps the weights that it has cast; those cast without a graph would have no gradient
    torch.clear_autocast_cache()
    leaves = [x.detach().requires_grad_() for x in embeddings]
    with torch.enable_grad():
        value = loss(*leaves)
        if value.numel() != 1:
            reject("loss", "a function that returns a scalar", describe(value), "Use reduction='mean'.")
        value.backward()

    last = {id(encoder): i for i, encoder in enumerate(encoders)}
    after = _Random(inputs)
    for i, (encoder, parts, before, leaf) in enumerate(zip(encoders, chunks, states, leaves, strict=True)):
        if leaf.grad is None:
            continue
        for j, (part, state, slope) in enumerate(
            zip(parts, before, leaf.grad.split(chunk_size), strict=True)
        ):
            state.restore()
            final = last[id(encoder)] == i and j + 1 == len(parts)
            with contextlib.nullcontext() if final else _quiet(encoder), torch.enable_grad():
                again = _embed(encoder, part)
                if again.requires_grad:
                    again.backward(slope)
    after.restore()
    return value.detach()


class _Random:
    """The states of the CPU's generator and of those of the devices that the inputs are on."""

    def __init__(self, inputs: Any) -> None:
        self.cpu = torch.get_rng_state()
        devices = {x.device for x in _tensors(inputs) if x.device.type != "cpu"}
        self.others = [(x, torch.get_device_module(x).get_rng_state(x)) for x in devices]

    def restore(self) -> None:
        """Go back to them."""
        torch.set_rng_state(self.cpu)
        for device, state in self.others:
            torch.get_device_module(device).set_rng_state(state, device)


def _tensors(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        yield inputs
    else:
        for value in inputs.values() if isinstance(inputs, dict) else inputs:
            yield from _tensors(value)


def _chunks(given: Any, size: int) -> Iterator[Any]:
    """Pieces of the batch, in the form that it has."""
    for start in range(0, next(_tensors(given)).shape[0], size):
        rows = slice(start, start + size)
        if isinstance(given, Tensor):
            yield given[rows]
        elif isinstance(given, dict):
            yield {name: x[rows] for name, x in given.items()}
        else:
            yield tuple(x[rows] for x in given)


def _embed(encoder: Encoder, part: Any) -> Tensor:
    if isinstance(part, Tensor):
        return encoder(part)
    return encoder(**part) if isinstance(part, dict) else encoder(*part)


def _quiet(encoder: Encoder) -> contextlib.AbstractContextManager[None]:
    """DDP's ``no_sync``: gradients add up on this rank."""
    no_sync = getattr(encoder, "no_sync", None)
    context: contextlib.AbstractContextManager[None] = (
        no_sync() if isinstance(encoder, torch.nn.Module) and callable(no_sync) else contextlib.nullcontext()
    )
    return context


def _check(loss: object, encoders: object, inputs: object, chunk_size: object) -> None:
    if not callable(loss):
        reject("loss", "a function of the embeddings", describe(loss), "Pass a function.", TypeError)
    if not isinstance(encoders, (tuple, list)) or not all(callable(encoder) for encoder in encoders):
        kind = type(encoders).__name__
        reject("encoders", "a sequence of modules or functions", kind, "One for each input.", TypeError)
    if not isinstance(inputs, (tuple, list)) or len(inputs) != len(encoders) or not inputs:
        got = f"{len(inputs)} of them" if isinstance(inputs, (tuple, list)) else describe(inputs)
        reject(
            "inputs",
            f"a sequence of {len(encoders)} inputs, one for each encoder",
            got,
            "A list, for instance.",
        )
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        reject("chunk_size", "an int", describe(chunk_size), "Rows to embed at a time.", TypeError)
    if chunk_size < 1:
        reject("chunk_size", "at least 1", chunk_size, "Rows to embed at a time.")
    for i, given in enumerate(inputs):
        parts = (
            list(given.values())
            if isinstance(given, dict)
            else given
            if isinstance(given, tuple)
            else [given]
        )
        if not parts or not all(isinstance(part, Tensor) and part.ndim for part in parts):
            want = "a tensor, or a tuple or dict of tensors, with the batch along dimension 0"
            reject(f"inputs[{i}]", want, type(given).__name__, "Wrap the encoder in a function.", TypeError)
        if len({part.shape[0] for part in parts}) != 1 or parts[0].shape[0] == 0:
            rows = [part.shape[0] for part in parts]
            reject(
                f"inputs[{i}]",
                "as many rows in all tensors, and at least one",
                rows,
                "The batch is dimension 0.",
            )
