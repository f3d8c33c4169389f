"""Which policy of scaling keeps people from waiting, at how many GPU hours?

Replays a day of bursty arrivals, seeded, against the deployed policy (the numbers of a ScaledObject, read from its
file), against the usual others, and against a fleet that is never scaled. Then varies each number of the policy by
itself, with fewer GPUs, for such a day and for sudden waves. It is a simulation: no GPU was measured for it. What one
does is assumed by the options below, to be replaced by figures of benchmarks/chat_throughput; deploy/SIZING.md shows
how. Autoscalers are simulated by their published algorithms, and see the metrics as they were at the scrape before,
15 s ago.
"""

import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import report
from benchmarks.autoscaler import SYNC_S, Autoscaler, Policy, Trigger, read
from benchmarks.simulated import DAY_S, Demand, Fleet, Gpu, day, waves

PROJECT = Path(__file__).parent.parent
SCALED = PROJECT / "deploy/k8s/components/scaling/chat-qwen3-0-6b.yaml"
PATIENCE_S = 240.0
"""A server refuses what would wait for longer (MARGIN of server/admission.py, of REQUEST_TIMEOUT_S)."""
LATE_S = 10.0
PEAK = 0.9
"""How much of all GPUs the busiest minute needs."""
WAVE = 0.6
"""And so many of them the waves need, which a fleet at its least meets."""
TRACE_S = 600.0
OURS, ALWAYS = "this policy", "never scaled"

SWEPT: dict[str, tuple[float, ...]] = {
    "queued-prompt-tokens": (2000, 8000, 16000, 32000, 64000, 128000, math.inf),
    "oldest-age": (5, 10, 15, 30, 60, math.inf),
    "both of these": (math.inf,),
    "busy-workers": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, math.inf),
    "scale-down window": (0, 60, 300, 600, 1200, 2400),
    "start of a worker": (15, 60, 120, 240, 480),
}
"""The first are the policy's triggers; infinity leaves one out."""


@dataclass(slots=True)
class Outcome:
    """What a day was like. `trace` has, each TRACE_S, replicas and the oldest's age."""

    waits: np.ndarray[Any, np.dtype[np.float64]]
    gpu_hours: float
    sent_home: int
    trace: list[tuple[int, float]] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        served = self.waits[~np.isnan(self.waits)]
        late = 1 - np.count_nonzero(served <= LATE_S) / max(len(self.waits), 1)
        return {
            "jobs": len(self.waits),
            "refused": len(self.waits) - len(served),
            "late": round(late, 5),
            **{f"wait_p{p}_s": round(report.percentile(served, p), 2) for p in (50, 95, 99)},
            "wait_mean_s": round(float(served.mean()), 3),
            "gpu_hours": round(self.gpu_hours, 1),
            "sent_home_at_work": self.sent_home,
        }


def simulate(demand: Demand, gpu: Gpu, policy: Policy, workers: int) -> Outcome:
    """A day that begins with so many workers."""
    fleet, autoscaler = Fleet(demand, gpu, workers, PATIENCE_S), Autoscaler(policy)
    scraped = fleet.signals()
    trace: list[tuple[int, float]] = []
    ended = math.ceil(demand.arrivals[-1] / SYNC_S) * SYNC_S + PATIENCE_S
    while fleet.now < ended:
        fleet.resize(autoscaler.decide(fleet.now, scraped, fleet.replicas, fleet.ready))
        scraped = fleet.signals()
        if fleet.now % TRACE_S == 0:
            trace.append((fleet.replicas, round(scraped["oldest-age"], 1)))
        fleet.advance(fleet.now + SYNC_S)
    fleet.finish()
    return Outcome(np.array(fleet.waits), fleet.gpu_s / 3600, fleet.sent_home, trace)


def others(gpus: int) -> dict[str, Policy]:
    """What is done elsewhere, with Kubernetes' own `behavior`."""

    def on(name: str, kind: Any, threshold: float) -> Policy:
        return Policy((Trigger(name, kind, threshold),), max_replicas=gpus)

    return {
        "CPU at 70 %": on("cpu-spinning", "Utilization", 0.7),
        "CPU at 70 %, were it the load": on("cpu-by-load", "Utilization", 0.7),
        "10 ready messages a worker": on("ready-messages", "AverageValue", 10),
        "10 waiting jobs a worker": on("waiting-jobs", "AverageValue", 10),
        ALWAYS: Policy((Trigger("waiting-jobs", "AverageValue", 1),), min_replicas=gpus, max_replicas=gpus),
    }


def varied(policy: Policy, gpu: Gpu, name: str, value: float) -> tuple[Policy, Gpu]:
    """The policy with one of its numbers changed, or the same with another start of workers."""
    if name == "start of a worker":
        return policy, dataclasses.replace(gpu, start_s=value)
    if name == "scale-down window":
        return dataclasses.replace(policy, down=dataclasses.replace(policy.down, window_s=value)), gpu
    if name == "both of these":
        return dataclasses.replace(policy, triggers=tuple(t for t in policy.triggers if t.name == "busy-workers")), gpu
    kept = [trigger for trigger in policy.triggers if trigger.name != name]
    (found,) = (trigger for trigger in policy.triggers if trigger.name == name)
    if value != math.inf:
        kept.append(dataclasses.replace(found, threshold=value))
    return dataclasses.replace(policy, triggers=tuple(kept)), gpu


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    gpu = Gpu(args.slots, args.prompt_rate, args.answer_rate, args.start)
    cost_s: float = args.prompt / args.prompt_rate + args.answer / args.answer_rate
    deployed = read(args.policy)

    def demand(gpus: int) -> Demand:
        return day(np.random.default_rng(args.seed), PEAK * gpus / cost_s, (args.prompt, args.answer), args.hours)

    def begun(of: Demand) -> int:
        """GPUs that the first ten minutes need, and a quarter more."""
        return max(1, math.ceil(np.searchsorted(of.arrivals, 600) / 600 * cost_s * 1.25))

    policies = {OURS: dataclasses.replace(deployed, max_replicas=args.gpus), **others(args.gpus)}
    runs = sum(len(values) for values in SWEPT.values())
    found: dict[str, Any] = {"policies": {}, "sweep": {}}
    with tqdm(total=len(policies) + runs, unit="day", disable=None) as bar:
        of = demand(args.gpus)
        found["needed_gpu_hours"] = round(float(gpu.gpu_seconds(of.prompts, of.answers).sum()) / 3600, 1)
        found["needed"] = _needed(of, gpu)
        for name, policy in policies.items():
            bar.set_postfix_str(name)
            outcome = simulate(of, gpu, policy, args.gpus if name == ALWAYS else begun(of))
            found["policies"][name] = {**outcome.figures(), "trace": outcome.trace}
            bar.update()
        of, small = demand(args.sweep_gpus), dataclasses.replace(deployed, max_replicas=args.sweep_gpus)
        sudden = waves(np.random.default_rng(args.seed), WAVE * args.sweep_gpus / cost_s, (args.prompt, args.answer))
        for name, values in SWEPT.items():
            for value in values:
                bar.set_postfix_str(f"{name} {value:g}")
                policy, other = varied(small, gpu, name, value)
                figures = {
                    "day": simulate(of, other, policy, begun(of)).figures(),
                    "waves": simulate(sudden, other, policy, begun(sudden)).figures(),
                }
                found["sweep"].setdefault(name, []).append({"value": _json(value), **figures})
                bar.update()
    return found


def _needed(demand: Demand, gpu: Gpu) -> list[float]:
    """GPUs whose work comes, each TRACE_S."""
    bins = np.arange(0, DAY_S + TRACE_S, TRACE_S)
    work, _ = np.histogram(demand.arrivals, bins, weights=gpu.gpu_seconds(demand.prompts, demand.answers))
    return [round(float(value) / TRACE_S, 1) for value in work]


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else "without"


def _summary(args: argparse.Namespace, found: dict[str, Any]) -> str:
    told = [f"a simulated day that needs {found['needed_gpu_hours']} GPU hours, of {args.gpus} GPUs at the most"]
    for name, row in found["policies"].items():
        told.append(
            f"{name}: {row['gpu_hours']} GPU hours, wait p50 {row['wait_p50_s']} s, p99 {row['wait_p99_s']} s, "
            f"{100 * row['late']:.2f} % later than {LATE_S:g} s or refused"
        )
    return "; ".join(told)


def _draw(found: dict[str, Any], figure: Any) -> None:
    figure.set_size_inches(16, 9)
    over, beside = figure.subplots(2, 3)
    hours = np.arange(len(found["needed"])) * TRACE_S / 3600
    over[0].fill_between(hours, found["needed"], color="lightgrey", label="needed")
    for name, row in found["policies"].items():
        replicas, ages = zip(*row["trace"], strict=True)
        at = np.arange(len(replicas)) * TRACE_S / 3600
        if name != ALWAYS:
            over[0].plot(at, replicas, label=name, linewidth=1.8 if name == OURS else 0.9)
            over[1].plot(at, ages, label=name, linewidth=1.8 if name == OURS else 0.9)
        beside[0].plot(row["gpu_hours"], 100 * row["late"] + 0.001, "o")
        beside[0].annotate(name, (row["gpu_hours"], 100 * row["late"] + 0.001), fontsize=7)
    over[0].set(title="GPUs", xlabel="hour")
    over[1].set(title="age of the oldest who waits, s", xlabel="hour", yscale="symlog")
    beside[0].set(title=f"waited over {LATE_S:g} s or refused, %", xlabel="GPU hours", yscale="log")
    for axis, load in ((over[2], "day"), (beside[2], "waves")):
        for name, rows in found["sweep"].items():
            spent = [row[load]["gpu_hours"] for row in rows]
            late = [100 * row[load]["late"] + 0.001 for row in rows]
            axis.plot(spent, late, "o-", markersize=3, label=name)
            for row, x, y in zip(rows, spent, late, strict=True):
                value = row["value"]
                axis.annotate(value if isinstance(value, str) else f"{value:g}", (x, y), fontsize=6)
        axis.set(title=f"one number varied, fewer GPUs: {load}", xlabel="GPU hours", ylabel="late, %")
        axis.legend(fontsize=7)
    rows = found["policies"].values()
    beside[1].barh(list(found["policies"]), [row["wait_p99_s"] for row in rows])
    beside[1].tick_params(axis="y", labelsize=7)
    beside[1].set(title="wait p99, s")
    over[0].legend(fontsize=7)


def parser() -> argparse.ArgumentParser:
    """What is assumed stands here alone; deploy/SIZING.md counts with the same."""
    top = report.parser(__doc__)
    top.add_argument("--policy", type=Path, default=SCALED, metavar="FILE", help="a ScaledObject (the chat model's)")
    top.add_argument("--gpus", type=int, default=100, metavar="N", help="at the most (100)")
    top.add_argument("--sweep-gpus", type=int, default=20, metavar="N", help="the same while varying (20)")
    top.add_argument("--hours", type=float, default=24, help="from midnight on (24)")
    top.add_argument("--seed", type=int, default=1, help="of the arrivals (1)")
    top.add_argument("--prompt", type=float, default=800, metavar="TOKENS", help="mean of prompts, assumed (800)")
    top.add_argument("--answer", type=float, default=400, metavar="TOKENS", help="mean of answers, assumed (400)")
    top.add_argument("--prompt-rate", type=float, default=20000, metavar="RATE", help="tokens/s read, assumed (20000)")
    top.add_argument("--answer-rate", type=float, default=2000, metavar="RATE", help="tokens/s made, assumed (2000)")
    top.add_argument("--slots", type=int, default=64, metavar="N", help="streams of a GPU, max_num_seqs (64)")
    top.add_argument(
        "--start", type=float, default=120, metavar="SECONDS", help="until a worker is ready, assumed (120)"
    )
    return top


def main() -> int:
    args = parser().parse_args()
    found = _measure(args)
    report.save(args, "scaling", found, _summary(args, found), lambda figure: _draw(found, figure))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
