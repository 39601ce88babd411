"""The commands: reproduce, list, report, search, translate, bench, doctor."""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import couplings_experiments.run as runs
from couplings_experiments.data import DATASETS
from couplings_experiments.doctor import main as diagnose
from couplings_experiments.errors import UserError, explained
from couplings_experiments.experiment import PRESETS, Experiment, Request, discover, select
from couplings_experiments.files import make_directory
from couplings_experiments.processes import LOST, Lost, complain, joined
from couplings_experiments.progress import Screen
from couplings_experiments.report.compare import compare, write_comparison
from couplings_experiments.report.page import write_report

app = typer.Typer(
    name="couplings",
    help="Differentiable discrete operators at work: train, compare, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_OUT = Path("report")

Preset = Enum("Preset", {name: name for name in PRESETS}, type=str)  # type: ignore[misc]
DatasetName = Enum("DatasetName", {name: name for name in DATASETS}, type=str)  # type: ignore[misc]


@app.command()
def reproduce(
    names: Annotated[list[str] | None, typer.Argument(help="Which experiments; none: all of them.")] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(help="smoke: seconds; quick (default): a minute each; full: all seeds."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds, instead of the preset's.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where MNIST, Fashion-MNIST or CIFAR lie.")] = None,
    dataset: Annotated[DatasetName | None, typer.Option(help="What to train on; default: digits.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu (default), cuda, cuda:1, ...")] = None,
    language: Annotated[
        str | None, typer.Option(help="What the translation experiment translates to; default: fr.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the report, and of an unfinished run.")] = _OUT,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the unfinished run in --out.")] = False,
) -> None:
    """Run the experiments on real data and write the report; under torchrun on several processes."""
    chosen = select(names or [])
    stated = {
        "experiments": tuple(experiment.name for experiment in chosen) if names else None,
        "preset": preset and preset.value,
        "seeds": seeds,
        "data_dir": data_dir and str(data_dir.expanduser().absolute()),
        "dataset": dataset and dataset.value,
        "device": device,
        "language": language,
    }
    request = Request(
        experiments=tuple(experiment.name for experiment in chosen),
        preset=preset.value if preset else "quick",
        dataset=dataset.value if dataset else "digits",
        data_dir=str(data_dir.expanduser().absolute()) if data_dir else None,
        seeds=seeds,
        device=device or "cpu",
        language=language or "fr",
    )
    given = frozenset(name for name, value in stated.items() if value is not None)
    if data_dir is not None and not resume and request.dataset == "digits":
        raise UserError(
            f"--data-dir {data_dir} holds files of a --dataset, and none is asked for. "
            f"Add --dataset ({', '.join(name for name in DATASETS if name != 'digits')}), or leave --data-dir out."
        )
    console = Console()
    try:
        with joined(request.device) as processes:
            console.quiet = not processes.first
            with Screen(console) as screen:
                page = runs.reproduce(
                    request, out, resume=resume, progress=screen, given=given, processes=processes
                )
    except Lost:
        complain(LOST)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        words = (
            f"couplings reproduce --out {shlex.quote(str(out))} --resume"  # the rest is stored with the run
        )
        complain(f"interrupted; every finished epoch is kept. Continue with: {words}")
        raise typer.Exit(130) from None
    if page is None:
        console.print(f"{out} is finished, there is nothing to resume.", highlight=False, soft_wrap=True)
    else:
        console.print(f"Wrote {page} and {page.with_name('results.json')}", highlight=False, soft_wrap=True)


@app.command("list")
def list_() -> None:
    """Show the experiments, and about how long they take on two cores."""
    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("what it does")
    for preset in PRESETS:
        table.add_column(preset, justify="right", no_wrap=True)
    for experiment in discover().values():
        title = experiment.title if experiment.by_default else f"{experiment.title} (only by name)"
        table.add_row(experiment.name, title, *(_about(experiment, preset) for preset in PRESETS))
    Console().print(table)


def _about(experiment: Experiment, preset: str) -> str:
    if preset not in experiment.minutes:
        return "–"
    minutes = experiment.minutes[preset]
    return f"{minutes:.0f} min" if minutes >= 1 else f"{max(round(60 * minutes), 1)} s"


@app.command()
def report(
    a: Annotated[Path, typer.Argument(help="A directory with results.json.")] = _OUT,
    b: Annotated[Path | None, typer.Argument(help="Another one, to compare with the first.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where compare.html goes; none: differences are only printed.")
    ] = None,
) -> None:
    """Draw the report again from results.json, or compare two runs."""
    console = Console()
    if b is None:
        if out is not None:
            raise UserError(f"--out {out} is for comparing two runs. Say: couplings report {out}")
        with explained(f"writing to {a}"):
            page = write_report(a)
        console.print(f"Wrote {page}", markup=False, highlight=False, soft_wrap=True)
        return
    found = compare(a, b)
    for line in found.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        make_directory(out)
        with explained(f"writing to {out}"):
            page = write_comparison(found, out)
        console.print(f"Wrote {page}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def translate(
    text: Annotated[
        list[str], typer.Argument(help="A number below a billion, in English words or in digits.")
    ],
    language: Annotated[str, typer.Option(help="Target language: fr, es, pt, ro, ru, pl, cs, ...")] = "fr",
    beam: Annotated[int, typer.Option(min=1, help="How many hypotheses to keep.")] = 5,
    out: Annotated[Path, typer.Option(help="Directory that keeps the translator, trained once.")] = _OUT,
) -> None:
    """Translate the name of a number and show the beam."""
    # not at the top: `couplings doctor` must run where num2words or sacrebleu are missing
    from couplings_experiments.translation_command import translate as find

    console = Console()
    try:
        with Screen(console) as screen:
            found = find(" ".join(text), language, beam, out, screen)
    except KeyboardInterrupt:
        complain("interrupted; every finished epoch is kept. The same command continues.")
        raise typer.Exit(130) from None
    table = Table(box=None, pad_edge=False, title=" ".join(found.source), title_justify="left")
    table.add_column(language)
    table.add_column("log-likelihood", justify="right")
    table.add_column("probability", justify="right")
    for words, log_likelihood in found.hypotheses:
        table.add_row(" ".join(words), f"{log_likelihood:.3f}", f"{math.exp(log_likelihood):.2%}")
    console.print(table)
    if found.truth is not None:
        right = "found" if found.hypotheses[0].words == found.truth else "not found"
        console.print(
            f"num2words: {' '.join(found.truth)} ({right})", markup=False, highlight=False, soft_wrap=True
        )


@app.command()
def search(
    question: Annotated[
        list[str], typer.Argument(help="What the function that you look for does, in words.")
    ],
    out: Annotated[Path, typer.Option(help="Directory of a report with the experiment retrieval.")] = _OUT,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many answers.")] = 5,
) -> None:
    """Find a function by what it does, with the trained retriever."""
    from couplings_experiments.retrieval_index import search as find

    console = Console()
    for answer in find(out, " ".join(question), count):
        line = f"{answer.score:.3f}  {answer.entry.name}  {answer.entry.query}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run the benchmarks of a checkout.

    All arguments go to `python -m benchmarks`.
    """
    checkout = Path.cwd()
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        raise UserError(
            "benchmarks are part of the source, not of the package: run this in a checkout of couplings."
        )
    raise typer.Exit(
        subprocess.run([sys.executable, "-m", "benchmarks", *context.args], check=False).returncode
    )


@app.command()
def doctor() -> None:
    """Say what is installed and active, and what would stop a run."""
    raise typer.Exit(diagnose())


def run(arguments: list[str]) -> int:
    """Run the command line on ``arguments`` and return the exit status."""
    try:
        app(arguments)
    except SystemExit as end:  # how typer returns
        return end.code if isinstance(end.code, int) else 1 if end.code else 0
    except UserError as error:
        complain(str(error))
        return error.exit_code
    return 0
