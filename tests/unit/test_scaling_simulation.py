"""The simulation behind the scaling policy, held against queueing theory and Kubernetes' documented examples."""

import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import scaling
from benchmarks.autoscaler import DOWN, UP, Autoscaler, Direction, Policy, Rule, Trigger, read
from benchmarks.simulated import Demand, Fleet, Gpu, day, waves

ONE_BY_ONE = Gpu(slots=1, prompt_rate=math.inf, answer_rate=1.0, start_s=60.0)
"""A job takes as many seconds as its answer has tokens."""


def demand(gaps: np.ndarray, seconds: np.ndarray) -> Demand:
    return Demand(np.cumsum(gaps), np.full(len(gaps), 10.0), seconds)


def poisson(load: float, servers: int, jobs: int, *, constant: bool = False) -> Demand:
    """Jobs of a second each on average, that load so many servers by this share."""
    rng = np.random.default_rng(7)
    seconds = np.ones(jobs) if constant else rng.exponential(1, jobs)
    return demand(rng.exponential(1 / (load * servers), jobs), seconds)


def run(fleet: Fleet, until: float, step_s: float = 15.0) -> None:
    while fleet.now < until:
        fleet.advance(fleet.now + step_s)


def erlang_c(servers: int, load: float) -> float:
    """The share that waits in M/M/c."""
    offered = servers * load
    waits = offered**servers / math.factorial(servers) / (1 - load)
    return waits / (sum(offered**k / math.factorial(k) for k in range(servers)) + waits)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.5), (1, 0.8), (4, 0.8), (16, 0.9), (64, 0.9)])
def test_waits_are_those_of_erlang(servers: int, load: float) -> None:
    # Given Poisson arrivals and exponential service at c servers
    of = poisson(load, servers, 400_000)
    fleet = Fleet(of, ONE_BY_ONE, servers)
    run(fleet, of.arrivals[-1] + 100)
    waits = np.array(fleet.waits)
    # Then the share that waits, and the mean wait, are what the formula says
    share = erlang_c(servers, load)
    assert np.count_nonzero(waits) / len(waits) == pytest.approx(share, rel=0.04)
    assert waits.mean() == pytest.approx(share / (servers * (1 - load)), rel=0.08)


def test_constant_service_waits_half_as_long() -> None:
    # Given M/D/1, then by Pollaczek and Khinchine
    of = poisson(0.8, 1, 400_000, constant=True)
    fleet = Fleet(of, ONE_BY_ONE, 1)
    run(fleet, of.arrivals[-1] + 100)
    assert np.mean(fleet.waits) == pytest.approx(0.8 / (2 * (1 - 0.8)), rel=0.05)


def test_slots_share_what_the_gpu_does() -> None:
    # Given 64 slots: a job takes 64 times what it costs the GPU, which is then done with 64 of them
    gpu = Gpu(slots=64, prompt_rate=20_000, answer_rate=2_000, start_s=0)
    jobs = 6400
    of = Demand(np.zeros(jobs), np.full(jobs, 800.0), np.full(jobs, 400.0))
    fleet = Fleet(of, gpu, 1)
    run(fleet, 3000)
    assert max(fleet.waits) == pytest.approx((800 / 20_000 + 400 / 2_000) * (jobs - 64), rel=1e-6)


def test_no_job_is_lost_or_doubled_and_littles_law_holds() -> None:
    # Given a fleet whose size changes all the time
    rng = np.random.default_rng(3)
    of = poisson(0.8, 10, 50_000)
    fleet = Fleet(of, ONE_BY_ONE, 10)
    lengths = []
    while fleet.now < of.arrivals[-1]:
        fleet.advance(fleet.now + 1)
        come = np.searchsorted(of.arrivals, fleet.now)
        assert len(fleet.waits) + fleet.waiting == come
        lengths.append(fleet.waiting)
        if fleet.now % 60 == 0:
            fleet.resize(int(rng.integers(8, 14)))
            assert len(fleet._slots) == fleet.replicas
    # Then those that wait at a time are those that come in a second times how long they wait
    rate = len(of.arrivals) / of.arrivals[-1]
    assert np.mean(lengths) == pytest.approx(rate * np.mean(fleet.waits), rel=0.03)
    fleet.finish()
    assert len(fleet.waits) == len(of.arrivals)


def test_nobody_waits_past_patience() -> None:
    of = poisson(2.0, 1, 2000)
    fleet = Fleet(of, ONE_BY_ONE, 1, patience_s=20)
    run(fleet, of.arrivals[-1] + 100)
    waits = np.array(fleet.waits)
    assert np.nanmax(waits) <= 20
    assert np.isnan(waits).mean() == pytest.approx(0.5, abs=0.05)


def test_a_worker_is_paid_for_from_its_order_to_the_end_of_what_it_has() -> None:
    # Given two workers with a job of 100 s each
    of = demand(np.array([1.0, 1.0]), np.array([100.0, 100.0]))
    fleet = Fleet(of, ONE_BY_ONE, 2)
    fleet.advance(15)
    # When a third is ordered, and ended before it was ready
    fleet.resize(3)
    assert (fleet.replicas, fleet.ready) == (3, 2)
    fleet.advance(45)
    fleet.resize(2)
    assert (fleet.replicas, fleet.ready, fleet.sent_home, fleet.gpu_s) == (2, 2, 0, 30)
    # When one of the two is ended, then it finishes its job, from second 2 to 102
    fleet.resize(1)
    assert fleet.sent_home == 1
    assert fleet.gpu_s == 30 + 102
    # And one that is ordered is ready after its start
    fleet.resize(2)
    fleet.advance(104)
    assert fleet.ready == 1
    fleet.advance(105)
    assert fleet.ready == 2


def test_signals_are_what_the_service_tells() -> None:
    gpu = Gpu(slots=2, prompt_rate=math.inf, answer_rate=1.0, start_s=0)
    fleet = Fleet(demand(np.ones(5), np.full(5, 200.0)), gpu, 1)
    fleet.advance(10)
    told = fleet.signals()
    assert (told["waiting-jobs"], told["queued-prompt-tokens"], told["oldest-age"]) == (3, 30, 7)
    assert (told["busy-workers"], told["ready-messages"]) == (1, 0)


def policy(**fields: object) -> Policy:
    return Policy((Trigger("x", "AverageValue", 10),), **fields)  # type: ignore[arg-type]


def decide(autoscaler: Autoscaler, now: float, value: float, replicas: int, ready: int | None = None) -> int:
    return autoscaler.decide(now, {"x": value}, replicas, replicas if ready is None else ready)


@pytest.mark.parametrize(
    ("kind", "value", "replicas", "ready", "wanted"),
    [
        ("AverageValue", 41, 4, 4, 4),  # within the tolerance
        ("AverageValue", 45, 4, 4, 5),
        ("AverageValue", 45, 4, 2, 5),
        ("Value", 20, 4, 4, 8),
        ("Value", 20, 4, 2, 4),  # those that start are not asked for again
        ("Value", 5, 4, 4, 2),
        ("Value", 10.9, 4, 4, 4),
        ("Utilization", 20, 4, 4, 8),
        ("Utilization", 20, 4, 2, 4),  # those that start count as idle
        ("Utilization", 15, 4, 1, 4),
    ],
)
def test_replicas_follow_the_ratio(kind: str, value: float, replicas: int, ready: int, wanted: int) -> None:
    one = Policy((Trigger("x", kind, 10),), down=Direction(0, DOWN.rules))  # type: ignore[arg-type]
    assert decide(Autoscaler(one), 0, value, replicas, ready) == wanted


def test_the_largest_answer_counts() -> None:
    both = Policy((Trigger("x", "AverageValue", 10), Trigger("y", "AverageValue", 1)))
    assert Autoscaler(both).decide(0, {"x": 10, "y": 5}, 2, 2) == 5


def test_down_waits_for_the_window_and_goes_no_further_than_what_was_said_in_it() -> None:
    autoscaler = Autoscaler(policy(down=Direction(300, DOWN.rules)))
    assert decide(autoscaler, 0, 80, 8) == 8
    assert decide(autoscaler, 15, 40, 8) == 8
    assert decide(autoscaler, 30, 10, 8) == 8
    assert decide(autoscaler, 300, 10, 8) == 4
    assert decide(autoscaler, 315, 10, 4) == 1


def test_up_waits_for_its_window() -> None:
    autoscaler = Autoscaler(policy(up=Direction(60, UP.rules)))
    assert decide(autoscaler, 0, 10, 1) == 1
    assert decide(autoscaler, 15, 80, 1) == 1
    assert decide(autoscaler, 60, 50, 1) == 5


def test_ten_percent_a_minute_are_rounded_as_in_kubernetes() -> None:
    # Given the example of its documentation: of 80 go 8, of 72 go 7.2, rounded up to 8
    down = Direction(0, (Rule("Percent", 10, 60), Rule("Pods", 4, 60)))
    autoscaler = Autoscaler(policy(down=down))
    assert decide(autoscaler, 0, 10, 80) == 72
    assert decide(autoscaler, 15, 10, 72) == 72
    assert decide(autoscaler, 60, 10, 72) == 64
    # And of fewer than forty, four
    assert decide(Autoscaler(policy(down=down)), 0, 10, 20) == 16


def test_up_is_bound_by_pods_or_percent_whichever_allows_more() -> None:
    up = Direction(0, (Rule("Pods", 4, 60), Rule("Percent", 100, 60)))
    assert decide(Autoscaler(policy(up=up)), 0, 500, 1) == 5
    autoscaler = Autoscaler(policy(up=up))
    assert decide(autoscaler, 0, 5000, 10) == 20
    assert decide(autoscaler, 45, 5000, 20) == 20
    assert decide(autoscaler, 60, 5000, 20) == 40
    assert decide(autoscaler, 120, 5000, 40) == 80
    assert decide(autoscaler, 180, 5000, 80) == 100


def test_keda_wakes_what_sleeps_and_puts_it_to_sleep_after_the_cool_down() -> None:
    autoscaler = Autoscaler(policy(min_replicas=0, polling_s=15, cooldown_s=600))
    assert decide(autoscaler, 0, 0, 0) == 0
    assert decide(autoscaler, 15, 1, 0) == 1
    assert decide(autoscaler, 30, 5, 1) == 1
    assert decide(autoscaler, 45, 0, 1) == 1
    assert decide(autoscaler, 630, 0, 1) == 1
    assert decide(autoscaler, 645, 0, 1) == 0
    # And what is not scaled to zero keeps its least
    assert decide(Autoscaler(policy(down=Direction(0, DOWN.rules))), 0, 0, 2) == 1


def test_what_is_simulated_is_what_is_deployed(tmp_path: Path) -> None:
    # Given the ScaledObject
    deployed = yaml.safe_load(scaling.SCALED.read_text())
    found = read(scaling.SCALED)
    thresholds = {t["name"]: float(t["metadata"]["threshold"]) for t in deployed["spec"]["triggers"]}
    assert {trigger.name: trigger.threshold for trigger in found.triggers} == thresholds
    # Then each of its triggers is simulated, and swept around its value
    fleet = Fleet(demand(np.ones(1), np.ones(1)), ONE_BY_ONE, 1)
    assert thresholds.keys() <= fleet.signals().keys()
    for name, threshold in thresholds.items():
        assert threshold in scaling.SWEPT[name]
    assert found.down.window_s in scaling.SWEPT["scale-down window"]
    # And a change of the file is a change of the simulation
    deployed["spec"]["triggers"][0]["metadata"]["threshold"] = "77"
    deployed["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]["policies"][0]["value"] = 33
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(deployed))
    other = read(tmp_path / "other.yaml")
    assert other.triggers[0].threshold == 77
    assert other.down.rules[0] == Rule("Percent", 33, 60)


def test_a_day_is_the_same_each_time_and_as_busy_as_asked() -> None:
    one, again, another = (day(np.random.default_rng(seed), 20.0, (800, 400)) for seed in (1, 1, 2))
    assert np.array_equal(one.arrivals, again.arrivals)
    assert len(one.arrivals) != len(another.arrivals)
    assert np.all(np.diff(one.arrivals) >= 0)
    minutes, _ = np.histogram(one.arrivals, np.arange(0, 86460, 60))
    assert minutes.max() / 60 == pytest.approx(20, rel=0.1)
    early = one.prompts[one.arrivals < 16 * 3600]
    assert early.mean() == pytest.approx(800, rel=0.05)
    assert one.answers.mean() == pytest.approx(400, rel=0.05)


def test_waves_come_twice_and_the_second_asks_short_questions() -> None:
    of = waves(np.random.default_rng(1), 20.0, (800, 400))
    halves, _ = np.histogram(of.arrivals, np.arange(0, 5.5, 0.5) * 3600)
    assert halves / 1800 == pytest.approx([1, 1, 20, 1, 1, 1, 1, 20, 1, 1], rel=0.1)
    second = (of.arrivals >= 3.5 * 3600) & (of.arrivals < 4 * 3600)
    assert of.prompts[second].mean() == pytest.approx(80, rel=0.05)
    assert of.prompts[~second].mean() == pytest.approx(800, rel=0.05)


def test_a_day_ends_with_every_job_accounted_for() -> None:
    gpu = Gpu(64, 20_000, 2_000, 120)
    of = day(np.random.default_rng(1), 10.0, (800, 400), hours=3)
    outcome = scaling.simulate(of, gpu, read(scaling.SCALED), 1)
    figures = outcome.figures()
    assert figures["jobs"] == len(of.arrivals)
    assert figures["refused"] < figures["jobs"] / 10
    needed = gpu.gpu_seconds(of.prompts, of.answers).sum() / 3600
    assert needed < figures["gpu_hours"] < 10 * needed
