"""A real S3 server for tests: Ceph's RADOS gateway over one monitor and one object store in memory, all in one folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

from service.embedded import free_port
from tests.helpers.servers import LOCAL, Server, missing, wait_until

ACCESS_KEY, SECRET_KEY = "rgw-test-access-key", "rgw-test-secret-key"
_BINARIES = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool")
_MEMORY = 2 << 30
_START_SECONDS = 90.0


@dataclass(frozen=True)
class Rgw:
    """A gateway and what it stands on. Stop and start `gateway` alone to test an outage: the objects stay."""

    monitor: Server
    storage: Server
    gateway: Server

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        return f"http://{LOCAL}:{self.gateway.port}"

    def stop(self) -> None:
        """Stop everything; the objects are lost."""
        for server in (self.gateway, self.storage, self.monitor):
            server.stop()


def rgw_server(folder: Path) -> Rgw:
    """Start a gateway with one user. Skips, or fails where everything is required, without Ceph's binaries."""
    if lacking := [name for name in _BINARIES if shutil.which(name) is None]:
        missing(f"Ceph ({', '.join(lacking)}; Debian: ceph-mon ceph-osd radosgw)")
    ports = {name: free_port() for name in ("monitor", "gateway")}
    _configure(folder, ports["monitor"])
    environment = {"CEPH_CONF": str(folder / "ceph.conf")}
    monitor = Server("ceph-mon", ["ceph-mon", "-i", "a", "-f"], ports["monitor"], folder, environment)
    storage = Server("ceph-osd", ["ceph-osd", "-i", "0", "-f"], ports["monitor"], folder, environment)
    frontend = f"beast endpoint={LOCAL}:{ports['gateway']}"
    command = ["radosgw", "-n", "client.admin", "-f", "--rgw-frontends", frontend]
    server = Rgw(monitor, storage, Server("radosgw", command, ports["gateway"], folder, environment))
    try:
        _start(server, folder)
    except BaseException:
        server.stop()
        raise
    return server


def _start(server: Rgw, folder: Path) -> None:
    server.monitor.start()
    disk = str(uuid.uuid4())
    _ceph(folder, "ceph", "osd", "new", disk)
    _ceph(folder, "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
    server.storage.start()
    wait_until(lambda: "1 up" in _ceph(folder, "ceph", "osd", "stat"), "the object store is up", _START_SECONDS)
    server.gateway.start(_START_SECONDS)
    keys = ["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY]
    _ceph(folder, "radosgw-admin", "-n", "client.admin", "user", "create", "--uid", "test", "--display-name", "test", *keys)


def _configure(folder: Path, port: int) -> None:
    fsid, address = str(uuid.uuid4()), f"[v2:{LOCAL}:{port}]"
    keyring = folder / "keyring"
    settings = {
        "fsid": fsid,
        "mon host": address,
        "keyring": keyring,
        "run dir": folder,
        "log file": folder / "$name.ceph.log",
        "admin socket": folder / "$cluster-$name.$pid.asok",
        "crash dir": folder,
        "mon data": folder / "mon",
        "osd data": folder / "osd",
        "osd objectstore": "memstore",
        "memstore device bytes": _MEMORY,
        "osd pool default size": 1,
        "osd pool default min size": 1,
        "osd pool default pg num": 8,
        "osd crush chooseleaf type": 0,
        "mon allow pool size one": "true",
        "mon max pg per osd": 1000,
        "auth allow insecure global id reclaim": "false",
        "ms bind ipv6": "false",
        "public addr": LOCAL,
        "rgw crypt require ssl": "false",
        "rgw dns name": LOCAL,
        "rgw thread pool size": 32,
    }
    (folder / "ceph.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    for name in ("mon", "osd"):
        (folder / name).mkdir()
    everything = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
    make = ["ceph-authtool", str(keyring), "--gen-key", "-n"]
    _ceph(folder, "ceph-authtool", "--create-keyring", str(keyring), "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    _ceph(folder, *make, "client.admin", *everything)
    _ceph(folder, *make, "osd.0", *everything)
    _ceph(folder, "monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, str(folder / "monmap"))
    _ceph(folder, "ceph-mon", "--mkfs", "-i", "a", "--monmap", str(folder / "monmap"))


def _ceph(folder: Path, *command: str) -> str:
    environment = {**os.environ, "CEPH_CONF": str(folder / "ceph.conf")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_START_SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed: {done.stderr[-2000:]}")
    return done.stdout
