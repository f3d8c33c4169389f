"""A day of chats, and a fleet of GPUs that answers them, simulated event by event.

A job takes a slot of a worker from its beginning to its end; whoever comes when all are taken waits, in the order of
coming. Its time in the slot is that of a worker whose slots are all taken: reading its prompt stops the other streams,
and the tokens a GPU makes are shared. So a worker is never faster than its GPU, and half empty no slower than full,
where a real one would answer a little sooner. Knows no policy: whoever runs it says how many workers there are to be.
"""

import heapq
import math
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DAY_S = 86400.0
BIN_S = 5.0
"""Within this the rate of arrivals is constant."""
LONGEST = 4096
"""Tokens of a prompt, and of an answer: half of models.yaml's context_length."""
LOOKAHEAD = 1024
"""Jobs a worker takes besides those it runs (workers/intake.py)."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Gpu:
    """`prompt_rate` and `answer_rate` are tokens/s of one GPU, read and made; `slots` its streams at once
    (max_num_seqs). `start_s` is from the decision until a new worker is ready."""

    slots: int
    prompt_rate: float
    answer_rate: float
    start_s: float

    def gpu_seconds(self, prompts: Floats, answers: Floats) -> Floats:
        """What each job costs of a GPU that does nothing else."""
        return prompts / self.prompt_rate + answers / self.answer_rate


@dataclass(frozen=True, slots=True)
class Demand:
    """Jobs by their arrival in seconds, with the tokens of their prompts and answers."""

    arrivals: Floats
    prompts: Floats
    answers: Floats


def day(rng: np.random.Generator, peak_rate: float, sizes: tuple[float, float], hours: float = 24.0) -> Demand:
    """A day from midnight: a fifth at 2:00 of what it is at 14:00, with a burst each 40 minutes or so that multiplies
    it by 1.2 to 2.5, within 30 s, for some minutes. `peak_rate` (jobs/s) is its busiest minute's. `sizes` are mean
    tokens of prompt and answer, lognormal (sigma 1); from 16:00 to 18:00 prompts have a tenth of that: short questions
    with answers as long.
    """
    bins = np.arange(0, hours * 3600, BIN_S)
    shape = 0.2 + 0.8 * (0.5 - 0.5 * np.cos((bins / 3600 - 2) * 2 * np.pi / 24))
    began = 0.0
    while (began := began + rng.exponential(2400)) < bins[-1]:
        ended = began + rng.exponential(300) + 60
        inside = (bins >= began) & (bins < ended)
        rise = np.clip((bins[inside] - began) / 30, 0, 1)
        shape[inside] *= 1 + rise * rng.uniform(0.2, 1.5)
    minute = int(60 / BIN_S)
    busiest = np.convolve(shape, np.ones(minute) / minute, "valid").max()
    return _drawn(rng, shape / busiest * peak_rate, sizes, short=(16, 18))


def waves(rng: np.random.Generator, peak_rate: float, sizes: tuple[float, float]) -> Demand:
    """Five hours of a twentieth of `peak_rate`, in which all of it comes at once, for half an hour at 1:00, and again,
    of short questions, at 3:30."""
    hours = np.arange(0, 5 * 3600, BIN_S) / 3600
    wave = ((hours >= 1) & (hours < 1.5)) | ((hours >= 3.5) & (hours < 4))
    return _drawn(rng, np.where(wave, peak_rate, peak_rate / 20), sizes, short=(3.5, 4))


def _drawn(rng: np.random.Generator, rates: Floats, sizes: tuple[float, float], short: tuple[float, float]) -> Demand:
    """Poisson arrivals at the rate of each bin; within the hours `short` prompts are a tenth as long."""
    counts = rng.poisson(rates * BIN_S)
    arrivals = np.repeat(np.arange(len(rates)) * BIN_S, counts) + rng.uniform(0, BIN_S, counts.sum())
    arrivals.sort()
    prompts, answers = (rng.lognormal(math.log(mean) - 0.5, 1, len(arrivals)) for mean in sizes)
    hour = arrivals / 3600
    prompts[(hour >= short[0]) & (hour < short[1])] /= 10
    return Demand(arrivals, np.ceil(np.minimum(prompts, LONGEST)), np.ceil(np.minimum(answers, LONGEST)))


class Fleet:
    """Workers that answer a demand, from time 0 on. `waits` are seconds until a job is begun, in the order of arrival,
    NaN for those refused: whose turn comes after more than `patience_s`."""

    def __init__(self, demand: Demand, gpu: Gpu, workers: int, patience_s: float = math.inf) -> None:
        self._demand, self._gpu, self._patience_s = demand, gpu, patience_s
        self._work = gpu.gpu_seconds(demand.prompts, demand.answers) * gpu.slots
        self._tokens = np.concatenate([[0.0], np.cumsum(demand.prompts)])
        self._slots: list[tuple[float, int]] = []
        """(free from, worker) of each slot, the first free first."""
        self._since: dict[int, float] = {}
        """When each worker was asked for."""
        self._ready: dict[int, float] = {}
        self._names = 0
        self._come = 0
        """How many have arrived, of which `_begun` wait no longer."""
        self._begun = 0
        self.now = 0.0
        self.waits = array("d")
        self.gpu_s = 0.0
        self.sent_home = 0
        """Workers ended while they had jobs in hand."""
        self.resize(workers, start_s=0.0)

    @property
    def replicas(self) -> int:
        return len(self._since)

    @property
    def ready(self) -> int:
        return sum(ready <= self.now for ready in self._ready.values())

    @property
    def waiting(self) -> int:
        return self._come - self._begun

    def resize(self, replicas: int, start_s: float | None = None) -> None:
        """Start workers, or end the newest, those that are not ready yet first; they finish what they have in hand."""
        for _ in range(replicas - self.replicas):
            name, self._names = self._names, self._names + 1
            ready = self.now + (self._gpu.start_s if start_s is None else start_s)
            self._since[name], self._ready[name] = self.now, ready
            self._slots += [(ready, name)] * self._gpu.slots
        if replicas < self.replicas:
            ended = set(sorted(self._since, reverse=True)[: self.replicas - replicas])
            for name in ended:
                ready = self._ready.pop(name)
                free = max(at for at, of in self._slots if of == name)
                # One that has not started has nothing in hand: its slots are free from then on.
                last = self.now if ready > self.now else max(self.now, free)
                self.sent_home += last > self.now
                self.gpu_s += last - self._since.pop(name)
            self._slots = [slot for slot in self._slots if slot[1] not in ended]
        heapq.heapify(self._slots)

    def advance(self, until: float) -> None:
        """Let jobs come and be begun until then."""
        come = int(np.searchsorted(self._demand.arrivals, until))
        first = self._begun
        arrivals = self._demand.arrivals[first:come].tolist()
        work = self._work[first:come].tolist()
        slots, waits, patience_s = self._slots, self.waits, self._patience_s
        replace = heapq.heapreplace
        begun = 0
        if slots:
            for arrival, seconds in zip(arrivals, work, strict=True):
                free, worker = slots[0]
                begin = arrival if arrival > free else free
                if begin >= until:
                    break
                begun += 1
                if begin - arrival > patience_s:
                    waits.append(math.nan)
                    continue
                waits.append(begin - arrival)
                replace(slots, (begin + seconds, worker))
        self._come, self._begun = come, first + begun
        self.now = until

    def signals(self) -> dict[str, float]:
        """What there is to scale by, as the service, the broker and the node tell of it."""
        arrivals = self._demand.arrivals
        oldest = self.now - arrivals[self._begun] if self.waiting else 0.0
        running = np.bincount([of for free, of in self._slots if free > self.now], minlength=self._names)
        ready = [name for name, at in self._ready.items() if at <= self.now]
        load = running[ready] / self._gpu.slots
        return {
            "queued-prompt-tokens": float(self._tokens[self._come] - self._tokens[self._begun]),
            "oldest-age": float(oldest),
            "busy-workers": float(load.sum()),
            "waiting-jobs": float(self.waiting),
            "ready-messages": float(max(0, self.waiting - LOOKAHEAD * len(ready))),
            "cpu-spinning": float(np.where(load > 0, 0.8 + 0.2 * load, 0.05).mean()) if ready else 0.0,
            "cpu-by-load": float(load.mean()) if ready else 0.0,
        }

    def finish(self) -> None:
        """All that wait are refused, and all workers are ended."""
        self.waits.extend([math.nan] * (len(self._demand.arrivals) - self._begun))
        self._begun = self._come = len(self._demand.arrivals)
        self.gpu_s += sum(self.now - since for since in self._since.values())
