"""What KEDA and Kubernetes' HorizontalPodAutoscaler make of metrics: how many replicas there are to be.

The algorithm is that of kube-controller-manager (`pkg/controller/podautoscaler`: the largest answer of all metrics, its
tolerance, the stabilisation windows and the policies of `behavior`) and of KEDA's executor (activation from zero, and
back to zero after the cool-down). Reads a ScaledObject as it is deployed. Knows no queue and no GPU.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

SYNC_S = 15.0
"""How often the HorizontalPodAutoscaler looks: --horizontal-pod-autoscaler-sync-period."""
TOLERANCE = 0.1
"""--horizontal-pod-autoscaler-tolerance."""

Kind = Literal["AverageValue", "Value", "Utilization"]
"""How a metric's value is to be read: divided by the replicas, as it is, or as a mean of the ready pods."""


@dataclass(frozen=True, slots=True)
class Trigger:
    name: str
    kind: Kind
    threshold: float
    activation: float = 0.0


@dataclass(frozen=True, slots=True)
class Rule:
    """Within `period_s`, so many pods or so many percent at the most."""

    kind: Literal["Pods", "Percent"]
    value: int
    period_s: float


@dataclass(frozen=True, slots=True)
class Direction:
    window_s: float
    rules: tuple[Rule, ...]


# What Kubernetes takes where a `behavior` says nothing.
UP = Direction(0, (Rule("Pods", 4, 15), Rule("Percent", 100, 15)))
DOWN = Direction(300, (Rule("Percent", 100, 15),))


@dataclass(frozen=True, slots=True)
class Policy:
    """Of `min_replicas` 0 KEDA itself makes the step to the first and from the last replica."""

    triggers: tuple[Trigger, ...]
    min_replicas: int = 1
    max_replicas: int = 100
    up: Direction = UP
    down: Direction = DOWN
    polling_s: float = 30.0
    cooldown_s: float = 300.0


def read(path: Path) -> Policy:
    """The policy of a ScaledObject."""
    spec = yaml.safe_load(path.read_text())["spec"]
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    return Policy(
        triggers=tuple(_trigger(trigger) for trigger in spec["triggers"]),
        min_replicas=spec["minReplicaCount"],
        max_replicas=spec["maxReplicaCount"],
        up=_direction(behavior["scaleUp"]),
        down=_direction(behavior["scaleDown"]),
        polling_s=spec["pollingInterval"],
        cooldown_s=spec["cooldownPeriod"],
    )


def _trigger(given: dict[str, Any]) -> Trigger:
    metadata = given["metadata"]
    activation = float(metadata.get("activationThreshold", 0))
    return Trigger(given["name"], given["metricType"], float(metadata["threshold"]), activation)


def _direction(given: dict[str, Any]) -> Direction:
    if given["selectPolicy"] != "Max":
        raise ValueError(f"selectPolicy {given['selectPolicy']} is not simulated")
    rules = tuple(Rule(rule["type"], rule["value"], rule["periodSeconds"]) for rule in given["policies"])
    return Direction(given["stabilizationWindowSeconds"], rules)


@dataclass(slots=True)
class Autoscaler:
    """Decides every SYNC_S. `_said` are its recommendations, `_changes` what was done, by when."""

    policy: Policy
    _said: list[tuple[float, int]] = field(default_factory=list)
    _changes: list[tuple[float, int]] = field(default_factory=list)
    _active_at: float = 0.0
    _polled_at: float = -math.inf

    def decide(self, now: float, values: dict[str, float], replicas: int, ready: int) -> int:
        """How many replicas there are to be, of so many, of which so many are ready."""
        if self.policy.min_replicas == 0 and now - self._polled_at >= self.policy.polling_s:
            self._polled_at = now
            if any(values[trigger.name] > trigger.activation for trigger in self.policy.triggers):
                self._active_at = now
                replicas_or_one = max(replicas, 1)
                if replicas == 0:
                    return replicas_or_one
            elif now - self._active_at > self.policy.cooldown_s:
                return 0
        if replicas == 0:
            return 0
        wanted = max(_wanted(trigger, values[trigger.name], replicas, ready) for trigger in self.policy.triggers)
        allowed = self._limit(now, self._stabilise(now, wanted, replicas), replicas)
        if allowed != replicas:
            self._changes.append((now, allowed - replicas))
        return allowed

    def _stabilise(self, now: float, wanted: int, replicas: int) -> int:
        """Up only as far as all that was said lately allows, down no further than any of it."""
        up, down = self.policy.up.window_s, self.policy.down.window_s
        self._said = [(at, said) for at, said in self._said if now - at < max(up, down)]
        least = min([wanted, *(said for at, said in self._said if now - at < up)])
        most = max([wanted, *(said for at, said in self._said if now - at < down)])
        self._said.append((now, wanted))
        return min(max(replicas, least), most)

    def _limit(self, now: float, wanted: int, replicas: int) -> int:
        policy = self.policy
        if wanted > replicas:
            steps = (_after(rule, self._before(now, rule, replicas), +1) for rule in policy.up.rules)
            return min(wanted, max(*steps, replicas), max(policy.max_replicas, replicas))
        if wanted < replicas:
            steps = (_after(rule, self._before(now, rule, replicas), -1) for rule in policy.down.rules)
            return max(wanted, min(*steps, replicas), min(max(policy.min_replicas, 1), replicas))
        return replicas

    def _before(self, now: float, rule: Rule, replicas: int) -> int:
        """How many there were when the rule's period began."""
        self._changes = [(at, change) for at, change in self._changes if now - at < 3600]
        return replicas - sum(change for at, change in self._changes if now - at < rule.period_s)


def _wanted(trigger: Trigger, value: float, replicas: int, ready: int) -> int:
    if trigger.kind == "AverageValue":
        if abs(1 - value / (trigger.threshold * replicas)) <= TOLERANCE:
            return replicas
        return _ceil(value / trigger.threshold)
    ratio = value / trigger.threshold
    if trigger.kind == "Utilization" and ready < replicas and ratio > 1:
        # Those that start count as idle, and nothing is done where that turns the answer around.
        ratio *= ready / replicas
        return replicas if ratio <= 1 + TOLERANCE else _ceil(ratio * replicas)
    if abs(1 - ratio) <= TOLERANCE:
        return replicas
    return _ceil(ratio * ready)


def _after(rule: Rule, before: int, sign: int) -> int:
    if rule.kind == "Pods":
        return before + sign * rule.value
    changed = before * (1 + sign * rule.value / 100)
    return _ceil(changed) if sign > 0 else int(changed)


def _ceil(value: float) -> int:
    """Up to a millionth, so that 2.4 / 0.8 is 3; Kubernetes counts in thousandths."""
    return math.ceil(value - 1e-6)
