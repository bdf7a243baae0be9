"""Spot machines, and machines on demand when EC2 has none: the provider that ``ray_cluster.yaml`` names.

Ray's autoscaler asks for ever for a machine that EC2 refuses, and for no other: it turns from a node type only when a
machine of it does not come up. So the fallback is below the autoscaler, where machines are bought. Ray loads this
module by its name, on the user's machine and on the head; nothing here imports it, for it needs boto3.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME, TAG_RAY_USER_NODE_TYPE

logger = logging.getLogger(__name__)

# Key of a node_config: how many machines of its type may run on demand at a time. It is there and not under `provider`
# because the autoscaler reads node types anew before each launch, but the provider only when it starts.
FALLBACK = "OnDemandFallback"
# EC2's words for "none now". Not among them: a quota that is too small (MaxSpotInstanceCountExceeded and others), since
# machines at the full price would hide what is to be put right.
NO_SPOT = frozenset({"InsufficientInstanceCapacity", "UnfulfillableCapacity", "SpotMaxPriceTooLow"})
# On machines bought on demand in place of spot ones.
TAGS = {"market": "on-demand"}
# EC2 may list a machine only seconds after it was bought; it counts from the start.
LISTED_AFTER_S = 60.0

# Ray gives providers that are not its own two empty fields by default, and warns of them whenever it reads the
# configuration: on the head every 5 s, which would drown the log.
logging.getLogger("ray.autoscaler._private.util").addFilter(
    lambda record: not str(record.msg).startswith("Dropping the empty legacy field")
)


class SpotFirst(AWSNodeProvider):
    """Ray's provider for AWS, but a spot launch that EC2 refuses for want of capacity is made on demand.

    Node types say in their ``node_config`` how many machines may run like that at a time (``OnDemandFallback``, none by
    default). What runs is counted by tags on EC2, so that a new head, or a new autoscaler, knows it too. Give it
    ``cache_stopped_nodes: false``: stopped machines are not counted.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        # Held from the count to the purchase, for Ray launches from several threads.
        self._buying = threading.Lock()
        # Machine → its type, and when it was bought (monotonic, seconds).
        self._bought: dict[str, tuple[str, float]] = {}

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Start ``count`` machines of one type, on spot or else on demand.

        Returns:
            Machine's id → machine.

        Raises:
            NodeLaunchException: EC2's refusal, unless all machines that it refused were bought on demand. If some were,
                Ray finds those by their tags, and asks again for the others alone.
        """
        config = dict(node_config)
        most = int(config.pop(FALLBACK, 0))
        try:
            return dict(super().create_node(config, tags, count))
        except NodeLaunchException as refusal:
            if not _no_spot(refusal):
                raise
            config.pop("InstanceMarketOptions", None)
            bought = self._buy(config, tags, count, most, refusal.category)
            if len(bought) < count:
                raise
            return bought

    def _buy(self, config: dict[str, Any], tags: dict[str, str], count: int, most: int, why: str) -> dict[str, Any]:
        """Start up to ``count`` machines on demand, so that no more than ``most`` of the type run."""
        node_type = tags.get(TAG_RAY_USER_NODE_TYPE, "")
        with self._buying:
            room = min(count, most - len(self._on_demand(node_type))) if most > 0 else 0
            if room <= 0:
                return {}
            logger.warning(
                "EC2 refuses spot machines for %s in all zones (%s): starting %d of %d on demand, at most %d at once.",
                node_type,
                why,
                room,
                count,
                most,
            )
            bought = dict(super().create_node(config, {**tags, **TAGS}, room))
            self._bought |= dict.fromkeys(bought, (node_type, time.monotonic()))
            return bought

    def _on_demand(self, node_type: str) -> set[str]:
        """Ids of the machines of a type that run in place of spot ones."""
        wanted = {TAG_RAY_CLUSTER_NAME: self.cluster_name, TAG_RAY_USER_NODE_TYPE: node_type, **TAGS}
        filters = [{"Name": f"tag:{key}", "Values": [value]} for key, value in wanted.items()]
        filters.append({"Name": "instance-state-name", "Values": ["pending", "running"]})
        unlisted = time.monotonic() - LISTED_AFTER_S
        self._bought = {machine: bought for machine, bought in self._bought.items() if bought[1] > unlisted}
        recent = {machine for machine, (kind, _) in self._bought.items() if kind == node_type}
        return recent | {machine.id for machine in self.ec2.instances.filter(Filters=filters)}


def _no_spot(refusal: NodeLaunchException) -> bool:
    """Whether EC2 has no such spot machine now; Ray reports the refusal of the last zone that it tried.

    That zone may be one that has no machine of the type at all, which says nothing against the others.
    """
    not_here = refusal.category == "Unsupported" and "Availability Zone" in refusal.description
    return not_here or refusal.category in NO_SPOT
