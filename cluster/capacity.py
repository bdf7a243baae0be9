"""How large the cluster is, and how large its autoscaler may make it.

Whether work fits, and how many actors it gets, is asked of the cluster at its full size: one that starts as a head
without CPUs, and gets nodes because work waits, has room for the work all the same.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import redact

log = logging.getLogger("prism")
HEAD_RESOURCE = "node:__internal_head__"
# Where Kubernetes tells a pod its namespace.
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
# Of a type without a bound.
UNBOUNDED = 10_000


@dataclass(frozen=True)
class Node:
    """What one node offers.

    Attributes:
        cpus, gpus: logical ones.
        memory: bytes; infinite where nobody says.
    """

    cpus: float = 0.0
    gpus: float = 0.0
    memory: float = math.inf

    def room(self, cpus: float, gpus: float) -> int:
        """How many workers that ask for so much find place, at most 10,000; Ray spreads none over several GPUs."""
        on_gpus = math.inf
        if gpus:
            on_gpus = self.gpus // gpus if gpus >= 1 else self.gpus * ((1 + 1e-6) // gpus)
        return int(min((self.cpus + 1e-6) // cpus if cpus else math.inf, on_gpus, UNBOUNDED))


@dataclass(frozen=True)
class Growth:
    """What an autoscaler may start.

    Attributes:
        types: node → how many of it.
        most: nodes of all types together, those that run included.
    """

    types: tuple[tuple[Node, int], ...]
    most: int


@dataclass(frozen=True)
class Capacity:
    """A cluster at its full size.

    Attributes:
        fixed: nodes that run, and are not the autoscaler's.
        running: nodes that run, all of them.
        growth: of the workers that an autoscaler starts and ends; those that run now are among them.
    """

    fixed: tuple[Node, ...]
    running: tuple[Node, ...]
    growth: Growth = Growth((), 0)

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return self._best(lambda node: node.cpus)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return self._best(lambda node: node.gpus)

    @property
    def memory(self) -> float:
        """Bytes of all nodes."""
        return self._best(lambda node: node.memory)

    @property
    def nodes(self) -> list[Node]:
        """One of every kind."""
        return [*dict.fromkeys([*self.fixed, *(node for node, count in self.growth.types if count)])]

    @property
    def gpus_to_start_with(self) -> float:
        """GPUs that run now, else those of the smallest node that brings any."""
        now = sum(node.gpus for node in self.running)
        return now or min((node.gpus for node in self.nodes if node.gpus), default=0.0)

    def room(self, cpus: float, gpus: float) -> int:
        """How many workers that ask for so much find place."""
        return int(self._best(lambda node: node.room(cpus, gpus)))

    def runs(self, cpus: float, gpus: float) -> bool:
        """Whether a node that can hold such a worker runs now."""
        return any(node.room(cpus, gpus) for node in self.running)

    def _best(self, value: Callable[[Node], float]) -> float:
        """Sum of ``value`` over all nodes, where the autoscaler picks the types that bring the most."""
        total, left = sum(value(node) for node in self.fixed), self.growth.most
        for node, count in sorted(self.growth.types, key=lambda item: -value(item[0])):
            total += value(node) * min(count, left) if min(count, left) else 0
            left -= min(count, left)
        return total


def read_capacity() -> Capacity:
    """Of the cluster of the running session."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    heads = [_node(resources) for resources in alive if HEAD_RESOURCE in resources]
    workers = [_node(resources) for resources in alive if HEAD_RESOURCE not in resources]
    return combine(heads, workers, read_growth())


def combine(heads: list[Node], workers: list[Node], growth: Growth) -> Capacity:
    """A cluster at its full size, which is the same whatever of it runs now.

    Args:
        heads: nodes that no autoscaler ends.
        workers: the others that run; those alike a type that the autoscaler knows are taken for its own.
        growth: what it may start.
    """
    most: Counter[tuple[float, float]] = Counter()
    kinds: dict[tuple[float, float], Node] = {}
    for node, count in growth.types:
        most[node.cpus, node.gpus] += count
        kinds.setdefault((node.cpus, node.gpus), node)
    running = Counter((node.cpus, node.gpus) for node in workers)
    fixed = [*heads, *(node for node in workers if (node.cpus, node.gpus) not in most)]
    types = tuple((kinds[kind], max(count, running[kind])) for kind, count in most.items())
    ours = sum(running[kind] for kind in most)
    return Capacity(tuple(fixed), (*heads, *workers), Growth(types, max(growth.most, ours)))


def _node(resources: dict[str, float]) -> Node:
    cpus, gpus, memory = (float(resources.get(name) or 0) for name in ("CPU", "GPU", "memory"))
    return Node(cpus, gpus, memory or math.inf)


def read_growth() -> Growth:
    """What the running cluster's autoscaler may start; nothing where there is none.

    Ray itself keeps no record of it that every autoscaler writes. So the head is asked, where the autoscaler runs. When
    it does not answer, the log says so, and the nodes that run count alone.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    told = ray._private.state.state.get_cluster_config()
    if told and told.node_group_configs:
        groups = told.node_group_configs
        return Growth(
            tuple((_node(dict(g.resources)), UNBOUNDED if g.max_count < 0 else g.max_count) for g in groups), UNBOUNDED
        )
    context = ray.get_runtime_context()
    head = next((n["NodeID"] for n in ray.nodes() if n["Alive"] and HEAD_RESOURCE in n["Resources"]), None)
    try:
        if head in (None, context.get_node_id()):
            config = autoscaler_config(context.gcs_address)
        else:
            there = NodeAffinitySchedulingStrategy(head, soft=False)
            ask = ray.remote(num_cpus=0, max_retries=0)(autoscaler_config).options(scheduling_strategy=there)
            config = ray.get(ask.remote(context.gcs_address), timeout=120)
    except Exception as error:
        # Files, rights, an API server, another version of this package on the head.
        log.warning(
            "what the cluster's autoscaler may start is not known (%s), so only the nodes that run now count; give "
            "resources.*.actors and gpus if more will come",
            redact(str(error).strip().rpartition("\n")[2] or type(error).__name__),
        )
        return Growth((), 0)
    return growth_of(config) if config else Growth((), 0)


def growth_of(config: dict[str, Any]) -> Growth:
    """What a configuration of Ray's autoscaler lets it start."""
    types = []
    for name, kind in config.get("available_node_types", {}).items():
        if name != config.get("head_node_type"):
            count = kind.get("max_workers", config.get("max_workers", UNBOUNDED))
            types.append((_node(kind.get("resources", {})), int(count)))
    return Growth(tuple(types), int(config.get("max_workers", sum(count for _, count in types))))


def autoscaler_config(gcs_address: str) -> dict[str, Any] | None:
    """On the head: the configuration that the cluster's autoscaler works with.

    Args:
        gcs_address: of the cluster, host:port; a machine may have several.

    Returns:
        None: it has none.

    Raises:
        Exception: of the file's reader or of the API server.
    """
    return _of_monitor(gcs_address.rpartition(":")[2]) or _of_kuberay()


def _of_monitor(port: str) -> dict[str, Any] | None:
    """The cluster launcher's, from the command line of the autoscaler's process."""
    import psutil  # comes with ray, hence needs it imported

    for process in psutil.process_iter():
        words: list[str] = []
        with contextlib.suppress(psutil.Error, OSError):
            words = process.cmdline()
        given = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
        file = given.get("--autoscaling-config")
        monitor = any(os.path.basename(word) == "monitor.py" for word in words)
        if file and monitor and given.get("--gcs-address", "").endswith(f":{port}"):
            config = yaml.safe_load(Path(file).expanduser().read_text())
            return config if isinstance(config, dict) else None
    return None


def _of_kuberay() -> dict[str, Any] | None:
    """KubeRay's, whose autoscaler runs in another container of the head's pod and reads the RayCluster object."""
    name = os.environ.get("RAY_CLUSTER_NAME")
    if not name or not NAMESPACE_FILE.exists():
        return None
    from ray.autoscaler._private.kuberay import autoscaling_config, node_provider

    client = node_provider.KubernetesHttpApiClient(namespace=NAMESPACE_FILE.read_text().strip())
    cluster = client.get(f"rayclusters/{name}")
    if cluster["spec"].get("enableInTreeAutoscaling"):
        return dict(autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster))
    return None
