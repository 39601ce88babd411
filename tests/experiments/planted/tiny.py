"""An experiment for tests that have the engine run: a training, a unit that keeps a file, a page. Milliseconds."""

from __future__ import annotations

import torch

from couplings_experiments.checkpoint import write_tensors
from couplings_experiments.epochs import Epochs
from couplings_experiments.experiment import Experiment
from couplings_experiments.report.blocks import Paragraph

EPOCHS = 3


def train(directory, after_epoch, say):
    """Adam on random data, with noise from a generator of its own; the losses and the last weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(model.parameters(), 0.1)
    draw = torch.Generator().manual_seed(0)
    epochs = Epochs(
        directory,
        model,
        optimiser,
        {"draw": draw},
        identity="tiny",
        stated=[EPOCHS],
        after_epoch=after_epoch,
        say=say,
    )
    for _ in range(len(epochs.history), EPOCHS):
        loss = model(torch.randn(5, 3, generator=draw)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        epochs.close(epochs.mean([loss.detach()]))
    return {"losses": epochs.history, "weights": model.weight.tolist()}


def run(context):
    """Both units; ``table`` has what JSON has not: a tuple, and numbers for keys."""
    context.progress.expect(EPOCHS + 1)
    trained = context.unit(
        "trained",
        EPOCHS,
        lambda directory: train(
            directory, lambda done: context.progress.advance(done, "tiny"), context.progress.say
        ),
    )

    def keep(directory):
        write_tensors(context.kept / "weights.safetensors", {"weights": torch.tensor(trained["weights"])}, {})
        return {"table": {1: ("a", sum(trained["losses"]))}}

    kept = context.unit("kept-unit", 1, keep)
    return {**trained, "table": kept["table"], "sum": kept["table"]["1"][1]}


def blocks(result):
    """One sentence."""
    return [Paragraph(f"The losses add up to {result['sum']}.")]


EXPERIMENT = Experiment("tiny", "Tiny", "Nobody", run, blocks)
