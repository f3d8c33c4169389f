"""What our rules read of RabbitMQ, CloudNativePG and the kubelet, from their sources: no stack here exports it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Foreign:
    source: str
    labels: frozenset[str] = frozenset()
    """Its own. Prometheus gives each besides `job`, as a PodMonitor says, `pod` and `namespace`."""


_RABBITMQ = "RabbitMQ 4.3.4, deps/rabbitmq_prometheus/src/collectors/prometheus_rabbitmq_"
_CNPG = "CloudNativePG 1.30, config/manager/default-monitoring.yaml, query "
_BARMAN = "Barman Cloud plugin 0.14.0, internal/cnpgi/instance/metrics.go"
_KUBELET = "Kubernetes, pkg/kubelet/metrics/collectors/volume_stats.go"

FOREIGN = {
    "rabbitmq_alarms_memory_used_watermark": Foreign(_RABBITMQ + "alarm_metrics_collector.erl"),
    "rabbitmq_alarms_free_disk_space_watermark": Foreign(_RABBITMQ + "alarm_metrics_collector.erl"),
    "rabbitmq_unreachable_cluster_peers_count": Foreign(_RABBITMQ + "dynamic_collector.erl"),
    # At /metrics/detailed?family=ra_metrics
    "rabbitmq_detailed_raft_term": Foreign(_RABBITMQ + "raft_metrics_collector.erl", frozenset({"queue", "vhost"})),
    "cnpg_pg_replication_slots_active": Foreign(
        _CNPG + "pg_replication_slots", frozenset({"slot_name", "slot_type", "database"})
    ),
    "cnpg_pg_replication_in_recovery": Foreign(_CNPG + "pg_replication"),
    "cnpg_pg_stat_archiver_last_failed_time": Foreign(_CNPG + "pg_stat_archiver"),
    "cnpg_pg_stat_archiver_last_archived_time": Foreign(_CNPG + "pg_stat_archiver"),
    # In place of `cnpg_collector_last_…`, which stay at 0 where the plugin makes the backups
    "barman_cloud_cloudnative_pg_io_last_available_backup_timestamp": Foreign(_BARMAN),
    "barman_cloud_cloudnative_pg_io_last_failed_backup_timestamp": Foreign(_BARMAN),
    "kubelet_volume_stats_available_bytes": Foreign(_KUBELET, frozenset({"namespace", "persistentvolumeclaim"})),
    "kubelet_volume_stats_capacity_bytes": Foreign(_KUBELET, frozenset({"namespace", "persistentvolumeclaim"})),
}

PORTS = {"broker": ("prometheus", 15692), "database": ("metrics", 9187)}
"""Of each store's pods, as its operator names it: the cluster operator's internal/resource/statefulset.go, and
CloudNativePG's pkg/specs/pods.go."""

RABBITMQ_SETTINGS = {
    "cluster_partition_handling": {"ignore", "autoheal", "pause_minority"},
    "queue_leader_locator": {"client-local", "balanced"},
    "disk_free_limit.absolute": {"2GB"},
    "quorum_queue.continuous_membership_reconciliation.enabled": {"true", "false"},
    "quorum_queue.continuous_membership_reconciliation.target_group_size": {"3"},
    "quorum_queue.continuous_membership_reconciliation.auto_remove": {"true", "false"},
}
"""Those we set, as deps/rabbit/priv/schema/rabbit.schema of RabbitMQ 4.3.4 has them: it does not start with another."""
