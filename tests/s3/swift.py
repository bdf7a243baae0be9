"""A real object store for tests: OpenStack Swift with its S3 API, one node on the loopback.

Moto is a model of S3 in memory; this one checks signatures, keeps objects in files and pages by itself.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

VERSION = "2.38.3"
SERVERS = ("object", "container", "account", "proxy")
USER, KEY = "test:tester", "testing-key-of-swift"

SWIFT_CONF = """
[swift-hash]
swift_hash_path_suffix = test
swift_hash_path_prefix = test
[storage-policy:0]
name = one
default = yes
"""
STORAGE_CONF = """
[DEFAULT]
{common}
devices = {devices}
mount_check = false
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
recon_cache_path = {cache}
"""
FILTERS = ("catch_errors", "listing_formats", "bulk", "s3api", "tempauth", "copy", "slo")
PROXY_CONF = """
[DEFAULT]
{common}
[pipeline:main]
pipeline = {filters} proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
"""
OF_FILTER = {
    "tempauth": f"user_test_tester = {KEY} .admin\n",
    "s3api": "s3_acl = false\nlocation = us-east-1\n",
}


def unavailable() -> str:
    """Why Swift cannot be installed here, empty where it can."""
    if not any(Path(folder, "liberasurecode.so").exists() for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib")):
        return "OpenStack Swift needs the library liberasurecode (Debian: liberasurecode-dev)"
    return ""


def install(venv: Path) -> Path:
    """Folder of Swift's programs, installed into ``venv`` on first use."""
    if not (venv / "bin" / "swift-proxy-server").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([venv / "bin" / "pip", "install", "-q", f"swift=={VERSION}"], check=True)
    return venv / "bin"


def start(programs: Path, root: Path, stack: ExitStack) -> dict[str, str]:
    """Start the four servers with their data under ``root``; ``stack`` ends them.

    Args:
        programs: of ``install``.
        root: an empty folder, on a file system with extended attributes.
        stack: gets what has to be undone.

    Returns:
        The environment that names the store.
    """
    for name in ("conf", "devices/d1", "log", "cache"):
        (root / name).mkdir(parents=True)
    conf = root / "conf"
    ports = dict(zip(SERVERS, _free_ports(len(SERVERS)), strict=True))
    (conf / "swift.conf").write_text(SWIFT_CONF)
    for kind in SERVERS:
        common = f"bind_ip = 127.0.0.1\nbind_port = {ports[kind]}\nswift_dir = {conf}\nworkers = 1\n"
        common += f"user = {_user()}\nlog_address = {root}/log/none"
        if kind == "proxy":
            text = PROXY_CONF.format(common=common, filters=" ".join(FILTERS))
            text += "".join(f"[filter:{f}]\nuse = egg:swift#{f}\n{OF_FILTER.get(f, '')}" for f in FILTERS)
        else:
            text = STORAGE_CONF.format(common=common, kind=kind, devices=root / "devices", cache=root / "cache")
            ring = [programs / "swift-ring-builder", f"{kind}.builder"]
            for step in (["create", "6", "1", "0"], ["add", f"r1z1-127.0.0.1:{ports[kind]}/d1", "1"], ["rebalance"]):
                subprocess.run([*ring, *step], cwd=conf, check=True, stdout=subprocess.DEVNULL)
        (conf / f"{kind}.conf").write_text(text)
    for kind in SERVERS:
        log = stack.enter_context((root / "log" / f"{kind}.log").open("wb"))
        server = subprocess.Popen(
            [programs / f"swift-{kind}-server", conf / f"{kind}.conf"],
            env={**os.environ, "SWIFT_CONF": str(conf / "swift.conf")},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        stack.callback(_end, server)
    for kind in SERVERS:
        _wait_for(ports[kind], root / "log" / f"{kind}.log")
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['proxy']}",
        "AWS_ACCESS_KEY_ID": USER,
        "AWS_SECRET_ACCESS_KEY": KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_for(port: int, log: Path) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise RuntimeError(f"Swift did not start: {log.read_text()[-2000:]}") from None
            time.sleep(0.2)


def _end(server: subprocess.Popen[bytes]) -> None:
    """A server leads its workers; all of them end with its process group."""
    import signal

    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, how)
            server.wait(10)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return
