"""What is wrong with a machine or a cluster, told from facts about it.

Pure functions: ``cluster.facts`` gathers what they judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from pydantic import BaseModel

Level = Literal["ok", "warning", "problem"]

# Ray itself warns below it; every worker takes some files and connections, and so does an object store's client.
MIN_OPEN_FILES = 4096
# Leases and time-outs do not compare clocks; S3 refuses requests that are 15 minutes off, tokens end by the clock.
CLOCK_WARNING_S, CLOCK_PROBLEM_S = 5.0, 300.0
# Ray puts nothing more on a disk that is fuller (RAY_local_fs_capacity_threshold).
DISK_FULL = 0.95
MIN_DISK_BYTES = 10 * 2**30


class Finding(BaseModel):
    """The outcome of one check, a line for the user.

    Attributes:
        level: ``problem``: a run will fail or be wrong; ``warning``: it may, or will be slow.
        check: what was looked at.
        text: what was found.
        remedy: what to do; empty where nothing is to be done.
    """

    level: Level
    check: str
    text: str
    remedy: str = ""


class NodeFacts(BaseModel):
    """A machine, as a worker on it sees it.

    Attributes:
        node: name or address.
        versions: python, ray, torch, prism.
        ray_gpus: GPUs that Ray counts on it.
        gpus: devices that its driver has.
        torch_gpus: devices that torch can use; None: not asked, since there is none.
        torch_cuda: CUDA version torch was built for; empty for a build without.
        object_store_bytes: of Ray on this node.
        shm_bytes: size of ``/dev/shm``; None where the system has none.
        open_files: soft limit of a process.
        clock_offset_s: its clock minus the driver's.
        clock_error_s: by which that may be wrong.
        disk: folder of Ray's files.
        disk_bytes, disk_free_bytes: of the disk that holds it.
        storage: place → why the node cannot use it, empty where it can.
    """

    node: str
    versions: dict[str, str]
    ray_gpus: float = 0
    gpus: int = 0
    torch_gpus: int | None = None
    torch_cuda: str = ""
    object_store_bytes: int = 0
    shm_bytes: int | None = None
    open_files: int = 2**20
    clock_offset_s: float = 0
    clock_error_s: float = 0
    disk: str = "/tmp"
    disk_bytes: int = 2**40
    disk_free_bytes: int = 2**40
    storage: dict[str, str] = {}


def check_versions(driver: dict[str, str], nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Driver and workers run the same code: results depend on it, and pickled stages cross between them."""
    out = []
    for name, here in driver.items():
        others: dict[str, list[str]] = {}
        for node in nodes:
            if node.versions.get(name) != here:
                others.setdefault(node.versions.get(name, "nothing"), []).append(node.node)
        for there, where in others.items():
            # Third numbers of Python are compatible.
            minor = name == "python" and there.split(".")[:2] == here.split(".")[:2]
            out.append(
                Finding(
                    level="warning" if minor else "problem",
                    check="versions",
                    text=f"{name} is {here} in the driver and {there} on {_some(where)}",
                    remedy="install the same constraints.txt on every node and where the driver runs",
                )
            )
    text = ", ".join(f"{name} {version}" for name, version in driver.items())
    return out or [Finding(level="ok", check="versions", text=f"{text} everywhere")]


def check_gpus(nodes: Sequence[NodeFacts], wanted: Sequence[str], most: float = 0.0) -> list[Finding]:
    """Devices are seen by the driver of the machine, by torch, and by Ray.

    Args:
        nodes: of the cluster.
        wanted: fields of the configuration that ask for a GPU.
        most: GPUs of the cluster at its full size, those that an autoscaler may start included.
    """
    out = []
    for node in nodes:
        has, sees = f"{node.node} has {node.gpus} GPUs", f"Ray counts {node.ray_gpus:g} GPUs on {node.node}"
        if node.gpus and not node.torch_cuda:
            remedy = "install the CUDA build of torch there"
            out.append(_problem("gpus", f"{has}, but its PyTorch is a build without CUDA", remedy))
        elif node.gpus and node.torch_gpus is not None and node.torch_gpus < node.gpus:
            remedy = "install an NVIDIA driver for that CUDA version, or free the devices that another process keeps"
            found = f"{has}, but torch (CUDA {node.torch_cuda}) can use {node.torch_gpus}"
            out.append(_problem("gpus", found, remedy))
        if node.gpus and not node.ray_gpus:
            remedy = "unset CUDA_VISIBLE_DEVICES where Ray is started, and start it without --num-gpus=0"
            out.append(_problem("gpus", f"{has}, but Ray sees none of them", remedy))
        elif node.ray_gpus > node.gpus:
            remedy = "start Ray there with the number of GPUs it has"
            out.append(_problem("gpus", f"{sees}, which has {node.gpus}", remedy))
        elif node.ray_gpus < node.gpus:
            remedy = "start Ray there without --num-gpus and CUDA_VISIBLE_DEVICES, if all are meant"
            out.append(_warning("gpus", f"{sees}, which has {node.gpus}", remedy))
    total = sum(node.ray_gpus for node in nodes)
    if wanted and not max(total, most):
        remedy = "take the field out to compute on CPUs, or add a node with a GPU"
        out.append(_problem("gpus", f"Ray has no GPU and can start none, but {_some(wanted)} asks for one", remedy))
    summary = f"{total:g} seen by Ray" if total or most else "none, and none asked for"
    if most > total:
        summary += f", up to {most:g} when work waits for them"
    return out or [Finding(level="ok", check="gpus", text=summary)]


def check_shared_memory(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Ray's object store lies in ``/dev/shm``; where that is too small it moves to the disk, many times slower."""
    out = [
        _problem(
            "shared memory",
            f"/dev/shm of {node.node} has {_size(node.shm_bytes)}, Ray's object store wants "
            f"{_size(node.object_store_bytes)}",
            "start the container with a larger one (docker run --shm-size, an emptyDir of medium Memory at /dev/shm), "
            "or lower resources.session.object_store_mb",
        )
        for node in nodes
        if node.shm_bytes is not None and node.shm_bytes < node.object_store_bytes
    ]
    least = min((node.object_store_bytes for node in nodes), default=0)
    return out or [Finding(level="ok", check="shared memory", text=f"holds the object stores, {_size(least)} or more")]


def check_clocks(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Clocks agree, as far as was measured."""
    out = []
    for node in nodes:
        # What may be the way there and back is not held against the node.
        off = max(0.0, abs(node.clock_offset_s) - node.clock_error_s)
        if off > CLOCK_WARNING_S:
            side = "ahead of" if node.clock_offset_s > 0 else "behind"
            out.append(
                Finding(
                    level="problem" if off > CLOCK_PROBLEM_S else "warning",
                    check="clocks",
                    text=f"the clock of {node.node} is {off:.0f} s {side} the driver's",
                    remedy="turn on time synchronisation (chrony, systemd-timesyncd) there: object stores refuse "
                    "requests with a wrong time, and prism status shows wrong ages",
                )
            )
    worst = max((abs(node.clock_offset_s) for node in nodes), default=0.0)
    return out or [Finding(level="ok", check="clocks", text=f"agree within {max(worst, 0.1):.1f} s")]


def check_open_files(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Limits of open files."""
    low = [node for node in nodes if node.open_files < MIN_OPEN_FILES]
    if not low:
        return [Finding(level="ok", check="open files", text=f"{min(n.open_files for n in nodes):,} or more a process")]
    least = min(node.open_files for node in low)
    return [
        _warning(
            "open files",
            f"a process may open {least:,} files on {_some([node.node for node in low])}",
            "`ulimit -n 65536` before Ray is started there, or LimitNOFILE of its service",
        )
    ]


def check_disks(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Ray's disk has room for spilled objects and logs."""
    out = []
    for node in nodes:
        used = 1 - node.disk_free_bytes / max(1, node.disk_bytes)
        text = f"{node.disk} of {node.node} has {_size(node.disk_free_bytes)} free ({100 * used:.0f} % used)"
        remedy = "make room, or start Ray with another --temp-dir (for a private session: RAY_TMPDIR)"
        if used > DISK_FULL:
            out.append(_problem("disk", f"{text}; Ray stops writing at {100 * DISK_FULL:.0f} %", remedy))
        elif node.disk_free_bytes < MIN_DISK_BYTES:
            out.append(_warning("disk", text, remedy))
    least = min((node.disk_free_bytes for node in nodes), default=0)
    return out or [Finding(level="ok", check="disk", text=f"{_size(least)} or more free for Ray on every node")]


def check_storage(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Every node can use the places of the run."""
    places: dict[str, dict[str, list[str]]] = {}
    for node in nodes:
        for place, reason in node.storage.items():
            reasons = places.setdefault(place, {})
            if reason:
                reasons.setdefault(reason, []).append(node.node)
    out = []
    for place, reasons in places.items():
        if not reasons:
            out.append(Finding(level="ok", check="storage", text=f"{place}: usable from every node"))
        for reason, where in reasons.items():
            out.append(
                _problem(
                    "storage",
                    f"{place}: not usable from {_some(where)} ({reason})",
                    "use s3:// or a file system that all nodes mount at the same place, and give every node's role or "
                    "credentials access",
                )
            )
    return out


CHECKS: list[Callable[[Sequence[NodeFacts]], list[Finding]]] = [
    check_shared_memory,
    check_clocks,
    check_open_files,
    check_disks,
    check_storage,
]


def _problem(check: str, text: str, remedy: str) -> Finding:
    return Finding(level="problem", check=check, text=text, remedy=remedy)


def _warning(check: str, text: str, remedy: str) -> Finding:
    return Finding(level="warning", check=check, text=text, remedy=remedy)


def _some(names: Iterable[str], most: int = 4) -> str:
    found = list(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def _size(size: int | None) -> str:
    size = size or 0
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
