"""Folders that stand in for images: a Debian root made by debootstrap, entered by chroot in namespaces of its own.

Mounts and processes of a command end with it: they are in its own mount and process namespaces.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.images.dockerfile import Instruction, Stage

SUITE = "bookworm"
USER = "10001:10001"
_HOSTS = "/etc/hosts"
# What a build sees of this machine, and where. Certificates get a place of their own: a package writes the usual one.
_CERTIFICATES = "/etc/host-certificates.crt"
_FROM_HOST = {name: name for name in (_HOSTS, "/etc/resolv.conf", "/etc/pip.conf")} | {
    "/etc/ssl/certs/ca-certificates.crt": _CERTIFICATES
}
# Ends with this process, and takes with it all that it started and mounted.
_ALONE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--propagation=private")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def why_not() -> str:
    """Why no root can be made and entered here; empty where it can."""
    if os.geteuid() != 0:
        return "not root"
    for tool in ("debootstrap", "chroot", "setpriv", "unshare", "mount"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    trial = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", "mount -t tmpfs none /mnt && chroot / true"]
    done = subprocess.run(trial, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"chroot in a namespace is not allowed: {done.stderr.strip()}"


def bootstrap(folder: Path) -> None:
    """A minimal Debian in a new folder, from the mirror that this machine's apt uses. Raises CalledProcessError."""
    command = ["debootstrap", "--variant=minbase", SUITE, str(folder), *_mirror()]
    log = folder.with_suffix(".log")
    with log.open("wb") as out:
        done = subprocess.run(command, stdout=out, stderr=out, check=False)
    if done.returncode:
        raise RuntimeError(f"debootstrap ended with {done.returncode}:\n{log.read_text(errors='replace')[-2000:]}")
    # As in Debian's own images: no write to the disk is waited for.
    (folder / "etc/dpkg/dpkg.cfg.d/no-sync").write_text("force-unsafe-io\n")
    _apt_as_here(folder)


def _mirror() -> list[str]:
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(CODENAME)", "Created-By: Packages"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    found = [line.split() for line in done.stdout.splitlines()]
    return next(([line[0]] for line in found if line[1:] == ["Debian", SUITE]), [])


def _apt_as_here(folder: Path) -> None:
    """Sources and ways of fetching of this machine's apt, where it is the same Debian."""
    if not _mirror():
        return
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    plain = Path("/etc/apt/sources.list")
    if sources.is_file():
        (folder / "etc/apt/sources.list").unlink(missing_ok=True)
        shutil.copy(sources, folder / "etc/apt/sources.list.d/debian.sources")
    elif plain.is_file():
        shutil.copy(plain, folder / "etc/apt/sources.list")
    dumped = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    fetching = [line for line in dumped.splitlines() if line.startswith(("Acquire::http", "Acquire::https"))]
    (folder / "etc/apt/apt.conf.d/00host").write_text("".join(line + "\n" for line in fetching))
    for name in ("auth.conf.d", "trusted.gpg.d", "keyrings"):
        for file in Path("/etc/apt", name).glob("*"):
            shutil.copy(file, folder / "etc/apt" / name)


@dataclass
class Root:
    """One image's root file system, and what is mounted into it."""

    path: Path
    writable: dict[str, Path] = field(default_factory=dict)

    def command(self, told: Sequence[str], environment: Mapping[str, str], *, user: str = "", cwd: str = "/") -> list[str]:
        """The command line that runs `told` in this root. With a user the root is read-only and /tmp its own; else as built."""
        root = shlex.quote(str(self.path))
        lines = ["set -e", f"mount --rbind {root} {root}", f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
        lines += _from_host(root, () if user else _wheel_folders(environment), [_HOSTS] if user else list(_FROM_HOST))
        for inside, outside in self.writable.items():
            lines.append(f"mount --bind {shlex.quote(str(outside))} {root}{inside}")
        if user:
            lines += [f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp", f"mount -o remount,bind,ro {root}"]
        as_user = [f"--userspec={user}"] if user else []
        cleared = ["env", "-i", *(f"{name}={value}" for name, value in {"PATH": _PATH, **environment}.items())]
        entered = ["chroot", *as_user, str(self.path), *cleared, "sh", "-c", f'cd {shlex.quote(cwd)} && exec "$@"', "sh", *told]
        lines.append("exec " + shlex.join(entered))
        return [*_ALONE, "sh", "-c", "\n".join(lines)]


def _from_host(root: str, folders: Sequence[Path], files: Sequence[str]) -> list[str]:
    lines = []
    for name in (name for name in files if Path(name).is_file()):
        place = root + _FROM_HOST[name]
        lines.append(f"touch {place} && mount --bind {name} {place} && mount -o remount,bind,ro {place}")
    for folder in folders:
        name, place = shlex.quote(str(folder)), root + shlex.quote(str(folder))
        lines.append(f"mkdir -p {place} && mount --bind {name} {place} && mount -o remount,bind,ro {place}")
    return lines


def _wheel_folders(environment: Mapping[str, str]) -> list[Path]:
    named = environment.get("PIP_FIND_LINKS", "").split()
    return [Path(name).absolute() for name in named if "://" not in name and Path(name).is_dir()]


def index_settings() -> dict[str, str]:
    """How this machine's package clients find their index."""
    named = {
        name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_")) or name.lower().endswith("_proxy")
    }
    return named | {"PIP_CERT": _CERTIFICATES, "SSL_CERT_FILE": _CERTIFICATES}


class Builder:
    """Carries out Dockerfiles on copies of one base. What a stage has after its first RUN is kept for stages that begin alike."""

    def __init__(self, base: Path, folder: Path, source: Path, arguments: Mapping[str, str]) -> None:
        self._base, self._folder, self._source, self._arguments = base, folder, source, arguments
        self._begun: dict[tuple[Instruction, ...], Path] = {}

    def build(self, name: str, stages: Sequence[Stage]) -> Root:
        """Carry out the stages of a Dockerfile. Returns the root of the last. Raises RuntimeError where a RUN fails."""
        made: dict[str, Root] = {}
        for number, stage in enumerate(stages):
            root = Root(self._folder / f"{name}-{number}")
            self._carry_out(stage, root, made)
            made[stage.name] = root
        return root

    def _carry_out(self, stage: Stage, root: Root, made: Mapping[str, Root]) -> None:
        first = 1 + [one.word for one in stage.instructions].index("RUN")
        beginning = tuple(stage.instructions[:first])
        known = self._begun.get(beginning)
        _copy_tree(known or self._base, root.path)
        cwd, given = "/", dict(index_settings())
        for number, one in enumerate(stage.instructions, 1):
            if one.word == "WORKDIR":
                cwd = one.rest
                root.path.joinpath(cwd[1:]).mkdir(parents=True, exist_ok=True)
            elif one.word == "ARG":
                name, _, value = one.rest.partition("=")
                given[name] = self._arguments.get(name, value)
            elif one.word == "COPY":
                words = one.rest.split()
                start = made[words.pop(0).removeprefix("--from=")].path if words[0].startswith("--from=") else self._source
                copy_in(words, root.path if words[-1].startswith("/") else root.path / cwd[1:], start)
            elif one.word == "RUN" and not (known and number == first):
                _run(root, one.rest, given, cwd)
                if number == first:
                    self._begun[beginning] = root.path.with_suffix(".begun")
                    _copy_tree(root.path, self._begun[beginning])


def _run(root: Root, told: str, given: Mapping[str, str], cwd: str) -> None:
    told = re.sub(r"^(--\S+ +)+", "", told)  # mounts: a secret pip.conf is this machine's, which every command sees
    command = root.command(["sh", "-c", told], {**given, "HOME": "/root"}, cwd=cwd)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"RUN {told} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")


def _copy_tree(start: Path, to: Path) -> None:
    subprocess.run(["cp", "-a", "--reflink=auto", str(start), str(to)], check=True)


def copy_in(words: Sequence[str], place: Path, start: Path) -> None:
    """Carry out a COPY: the last word is where to, below the folder `place`, the others what, below `start`."""
    *names, target = words
    for name in names:
        found = start / name.lstrip("/")
        into = place / target.lstrip("/")
        into = into / found.name if target.endswith("/") else into
        into.parent.mkdir(parents=True, exist_ok=True)
        if found.is_dir():
            shutil.copytree(found, into, symlinks=True, dirs_exist_ok=True, ignore=_left_out)
        else:
            shutil.copy(found, into)


def _left_out(folder: str, names: list[str]) -> list[str]:
    # What .dockerignore leaves out of the tree; in an environment that a stage made, bytecode is wanted.
    return [name for name in names if name == "__pycache__" and "/venv/" not in f"{folder}/"]
