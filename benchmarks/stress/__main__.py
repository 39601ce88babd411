"""Random problems by the hundred thousand: ``python -m benchmarks.stress``, or ``make stress``.

Every operator x dtype x epsilon x distribution x magnitude x mask x ties. A problem is wrong if its error is above the
documented bar, or not finite, and nothing said so. ``--only NAME:SEED:ROW`` draws one problem again, alone; NAME:SEED
its batch, where the rows belong together (contrastive losses, MaxSim).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.stress.checks import APART, CHECKS, CLOSE
from benchmarks.stress.problems import Batch

RESULTS = Path(__file__).parents[1] / "results"
ROWS = 50
DTYPES = (torch.float32, torch.float64, torch.float32, torch.float64, torch.bfloat16)
EPSILONS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
NO_HALF = (
    "solve",
    "sinkhorn",
    "match",
    "wasserstein",
    "soft_topk",
    "soft_rank",
    "list",
    "contrastive",
    "soft_quantile",
)
"""Rounding of inputs and outputs says nothing of the solver there: the laws check that half is float32 rounded once."""


def batch(name: str, seed: int, rows: range) -> Batch:
    """Which problem a seed is: sizes, dtype and epsilon follow from it."""
    generator = torch.Generator().manual_seed(seed)
    n, m = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((3, 41), (3, 25)))
    dtype = DTYPES[int(torch.randint(len(DTYPES), (), generator=generator))]
    if dtype == torch.bfloat16 and name.startswith(NO_HALF):
        dtype = torch.float32
    epsilon = EPSILONS[int(torch.randint(len(EPSILONS), (), generator=generator))]
    if name.startswith("solve"):  # raw costs of about 1: as hard as scores of deviation 100
        epsilon = max(epsilon, 1e-2)
    return Batch(seed, rows, n, m, dtype, epsilon)


def run(name: str, problems: int, first: int) -> dict[str, Any]:
    """``problems`` of one operator, and what came of them."""
    check, _ = CHECKS[name]
    start, clock = time.process_time(), time.perf_counter()
    out: dict[str, Any] = {
        "operator": name,
        "problems": 0,
        "flagged": 0,
        "wrong": 0,
        "worst": 0.0,
        "failures": [],
    }
    APART.clear()
    seed = first
    while out["problems"] < problems:
        one = batch(name, seed, range(min(ROWS, problems - out["problems"])))
        try:
            ratio, said = check(one)
        except Exception as error:  # noqa: BLE001 - an operator that raises on valid input is a finding
            out["failures"].append(f"{name}:{seed}: {type(error).__name__}: {error}")
            ratio, said = torch.full((len(one.rows),), math.inf), torch.zeros(len(one.rows), dtype=torch.bool)
        wrong = (ratio > 1) & ~said
        out["problems"] += len(one.rows)
        out["flagged"] += int(said.sum())
        out["wrong"] += int(wrong.sum())
        fine = ratio[~said & ~wrong]
        out["worst"] = max([out["worst"], *fine.tolist()])
        for row in wrong.nonzero()[:, 0].tolist():
            out["failures"].append(
                f"{name}:{seed}:{row} {float(ratio[row]):.2g} bars, n {one.n}, m {one.m}, {one.dtype}, "
                f"epsilon {one.epsilon:g}"
            )
        seed += 1
    apart = torch.cat(APART) if APART else torch.zeros(0)
    out["gradients"], out["gradients_apart"] = len(apart), int((~(apart <= CLOSE)).sum())
    out["worst_gradient"] = max([0.0, *apart[apart.isfinite()].tolist()])
    out["cpu_seconds"] = time.process_time() - start
    out["seconds"] = time.perf_counter() - clock
    return out


def table(results: list[dict[str, Any]], about: dict[str, str]) -> str:
    """The figures in Markdown."""
    total = {key: sum(r[key] for r in results) for key in ("problems", "flagged", "wrong", "cpu_seconds")}
    lines = [
        "# Stress run",
        "",
        f"{total['problems']} problems, {total['flagged']} flagged by a status, "
        f"**{total['wrong']} wrong without a word**, {total['cpu_seconds']:.0f} s of CPU time. "
        f"{about['cpu']}, torch {about['torch']}, {about['date']}.",
        "",
        "Sizes 3 to 40, float32, float64 and bfloat16, epsilon 1 to 1e-6 (`solve`: to 1e-2 of costs of deviation 1, "
        "heavy tails included), nine distributions with ties and constants, magnitudes 1e-30 to 1e30, masks with "
        "holes. Each answer is checked again in float64 by `benchmarks/stress/checks.py`: sums and marginals "
        "against the documented bars, other algorithms' answers, finite gradients, float32 gradients against float64 "
        "(relative to the row's largest: wrong above 1e-2, counted above 1e-4; of other methods, "
        "list and contrastive losses and MaxSim, which have kinks, it only must be finite).",
        "",
        "| operator | problems | flagged | wrong | largest error / bar | float32 gradients: over 1e-4, of | largest |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['operator']} | {r['problems']} | {r['flagged']} | {r['wrong']} | {r['worst']:.2g} "
        f"| {r['gradients_apart']} of {r['gradients']} | {r['worst_gradient']:.1e} |"
        for r in results
    ]
    return "\n".join([*lines, "", "`make stress` runs it again.", ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stress", description=__doc__)
    parser.add_argument("--problems", type=int, default=100_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch (default: %(default)s)")
    parser.add_argument("--only", help="one operator, or NAME:SEED:ROW for one problem alone")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="where the table goes (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # problems are tiny: threads would wait for each other
    name, *place = (options.only or "").split(":")
    if name and name not in CHECKS:
        parser.error(f"no operator named {name}; there are: {'; '.join(CHECKS)}")
    if place:
        rows = range(int(place[1]), int(place[1]) + 1) if len(place) > 1 else range(ROWS)
        ratio, said = CHECKS[name][0](batch(name, int(place[0]), rows))
        for row, one, flag in zip(rows, ratio.tolist(), said.tolist(), strict=True):
            print(f"row {row}: {one:.3g} bars, {'flagged' if flag else 'not flagged'}")
        return int(bool(((ratio > 1) & ~said).any()))
    chosen = [name] if name else list(CHECKS)
    shares = sum(CHECKS[one][1] for one in chosen)
    results = []
    for number, one in enumerate(chosen, 1):
        wanted = -(-options.problems * CHECKS[one][1] // shares)
        print(f"[{number}/{len(chosen)}] {one}: {wanted} problems", end=" ", flush=True)
        results.append(run(one, wanted, options.seed))
        last = results[-1]
        print(
            f"{last['wrong']} wrong, {last['flagged']} flagged, {last['cpu_seconds']:.0f} s CPU", flush=True
        )
        for failure in last["failures"][:5]:
            print(f"    {failure}", flush=True)
    about = environment.describe()
    if not name:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "stress.md").write_text(table(results, about))
        (options.out / "stress.json").write_text(
            json.dumps({"environment": about, "results": results}, indent=1)
        )
    return int(any(r["wrong"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
