"""Who may talk to whom, as the NetworkPolicies of each overlay have it: the flows that are needed, and no other."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deploy.manifests import Manifest, of_kind, overlays, pods, render, selects

HERE = "qwen3"


@dataclass(frozen=True)
class End:
    """Somebody who talks or is talked to. Outside the cluster: `address`, without namespace."""

    namespace: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    address: str = ""


def end(namespace: str, **labels: str) -> End:
    return End(namespace, tuple((name.replace("__", "/").replace("_", "."), value) for name, value in labels.items()))


# What operators and others start, by the labels that these give it.
OTHERS = {
    "broker": end(HERE, app_kubernetes_io__name="rabbitmq"),
    "database": End(HERE, (("cnpg.io/cluster", "postgres"),)),
    "ingress": end("nginx-ingress"),
    "prometheus": end("monitoring"),
    "database operator": end("cnpg-system"),
    "names": End("kube-system", (("k8s-app", "kube-dns"),)),
    "stranger": end("default"),
    "bystander": end(HERE, app_kubernetes_io__name="bystander"),
    "hub": End(address="18.155.68.44"),
    "machine beside the cluster": End(address="10.1.2.3"),
}
PORTS = (53, 80, 443, 4369, 5432, 5672, 6443, 8000, 9100, 9187, 15672, 15692, 25672, 35672, 35682, 35683)

OURS = ("server", "chat", "embedding", "archive")
ANYWHERE = ("hub", "machine beside the cluster", "stranger", "ingress", "prometheus", "database operator", "names")
NEEDED = {
    ("ingress", "server", 8000),
    ("prometheus", "server", 8000),
    *(("prometheus", worker, 9100) for worker in OURS[1:]),
    ("prometheus", "broker", 15692),
    ("prometheus", "database", 9187),
    *((ours, "broker", 5672) for ours in OURS),
    *((ours, "database", 5432) for ours in ("server", "archive", "migrate")),
    ("database operator", "database", 5432),
    ("database operator", "database", 8000),
    *(("broker", "broker", port) for port in (4369, 25672, 35672, 35682)),
    *(("database", "database", port) for port in (5432, 8000)),
    # The Kubernetes API and the store of backups have no address that is known beforehand.
    *(("database", other, port) for other in ANYWHERE for port in (443, 6443)),
    ("download", "hub", 443),
    *((ours, "names", 53) for ours in (*OURS, "migrate", "download", "broker", "database", "bystander")),
}


def ends(manifests: list[Manifest]) -> dict[str, End]:
    found = dict(OTHERS)
    for pod in pods(manifests).values():
        labels = pod["metadata"]["labels"]
        found[labels["app.kubernetes.io/name"]] = End(HERE, tuple(sorted(labels.items())))
    return found


def _is(peer: Manifest, other: End) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        if not other.address:
            return False
        address = ipaddress.ip_address(other.address)
        inside = address in ipaddress.ip_network(block["cidr"])
        return inside and not any(address in ipaddress.ip_network(part) for part in block.get("except", []))
    if other.address:
        return False
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace}):
            return False
    elif other.namespace != HERE:
        return False
    return selects(peer.get("podSelector", {}), dict(other.labels))


def _allows(rules: list[Manifest], side: str, other: End, port: int) -> bool:
    for rule in rules:
        peers, ports = rule.get(side), rule.get("ports")
        if peers is not None and not any(_is(peer, other) for peer in peers):
            continue
        if ports is None or any(p["port"] <= port <= p.get("endPort", p["port"]) for p in ports):
            return True
    return False


def allowed(policies: list[Manifest], source: End, target: End, port: int) -> bool:
    """Over TCP, which all but some questions for names are."""
    for who, other, direction, side in ((source, target, "Egress", "to"), (target, source, "Ingress", "from")):
        if who.namespace != HERE:
            continue
        mine = [p["spec"] for p in policies if selects(p["spec"]["podSelector"], dict(who.labels))]
        mine = [policy for policy in mine if direction in policy["policyTypes"]]
        if mine and not any(_allows(p.get(direction.lower(), []), side, other, port) for p in mine):
            return False
    return True


@pytest.mark.parametrize("overlay", overlays(), ids=lambda path: path.name)
def test_who_may_talk_to_whom(overlay: Path) -> None:
    manifests = render(overlay)
    policies, known = of_kind(manifests, "NetworkPolicy"), ends(manifests)
    open_ = {
        (source, target, port)
        for source, a in known.items()
        for target, b in known.items()
        for port in PORTS
        if HERE in (a.namespace, b.namespace) and allowed(policies, a, b, port)
    }
    assert open_ - NEEDED == set()
    assert NEEDED - open_ == set()


@pytest.mark.parametrize("overlay", overlays(), ids=lambda path: path.name)
def test_policies_are_of_the_kind_that_is_understood_here(overlay: Path) -> None:
    policies = of_kind(render(overlay), "NetworkPolicy")
    everybody = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert everybody in [policy["spec"] for policy in policies], "what no other policy chooses may do nothing"
    for policy in policies:
        assert policy["metadata"]["namespace"] == HERE
        for rule in [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]:
            assert rule.get("ports"), f"{policy['metadata']['name']}: a rule without ports allows all of them"
            for port in rule["ports"]:
                assert set(port) <= {"port", "endPort", "protocol"}
                assert isinstance(port["port"], int)
