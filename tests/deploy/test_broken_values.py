"""Each check of test_values.py notices what it is there for: one value made wrong in what an overlay renders to."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from tests.deploy import test_values as values
from tests.deploy.manifests import K8S, Manifest, name_of, render
from tests.deploy.test_broken import CONTAINER, put

CHAT, POD = "Deployment/chat-qwen3-0-6b", "spec.template.spec"

WRONG: list[tuple[Callable[..., None], str, str, Any]] = [
    (values.test_nobody_asks_for_more_than_it_may_have, CHAT, f"{CONTAINER}.resources.requests.memory", "32Gi"),
    (values.test_nobody_asks_for_more_than_it_may_have, "Cluster/postgres", "spec.resources.requests.cpu", "4500m"),
    (values.test_volumes_have_a_size, "PersistentVolumeClaim/models", "spec.resources.requests.storage", "50"),
    (values.test_volumes_have_a_size, "RabbitmqCluster/rabbitmq", "spec.persistence.storage", "20"),
    (
        values.test_a_worker_learns_its_model_from_a_label_that_it_has,
        CHAT,
        f"{CONTAINER}.env.0.valueFrom.fieldRef.fieldPath",
        "metadata.labels['qwen3/modle']",
    ),
    (values.test_workers_are_made_for_what_they_may_not_do, CHAT, f"{CONTAINER}.env.4.value", "0"),
    (values.test_workers_are_made_for_what_they_may_not_do, CHAT, f"{CONTAINER}.volumeMounts.3.mountPath", "/shm"),
    (values.test_words_are_those_that_kubernetes_knows, CHAT, f"{POD}.tolerations.0.effect", "NoScheduel"),
    (values.test_words_are_those_that_kubernetes_knows, "Job/migrate", f"{POD}.restartPolicy", "Always"),
    (
        values.test_a_roll_out_takes_no_server_away_before_there_is_another,
        "Deployment/server",
        "spec.strategy.rollingUpdate.maxUnavailable",
        1,
    ),
    (values.test_jobs_end_and_the_guide_waits_as_long, "Job/download", "spec.activeDeadlineSeconds", 600),
    (values.test_jobs_end_and_the_guide_waits_as_long, "Job/migrate", "spec.backoffLimit", 0),
    (
        values.test_the_ingress_has_a_certificate_for_its_host_and_somebody_who_serves_it,
        "Ingress/server",
        "spec.tls.0.hosts",
        ["chat.example.org"],
    ),
    (
        values.test_the_ingress_has_a_certificate_for_its_host_and_somebody_who_serves_it,
        "Ingress/server",
        "spec.ingressClassName",
        "ngnix",
    ),
    (
        values.test_the_ingress_says_nothing_that_is_passed_over,
        "Ingress/server",
        "metadata.annotations",
        {"nginx.org/hstss": "True"},
    ),
    (values.test_backups_are_asked_for_from_who_makes_them, "Cluster/postgres", "spec.plugins.0.name", "barman"),
    (values.test_backups_are_asked_for_from_who_makes_them, "ScheduledBackup/nightly", "spec.schedule", "0 0 25 * * *"),
    (
        values.test_postgres_knows_its_parameters,
        "Cluster/postgres",
        "spec.postgresql.parameters.effective_cache_sise",
        "6GB",
    ),
    (
        values.test_postgres_waits_for_a_standby_that_there_is,
        "Cluster/postgres",
        "spec.postgresql.synchronous.number",
        3,
    ),
    (
        values.test_a_new_database_has_the_extension_that_the_tables_need,
        "Cluster/postgres",
        "spec.bootstrap.initdb.postInitApplicationSQL",
        ["CREATE EXTENSION IF NOT EXISTS pgvector"],
    ),
    (
        values.test_rabbitmq_knows_its_settings,
        "RabbitmqCluster/rabbitmq",
        "spec.rabbitmq.additionalConfig",
        "queue_leader_locatr = balanced\n",
    ),
]


@pytest.mark.parametrize(
    ("check", "name", "path", "value"), WRONG, ids=[f"{w[1]} {w[2].split('.')[-1]}" for w in WRONG]
)
def test_a_wrong_value_is_found(check: Callable[..., None], name: str, path: str, value: object) -> None:
    # Given what passes
    manifests: list[Manifest] = copy.deepcopy(render(K8S / "overlays" / "multi-gpu"))
    check(manifests)
    # When one value is wrong, then it does not
    (wrong,) = (manifest for manifest in manifests if name_of(manifest) == name)
    put(wrong, path, value)
    with pytest.raises((AssertionError, AttributeError, KeyError, ValueError)):
        check(manifests)


def test_each_check_is_tried() -> None:
    checks = [f for name, f in vars(values).items() if name.startswith("test_")]
    assert {check for check in checks if "manifests" in inspect.signature(check).parameters} == {w[0] for w in WRONG}
