"""Checks of the machine: disks, memory, limits. Nothing is written and no speed is measured."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from fmrizoo.cluster.doctor.line import Line, broken, ok, warning

GB = 1e9
LEAST_DISK, ENOUGH_DISK = 1 * GB, 10 * GB
LEAST_MEMORY, ENOUGH_MEMORY = 2 * GB, 8 * GB
ENOUGH_SHM = 1 * GB  # containers start with 64 MB
LEAST_FILES, ENOUGH_FILES = 256, 1024
LEAST_INODES = 1000
NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2⁶³ where there is none


@dataclass(frozen=True)
class Disk:
    """A folder's file system.

    Attributes:
        path: The folder, or the nearest one above that is there.
        free: Bytes this user may still write.
        inodes: Files this user may still make; -1: not limited.
        read_only: Mounted so.
        writable: This user may write into ``path``.
    """

    path: Path
    free: int
    inodes: int
    read_only: bool
    writable: bool


def look_at_disk(folder: Path) -> Disk | str:
    """The file system on which ``folder`` is or would be made, or why it cannot be looked at."""
    path = folder.absolute()
    try:
        while not path.exists():
            path = path.parent
        stats = os.statvfs(path)
    except OSError as error:  # no permission on the way, a file system that is gone
        return f"{path}: {error.strerror}"
    inodes = stats.f_favail if stats.f_files else -1
    read_only = bool(stats.f_flag & os.ST_RDONLY)
    may = os.access(path, os.W_OK | os.X_OK)
    return Disk(path, stats.f_bavail * stats.f_frsize, inodes, read_only, may)


def output(found: Disk | str) -> Line:
    """May runs be written there, and is there room."""
    name, elsewhere = "output folder", "give another folder with --out"
    if isinstance(found, str):
        return broken(name, found, elsewhere)
    said = f"{found.path}, {found.free / GB:,.1f} GB free"
    if found.read_only:
        return broken(name, f"{found.path} is on a read-only file system", elsewhere)
    if not found.writable:
        return broken(name, f"you may not write to {found.path}", elsewhere)
    if 0 <= found.inodes < LEAST_INODES:
        return broken(name, f"{said}, {found.inodes} files left", elsewhere)
    if found.free < LEAST_DISK:
        return broken(name, said, "make room, or give another folder with --out")
    if found.free < ENOUGH_DISK:
        return warning(name, f"{said}: few checkpoints fit", "make room, or set train.keep=1")
    return ok(name, said)


def store_disk(found: Disk | str) -> Line:
    """Where the store is. To train from it nothing is written there."""
    if isinstance(found, str):
        return broken("store's file system", found, "ask whoever runs this file system")
    said = f"{found.path}, {found.free / GB:,.1f} GB free"
    if found.read_only or not found.writable:
        said += ", read-only (enough to train from)"
    return ok("store's file system", said)


def store(path: Path) -> Line:
    """Can the index be read, and is every file there. Checksums: `fmrizoo verify`."""
    from fmrizoo.data.store import Store
    from fmrizoo.errors import FmrizooError

    try:
        runs = Store(path).runs
    except FmrizooError as error:
        return broken("store", str(error), "give --store the folder that `fmrizoo prepare` wrote")
    missing = sorted({run.file for run in runs if not (path / run.file).is_file()})
    if missing:
        said = f"{len(missing)} files are missing, such as {missing[0]}"
        return broken("store", said, f"fmrizoo repair {path} <what it was prepared from>")
    if not runs:
        return broken("store", f"{path} holds no run", f"fmrizoo prepare <data> {path}")
    return ok("store", f"{path}, {len(runs)} runs")


def try_lock(path: Path) -> str:
    """Lock ``path`` shared and let go: empty where that works, else what the system said."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return error.strerror or "cannot be opened"
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return ""  # somebody else holds it: locks work
    except OSError as error:
        return error.strerror or errno.errorcode.get(error.errno or 0, "error")
    finally:
        os.close(file)
    return ""


def locking(path: Path, said: str) -> Line:
    """Do file locks work there. Only `prepare` takes one; reading never does."""
    if said:
        fix = "run one `fmrizoo prepare` at a time on this file system"
        return warning("file locks", f"{path}: {said}", fix)
    return ok("file locks", f"work on {path}")


def shared_memory(free: int | None, size: int) -> Line:
    """``/dev/shm``: what collectives between the ranks of a node, and ``data.stage``, use."""
    name = "/dev/shm"
    if free is None:
        return warning(name, "is not there", "mount -t tmpfs tmpfs /dev/shm")
    said = f"{free / GB:,.1f} of {size / GB:,.1f} GB free"
    if size < ENOUGH_SHM:
        return warning(name, f"{said}: small", "start the container with --shm-size=8g")
    if free < ENOUGH_SHM:
        return warning(name, f"{said}: full", "remove what is left there: ls -l /dev/shm")
    return ok(name, said)


def open_files(soft: int, hard: int) -> Line:
    """``ulimit -n``. A negative number: no limit."""
    name, said = "open files (ulimit -n)", f"{soft}, at most {hard}" if soft >= 0 else "no limit"
    if soft < 0 or soft >= ENOUGH_FILES:
        return ok(name, said)
    most = ENOUGH_FILES * 4 if hard < 0 else min(ENOUGH_FILES * 4, hard)
    fix = f"ulimit -n {most}"
    if most <= soft:
        fix = "raise nofile in /etc/security/limits.conf"
    return (broken if soft < LEAST_FILES else warning)(name, said, fix)


def memory(installed: int, limit: int | None) -> Line:
    """Memory that this job may use."""
    allowed = installed if limit is None else min(limit, installed)
    limited = limit is not None and limit < installed
    said = f"{allowed / GB:,.1f} GB" + (f" of {installed / GB:,.1f} (cgroup)" if limited else "")
    fix = "ask for more memory: --mem=32G" if limited else "use a machine with more memory"
    if allowed < LEAST_MEMORY:
        return broken("memory", said, fix)
    return warning("memory", said, fix) if allowed < ENOUGH_MEMORY else ok("memory", said)


def cores(allowed: int, quota: float | None) -> Line:
    """Cores this process may run on, and a cgroup's share of them."""
    said = f"{allowed} allowed"
    if quota is not None and quota < allowed:
        fix = f"export OMP_NUM_THREADS={max(1, int(quota))}"
        return warning("cores", f"{said}, but a quota of {quota:g}: threads are throttled", fix)
    return ok("cores", said)


def memory_limit(groups: str, root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the cgroups of ``/proc/self/cgroup`` (its text: ``groups``) allow; None: all."""
    texts = _of_cgroups(groups, root, "memory", "memory.max", "memory.limit_in_bytes")
    limits = [int(text) for text in texts if text.isdigit()]
    return min((limit for limit in limits if limit < NO_LIMIT), default=None)


def cpu_quota(groups: str, root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that the cgroups allow; None: all."""
    shares = []
    for text in _of_cgroups(groups, root, "cpu", "cpu.max", ""):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit():
            shares.append(int(quota) / int(period))
    quotas = _of_cgroups(groups, root, "cpu", "", "cpu.cfs_quota_us")
    periods = _of_cgroups(groups, root, "cpu", "", "cpu.cfs_period_us")
    for quota, period in zip(quotas, periods, strict=True):
        if quota.isdigit() and period.isdigit():  # -1: none
            shares.append(int(quota) / int(period))
    return min(shares, default=None)


def _of_cgroups(groups: str, root: Path, kind: str, new: str, old: str) -> list[str]:
    """Contents of a file in this process's group and all above (v2: ``new``; v1: ``old``)."""
    found = []
    for line in groups.splitlines():
        _, kinds, place = line.split(":", 2)
        if new and not kinds:
            base, name = root, new
        elif old and kind in kinds.split(","):
            base, name = root / kind, old
        else:
            continue
        # In a container the path is often that of the host: what is there counts.
        below = base / place.strip("/")
        for folder in (below, *below.parents):
            if folder.is_relative_to(base) and (folder / name).is_file():
                found.append((folder / name).read_text(encoding="ascii").strip())
    return found
