"""The system calls that a program in a sandbox may not make, as a seccomp filter (BPF) of x86_64 or aarch64. Knows no program.

Refused calls fail with EPERM and the program goes on; calls newer than this table, and the 32-bit and x32 entries, fail with ENOSYS
or end it. Allowed with a condition: ``clone`` without a new namespace, sockets of the unix family, ``prlimit64`` on the caller,
``ioctl`` that puts no text into a terminal. ``clone3`` hides its flags in memory that a filter cannot read, so it does not exist
(ENOSYS) and the C library falls back to ``clone``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The kernel's number of each architecture that has a table here."""
ARCHITECTURES = tuple(AUDIT)

# name: (x86_64, aarch64); None where the architecture has no such call
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # the file tree
    "mount": (165, 40),
    "umount2": (166, 39),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "statmount": (457, 457),
    "listmount": (458, 458),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "acct": (163, 89),
    "sysfs": (139, None),
    "ustat": (136, None),
    # namespaces, keys, filters
    "unshare": (272, 97),
    "setns": (308, 268),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "seccomp": (317, 277),
    "landlock_create_ruleset": (444, 444),
    "lsm_set_self_attr": (460, 460),
    # the kernel: its programs, its modules, its clock, its log
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_setup": (206, 0),
    "userfaultfd": (323, 282),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "create_module": (174, None),
    "query_module": (178, None),
    "get_kernel_syms": (177, None),
    "reboot": (169, 142),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "vhangup": (153, 58),
    "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42),
    "_sysctl": (156, None),
    "uselib": (134, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "personality": (135, 92),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    # memory that belongs to no process's sum
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
MISSING = {"clone3": (435, 435)}
CONDITIONS = {"clone": (56, 220), "socket": (41, 198), "socketpair": (53, 199), "prlimit64": (302, 261), "ioctl": (16, 29)}
LAST = 462
"""The newest call that this table was written with."""
X32 = 0x40000000
NEW_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
AF_UNIX, TIOCSTI, TIOCLINUX = 1, 0x5412, 0x541C

LOAD, EQUAL, GREATER, ANY_BIT, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
NUMBER, ARCH, ARGUMENTS = 0, 4, 16
"""Offsets in the kernel's seccomp_data; an argument has 8 bytes, the low half first."""
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, MODE_FILTER = 38, 22, 2


def program(machine: str) -> bytes:
    """The filter of an architecture: 8 bytes an instruction. Raises KeyError for one without a table."""
    audit = AUDIT[machine]
    column = ARCHITECTURES.index(machine)
    refuse, missing = FAIL | errno.EPERM, FAIL | errno.ENOSYS
    code = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    if machine == "x86_64":
        code += [(ANY_BIT, 0, 1, X32), (RETURN, 0, 0, missing)]
    code += [(GREATER, 0, 1, LAST), (RETURN, 0, 0, missing)]
    for table, answer in ((REFUSED, refuse), (MISSING, missing)):
        for numbers in table.values():
            if numbers[column] is not None:
                code += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, answer)]
    one = [(RETURN, 0, 0, refuse), (RETURN, 0, 0, ALLOW)]  # a test that jumps over the refusal allows
    conditions = {
        "clone": [(LOAD, 0, 0, ARGUMENTS), (ANY_BIT, 0, 1, NEW_NAMESPACES), *one],
        "socket": [(LOAD, 0, 0, ARGUMENTS), (EQUAL, 1, 0, AF_UNIX), *one],
        "socketpair": [(LOAD, 0, 0, ARGUMENTS), (EQUAL, 1, 0, AF_UNIX), *one],
        "prlimit64": [(LOAD, 0, 0, ARGUMENTS), (EQUAL, 1, 0, 0), *one],
        "ioctl": [(LOAD, 0, 0, ARGUMENTS + 8), (EQUAL, 1, 0, TIOCSTI), (EQUAL, 0, 1, TIOCLINUX), *one],
    }
    for name, body in conditions.items():
        code += [(EQUAL, 0, len(body), CONDITIONS[name][column]), *body]
    code.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def install() -> None:
    """Filter this process and all that it starts, for good; no exec gains a privilege from here on.

    Raises OSError where the kernel refuses, or the architecture has no table.
    """
    machine = platform.machine()
    if machine not in AUDIT:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}")
    body = program(machine)
    buffer = ctypes.create_string_buffer(body, len(body))
    # struct sock_fprog: the number of instructions, and where they are
    header = struct.pack("@HP", len(body) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, MODE_FILTER, ctypes.c_char_p(header), 0, 0)):
        if libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({call[0]}): {os.strerror(ctypes.get_errno())}")
