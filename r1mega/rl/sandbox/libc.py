"""The few calls of Linux that Python 3.11 has no function for: namespaces, mounts, capabilities. Each raises OSError by name."""

from __future__ import annotations

import ctypes
import os
import struct

NEW_NS, NEW_CGROUP, NEW_UTS, NEW_IPC = 0x20000, 0x02000000, 0x04000000, 0x08000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, NOATIME, NODIRATIME = 1, 2, 4, 8, 32, 1024, 2048
BIND, REC, PRIVATE, RELATIME = 4096, 16384, 1 << 18, 1 << 21
DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_SECUREBITS = 1, 4, 24, 28
PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 36, 47, 4
SECURE = 0xEF
"""NOROOT, NO_SETUID_FIXUP and NO_CAP_AMBIENT_RAISE with their locks, and KEEP_CAPS locked off: user 0 is nobody special."""
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object, says: str = "") -> int:
    """A function of the C library. Raises OSError that names it (``says`` instead, if given)."""
    converted = [ctypes.c_ulong(each) if isinstance(each, int) else each for each in arguments]
    answer = getattr(_libc, name)(*converted)
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{says or name}: {os.strerror(number)}")
    return answer


def unshare(flags: int, says: str) -> None:
    """Leave the shared namespaces for new ones."""
    call("unshare", flags, says=f"unshare({says})")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Mount, bind or change a mount."""
    encoded = [os.fsencode(source), os.fsencode(target), kind and kind.encode()]
    call("mount", *encoded, flags, options.encode() or None, says=f"mount {kind or 'bind'} on {target}")


def remount_flags(path: str) -> int:
    """The flags of the mount under ``path``, as a remount must repeat them: in a user namespace none may be dropped."""
    found = os.statvfs(path).f_flag
    kept = found & (RDONLY | NOSUID | NODEV | NOEXEC | NOATIME | NODIRATIME)
    return kept | (RELATIME if found & 4096 else 0)


def pivot_to_here(machine: str) -> None:
    """Make the working folder, a mount, the root of this mount namespace, and let go of the old one."""
    call("syscall", PIVOT_ROOT[machine], b".", b".", says="pivot_root")
    call("umount2", b".", DETACH, says="umount2 of the old root")
    os.chdir("/")


def prctl(option: int, value: int, says: str) -> None:
    """Set a property of this process."""
    call("prctl", option, value, 0, 0, 0, says=f"prctl({says})")


def drop_capabilities(machine: str) -> None:
    """Without any capability, now and after every exec."""
    for number in range(64):
        if _libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0) != 0:
            break  # the kernel knows no more of them
    _libc.prctl(PR_CAP_AMBIENT, ctypes.c_ulong(PR_CAP_AMBIENT_CLEAR_ALL), 0, 0, 0)
    _libc.prctl(PR_SET_SECUREBITS, ctypes.c_ulong(SECURE), 0, 0, 0)  # needs a capability; without one there is nothing to lock
    header, data = struct.pack("<II", 0x20080522, 0), bytes(24)
    call("syscall", SYS_CAPSET[machine], header, data, says="capset")
