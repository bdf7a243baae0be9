#!/usr/bin/env bash
# Runs beside Ray on the worker machines of ray_cluster.yaml and does what nothing in Ray does:
# - EC2 announces the end of a spot machine on its metadata service two minutes ahead. A raylet that is shut down kills
#   its workers at once, so they are told here: units keep their state and move elsewhere.
# - When the head is lost, the raylets end, but their machines would run and cost for ever. A machine without a raylet
#   for 15 minutes shuts itself down, which terminates it (InstanceInitiatedShutdownBehavior).
# Argument: the Python that has this package.
set -u
metadata=http://169.254.169.254/latest
without=0
while sleep 5; do
    token=$(curl -sf -m 2 -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" "$metadata/api/token")
    if curl -sf -m 2 -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/spot/instance-action"; then
        exec "$1" -m cluster.preemption --timeout 100
    fi
    # `ray up` restarts Ray within seconds; the installation of another version is done before Ray stops.
    if pgrep -x raylet > /dev/null; then without=0; else without=$((without + 1)); fi
    if ((without >= 180)); then
        exec sudo shutdown -h now
    fi
done
