"""What commands in deploy/README.md name: objects, namespaces, conditions, options and ports that there are."""

import functools
import re
import shlex
import subprocess

from tests.deploy.guide import Call, Walk, kubectls
from tests.deploy.manifests import ROOT, kubectl, name_of, of_kind

KINDS = {
    "deployment": "Deployment",
    "job": "Job",
    "service": "Service",
    "rabbitmqcluster": "RabbitmqCluster",
    "cluster.postgresql.cnpg.io": "Cluster",
    "backup.postgresql.cnpg.io": "Backup",
}
"""What is named as KIND/NAME."""
CONDITIONS = {
    "deployment": "Available",
    "job": "complete",
    "rabbitmqcluster": "AllReplicasReady",
    "cluster.postgresql.cnpg.io": "Ready",
}
"""What each kind says of itself once it is there: Kubernetes' own, and those that the operators set."""
SUBCOMMANDS = {
    *("apply", "create", "delete", "deployment", "describe", "diff", "exec", "expose", "generic", "get"),
    *("kustomize", "logs", "port-forward", "restart", "rollout", "scale", "secret", "status", "tls", "undo", "wait"),
}


def test_what_commands_name_is_there(walk: Walk) -> None:
    known = {name_of(m) for state in walk.applied("mine") for m in state}
    known |= {name_of(m) for call in walk.calls for m in call.stdin}
    labels = {f"{k}={v}" for state in walk.applied("mine") for m in state for k, v in m["metadata"]["labels"].items()}
    known |= {"Service/postgres-rw"}  # CloudNativePG's, of its Cluster `postgres`
    known |= {f"Deployment/{call.argv[-2]}" for call in walk.of("kubectl", "create", "deployment")}
    # And those by which policies know what operators make
    policies = [m for state in walk.applied("mine") for m in of_kind(state, "NetworkPolicy")]
    labels |= {f"{k}={v}" for m in policies for k, v in m["spec"]["podSelector"].get("matchLabels", {}).items()}
    namespaces = {"qwen3", "cert-manager", "rabbitmq-system", "cnpg-system", "nginx-ingress", "monitoring"}
    checked = 0
    for argv in kubectls(walk):
        call = Call(argv)
        assert call.option("-n") in {"", *namespaces}, argv
        for label in filter(None, [call.option("-l")]):
            assert label in labels, argv
        for word in argv:
            if match := re.fullmatch(r"([a-z.]+)/([a-z0-9.-]+)", word):
                assert f"{KINDS[match[1]]}/{match[2]}" in known, f"{shlex.join(argv)}: there is no {word}"
                checked += 1
    assert checked > 30


def test_what_is_waited_for_will_be(walk: Walk) -> None:
    waited = 0
    for argv in kubectls(walk):
        for condition in re.findall(r"--for=condition=(\S+)", shlex.join(argv)):
            kind = next(CONDITIONS[word.partition("/")[0]] for word in argv if word.partition("/")[0] in CONDITIONS)
            assert condition == kind, shlex.join(argv)
            waited += 1
    assert waited > 15


def test_kubectl_has_each_option(walk: Walk) -> None:
    for argv in kubectls(walk):
        until = argv.index("--") if "--" in argv else len(argv)
        given = {word.partition("=")[0] for word in argv[1:until] if re.match(r"-{1,2}[a-z]", word)}
        words = [word for word in argv[1:until] if word in SUBCOMMANDS]
        assert words, shlex.join(argv)
        assert given <= _options(*words), shlex.join(argv)


@functools.cache
def _options(*words: str) -> frozenset[str]:
    """Those of one of kubectl's commands, by its own help."""
    told = [
        subprocess.run([kubectl(), *command], capture_output=True, text=True, check=True).stdout
        for command in ([*words, "--help"], ["options"])
    ]
    found = re.findall(r"^ +(?:(-\w), )?(--[a-z-]+)[=:]", "\n".join(told), re.MULTILINE)
    return frozenset(option for pair in found for option in pair if option)


def test_the_port_that_is_forwarded_is_the_services(walk: Walk) -> None:
    (service,) = of_kind(walk.applied("mine")[0], "Service")
    forwarded = {
        word
        for call in walk.of("kubectl", "port-forward", "service/server")
        for word in call.argv
        if re.fullmatch(r"\d+:\d+", word)
    }
    assert {int(ports.partition(":")[2]) for ports in forwarded} == {port["port"] for port in service["spec"]["ports"]}
    asked = {match for call in walk.of("curl") for match in re.findall(r"127\.0\.0\.1:(\d+)", shlex.join(call.argv))}
    assert {ports.partition(":")[0] for ports in forwarded} == asked


def test_a_roll_back_leaves_the_stores_as_they_are(walk: Walk) -> None:
    back, kept = (call.argv for call in walk.of("git", "checkout"))
    assert len(back) == 3, "all files"
    (folder,) = kept[kept.index("--") + 1 :]
    images = [
        path for path in (ROOT / folder).glob("*.yaml") if re.search(r"^  image(Name)?: ", path.read_text(), re.M)
    ]
    assert len(images) == 2
    # And nothing that lies over them has another one
    for manifest in of_kind(walk.applied("mine")[0], "RabbitmqCluster", "Cluster"):
        image = manifest["spec"].get("image") or manifest["spec"]["imageName"]
        assert any(image in path.read_text() for path in images), name_of(manifest)
