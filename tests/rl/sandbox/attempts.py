"""The table of escape attempts: each row is Python that, in a sandbox, must raise or be killed; one that ends has got out.

``F`` holds what the test prepared outside: a readable secret's path, listening sockets, process numbers. ``call(x86_64, aarch64, ...)``
makes a system call by number and raises OSError; ``libc`` is the C library.
"""

from __future__ import annotations

HARNESS = r"""
import ctypes, errno, fcntl, json, mmap, os, platform, resource, signal, socket, stat, struct, sys, threading, time

assert os.getuid() == 1000 and os.getpid() < 10, "no sandbox around this: nothing is tried"
F, rows = json.load(sys.stdin)
libc = ctypes.CDLL(None, use_errno=True)
ARM = platform.machine() == "aarch64"


def call(x86, arm, *arguments):
    number = arm if ARM else x86
    if number is None:
        raise OSError("no such call here")
    answer = libc.syscall(number, *[ctypes.c_long(each) if isinstance(each, int) else each for each in arguments])
    if answer < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return answer


def checked(answer):
    if answer < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return answer


for name, code in rows:
    child = os.fork()
    if child == 0:
        os.dup2(os.open("/dev/null", os.O_RDWR), 2)
        signal.alarm(3)
        try:
            exec(code, globals())
        except BaseException as error:
            os.write(1, json.dumps([name, "held", f"{type(error).__name__}: {error}"[:200]]).encode() + b"\n")
            os._exit(0)
        os.write(1, json.dumps([name, "ESCAPED", ""]).encode() + b"\n")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        os.write(1, json.dumps([name, "held", f"killed by {status}"]).encode() + b"\n")
print(json.dumps(["end", "held", "number 1 and this program are still there"]))
"""

NETWORK = {
    "tcp to a listener of this machine": "socket.create_connection(('127.0.0.1', F['port']), 1)",
    "tcp over ipv6": "socket.socket(socket.AF_INET6, socket.SOCK_STREAM).connect(('::1', F['port']))",
    "tcp server": "socket.create_server(('0.0.0.0', 0))",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))",
    "name server": "socket.getaddrinfo('example.com', 80)",
    "http": "__import__('urllib.request').request.urlopen(f\"http://127.0.0.1:{F['port']}\", timeout=1)",
    "raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "packet socket": "socket.socket(17, socket.SOCK_RAW, 3)",
    "netlink": "socket.socket(16, socket.SOCK_RAW, 0)",
    "vsock": "socket.socket(40, socket.SOCK_STREAM)",
    "kernel crypto": "socket.socket(38, socket.SOCK_SEQPACKET)",
    "bluetooth": "socket.socket(31, socket.SOCK_RAW, 1)",
    "can": "socket.socket(29, socket.SOCK_RAW, 1)",
    "xdp": "socket.socket(44, socket.SOCK_RAW)",
    "tipc": "socket.socket(30, socket.SOCK_STREAM)",
    "key socket": "socket.socket(15, socket.SOCK_RAW, 2)",
    "pair of inet sockets": "socket.socketpair(socket.AF_INET)",
    "family in the high half": "call(41, 198, (1 << 32) | 2, 1, 0)",
    "unix socket of this machine": "socket.socket(socket.AF_UNIX).connect(F['socket'])",
    "abstract unix socket": "socket.socket(socket.AF_UNIX).connect('\\0' + F['abstract'])",
    "docker": "socket.socket(socket.AF_UNIX).connect('/var/run/docker.sock')",
    "io_uring": "call(425, 425, 8, ctypes.create_string_buffer(256))",
    "io_uring enter": "call(426, 426, 0, 0, 0, 0, 0, 0)",
    "x32 entry": "call(0x40000000 + 41, None, 2, 1, 0)",
    "32-bit entry": (
        "m = mmap.mmap(-1, 4096, prot=7); m.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()"
    ),
}
READ = {
    **{
        f"read {path}": f"open({path!r}, 'rb').read(1)"
        for path in (
            *("/etc/passwd", "/etc/shadow", "/etc/hosts", "/etc/resolv.conf", "/etc/machine-id", "/root/.bashrc", "/boot/config"),
            *(
                "/proc/1/environ",
                "/proc/1/mem",
                "/proc/1/maps",
                "/proc/1/cmdline",
                "/proc/1/status",
                "/proc/kcore",
                "/proc/kallsyms",
            ),
            *("/proc/cmdline", "/proc/mounts", "/proc/net/tcp", "/proc/keys", "/proc/kmsg", "/proc/sys/kernel/random/boot_id"),
            *("/dev/mem", "/dev/kmem", "/dev/port", "/dev/kmsg", "/dev/vda", "/dev/sda", "/dev/nvme0n1", "/dev/kvm", "/dev/fuse"),
            *(
                "/dev/tty",
                "/dev/console",
                "/dev/ptmx",
                "/dev/net/tun",
                "/dev/nvidiactl",
                "/sys/kernel/uevent_seqnum",
                "/../etc/passwd",
            ),
            *("/proc/self/root/etc/passwd", "/proc/self/cwd/../etc/passwd", "/proc/thread-self/root/../etc/shadow"),
        )
    },
    **{
        f"list {path}": f"os.listdir({path!r})"
        for path in ("/home", "/var", "/run", "/sys", "/mnt", "/boot", "/root/.ssh", "/proc/1/fd", "/proc/1/root", "/proc/1/task")
    },
    "secret": "open(F['secret']).read()",
    "secret by a symbolic link": "os.symlink(F['secret'], 'link'); open('link').read()",
    "secret by a link of a folder": "os.symlink(os.path.dirname(F['secret']), 'folder'); os.listdir('folder')",
    "secret by a hard link": "os.link(F['secret'], 'hard')",
    "secret by many ..": "open('../' * 40 + F['secret']).read()",
    "secret by proc": "open(f\"/proc/{F['pid']}/root{F['secret']}\").read()",
    "secret by number 1": "open(f\"/proc/1/root{F['secret']}\").read()",
    "secret by a descriptor of number 1": "[open(f'/proc/1/fd/{fd}').read() for fd in range(3)]",
    "secret by openat of the root and ..": (
        "fd = os.open('/', os.O_RDONLY | os.O_DIRECTORY); os.open('../../' + F['secret'][1:], os.O_RDONLY, dir_fd=fd)"
    ),
    "folder of the work": "os.listdir(F['work'])",
    "home": "assert os.path.expanduser('~') != '/tmp', 'no home but the private folder'",
    "other users' files": "assert any(os.stat(entry.path).st_uid not in (1000, 65534) for entry in os.scandir('/'))",
    "memory of this machine by proc": "open(f\"/proc/{F['pid']}/mem\", 'rb')",
    "environment of the test": "open(f\"/proc/{F['pid']}/environ\", 'rb').read()",
    "secret in the environment": "assert F['mark'] in str(os.environ), 'not there'",
    "secret in the first environment": "assert F['mark'] in open('/proc/self/environ').read(), 'not there'",
    "inherited descriptors": "assert max(int(fd) for fd in os.listdir('/proc/self/fd')) > 4, 'none but those of this row'",
    "name of this machine": "assert os.uname().nodename != 'sandbox', 'hidden'",
    "handle of a file": "call(303, 264, -100, b'/usr/lib', ctypes.create_string_buffer(struct.pack('Ii', 128, 0), 256), ctypes.create_string_buffer(8), 0)",
    "open by handle": "call(304, 265, 0, ctypes.create_string_buffer(struct.pack('IiII', 8, 1, 2, 0), 256), 0)",
}
WRITE = {
    **{
        f"write {path}": f"os.open({path!r}, os.O_WRONLY)"
        for path in (
            *(
                "/proc/sys/kernel/core_pattern",
                "/proc/sysrq-trigger",
                "/proc/self/uid_map",
                "/proc/self/gid_map",
                "/proc/1/oom_score_adj",
            ),
            *("/proc/self/setgroups", "/proc/self/oom_score_adj", "/proc/self/timens_offsets", "/proc/sys/vm/drop_caches"),
            *(
                "/sys/fs/cgroup/cgroup.procs",
                "/etc/ld.so.cache",
                "/etc/ld.so.preload",
                "/proc/self/attr/current",
                "/proc/self/clear_refs",
            ),
        )
    },
    **{
        f"create {path}": f"os.open({path!r}, os.O_WRONLY | os.O_CREAT)"
        for path in ("/new", "/dev/new", "/etc/new", "/usr/lib/new", "/proc/new", "/lib/new", "/root/new")
    },
    "interpreter": "open(F['python'], 'r+b')",
    "interpreter appended to": "open(F['python'], 'ab')",
    "interpreter removed": "os.unlink(F['python'])",
    "interpreter replaced": "open('new', 'w'); os.rename('new', F['python'])",
    "interpreter's mode": "os.chmod(F['python'], 0o777)",
    "interpreter's owner": "os.chown(F['python'], 1000, 1000)",
    "interpreter's times": "os.utime(F['python'])",
    "interpreter's attributes": "os.setxattr(F['python'], 'user.x', b'y')",
    "interpreter by a hard link": "os.link(F['python'], 'python'); open('python', 'r+b')",
    "a module of the library": "open(os.__file__, 'a')",
    "a package for all": "open(os.path.join(os.path.dirname(os.__file__), 'site-packages', 'evil.pth'), 'w')",
    "a folder in the library": "os.mkdir(os.path.dirname(os.__file__) + '/evil')",
    "truncate a library": "os.truncate(os.__file__, 0)",
    "the null device's mode": "os.chmod('/dev/null', 0o600)",
    "the null device removed": "os.unlink('/dev/null')",
    "standard input": "os.write(0, b'x')",
    "standard input longer": "os.ftruncate(0, 1 << 30)",
    "standard input by proc": "os.write(os.open('/proc/self/fd/0', os.O_WRONLY), b'x')",
    "block device": "os.mknod('disk', 0o600 | stat.S_IFBLK, os.makedev(254, 0)); open('disk', 'rb')",
    "character device": "os.mknod('mem', 0o600 | stat.S_IFCHR, os.makedev(1, 1)); open('mem', 'rb')",
    "text into a terminal": "fcntl.ioctl(0, 0x5412, b'x')",
    "virtual terminal": "fcntl.ioctl(0, 0x541C, b'x')",
}
MOUNT = {
    "mount tmpfs": "checked(libc.mount(b'x', b'/tmp', b'tmpfs', 0, None))",
    "mount proc": "os.mkdir('p'); checked(libc.mount(b'x', b'p', b'proc', 0, None))",
    "mount bind": "checked(libc.mount(b'/', b'/tmp', None, 4096, None))",
    "mount read-write": "checked(libc.mount(b'', b'/', None, 32, None))",
    "mount bind read-write": "checked(libc.mount(b'', b'/usr/lib', None, 32 | 4096, None))",
    "mount move": "checked(libc.mount(b'/tmp', b'/proc', None, 8192, None))",
    "mount overlay": "checked(libc.mount(b'x', b'/tmp', b'overlay', 0, b'lowerdir=/usr/lib,upperdir=/tmp,workdir=/tmp'))",
    "mount cgroup": "checked(libc.mount(b'x', b'/tmp', b'cgroup', 0, None))",
    "unmount proc": "checked(libc.umount2(b'/proc', 2))",
    "unmount tmp": "checked(libc.umount2(b'/tmp', 2))",
    "unmount the interpreter": "checked(libc.umount2(os.fsencode(F['python']), 2))",
    "pivot_root": "os.mkdir('r'); call(155, 41, b'/tmp/r', b'/tmp/r')",
    "chroot": "os.chroot('/tmp')",
    "chroot and out of it": "os.mkdir('c'); fd = os.open('/', 0); os.chroot('c'); os.fchdir(fd); [os.chdir('..') for _ in range(9)]",
    "open_tree": "call(428, 428, -100, b'/', 1)",
    "fsopen": "call(430, 430, b'tmpfs', 0)",
    "fspick": "call(433, 433, -100, b'/', 0)",
    "fsmount": "call(432, 432, 0, 0, 0)",
    "fsconfig": "call(431, 431, 0, 6, 0, 0, 0)",
    "move_mount": "call(429, 429, -100, b'/tmp', -100, b'/proc', 0)",
    "mount_setattr": "call(442, 442, -100, b'/', 0, bytes(32), 32)",
    "statmount": "call(457, 457, bytes(32), bytes(64), 64, 0)",
    "swapon": "checked(libc.swapon(b'/tmp/x', 0))",
    "swapoff": "checked(libc.swapoff(b'/tmp/x'))",
    "acct": "checked(libc.acct(b'/tmp/x'))",
    "quotactl": "call(179, 60, 0, b'/', 0, 0)",
    "fanotify": "call(300, 262, 0, 0)",
}
PROCESSES = {
    "signal to the test": "os.kill(F['pid'], 0)",
    "signal to the test's parent": "os.kill(F['parent'], 0)",
    "kill the test's group": "os.killpg(F['pid'], 0)",
    "kill number 1": "os.kill(1, signal.SIGKILL); time.sleep(0.02); os.stat('/proc/1')",
    "stop number 1": "os.kill(1, signal.SIGSTOP); raise OSError('number 1 is still there: it reaps this process')",
    "interrupt number 1": "os.kill(1, signal.SIGINT); raise OSError('number 1 is still there: it reaps this process')",
    "pidfd of the test": "os.pidfd_open(F['pid'])",
    "pidfd kills number 1": "signal.pidfd_send_signal(os.pidfd_open(1), signal.SIGKILL); raise OSError('still there')",
    "tgkill": "call(234, 131, F['pid'], F['pid'], 0)",
    "queue a signal": "call(129, 138, F['pid'], 0, bytes(128))",
    "join the test's group": "os.setpgid(0, F['pid'])",
    "session of the test": "os.getsid(F['pid'])",
    "owner of signals": "fcntl.fcntl(0, fcntl.F_SETOWN, F['pid']); raise OSError('a number of another namespace')",
    "see a process": "assert len([n for n in os.listdir('/proc') if n.isdigit()]) > 4, 'only its own'",
    "limits of the test": "resource.prlimit(F['pid'], resource.RLIMIT_NOFILE)",
    "limits of number 1": "resource.prlimit(1, resource.RLIMIT_NOFILE, (1, 1))",
    "priority of number 1": "os.setpriority(os.PRIO_PROCESS, 1, 19)",
    "priority of all of the user": "os.setpriority(os.PRIO_USER, 0, 19)",
    "better priority": "os.nice(-5)",
    "processors of number 1": "os.sched_setaffinity(1, {0})",
    "scheduler": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "scheduler's attributes": "call(314, 274, 0, bytes(48), 0)",
    "priority of disks": "call(251, 30, 1, 1, 0)",
    "ptrace of number 1": "checked(libc.ptrace(16, 1, 0, 0))",
    "ptrace seize": "checked(libc.ptrace(0x4206, 1, 0, 0))",
    "ptrace me": "checked(libc.ptrace(0, 0, 0, 0))",
    "ptrace a child": "child = os.fork() or time.sleep(9)\ntry: checked(libc.ptrace(16, child, 0, 0))\nfinally: os.kill(child, 9)",
    "read another's memory": "call(310, 270, 1, bytes(16), 1, bytes(16), 1, 0)",
    "write another's memory": "call(311, 271, os.getpid(), bytes(16), 0, bytes(16), 0, 0)",
    "descriptors of number 1": "call(438, 438, os.pidfd_open(1), 0, 0)",
    "advise another": "call(440, 440, 0, bytes(16), 1, 4, 0)",
    "release another": "call(448, 448, 0, 0)",
    "compare processes": "call(312, 272, 1, os.getpid(), 0, 0, 0)",
    "memory of number 1 by proc": "os.open('/proc/1/mem', os.O_RDWR)",
    "move pages of number 1": "call(279, 239, 1, 0, 0, 0, 0, 0)",
    "migrate pages": "call(256, 238, 1, 0, 0, 0)",
}
PRIVILEGES = {
    "setuid": "os.setuid(0)",
    "setgid": "os.setgid(0)",
    "setgroups": "os.setgroups([0])",
    "setresuid": "os.setresuid(0, 0, 0)",
    "setreuid": "os.setreuid(-1, 0)",
    "setegid": "os.setegid(0)",
    "setfsuid": "assert libc.setfsuid(0) == 0 or libc.setfsuid(0) == 0, 'not user 0'",
    "capset": "call(126, 91, struct.pack('Ii', 0x20080522, 0), bytes([255]) * 24)",
    "capabilities held": "assert any(int(line.split()[1], 16) for line in open('/proc/self/status') if line.startswith('Cap')), 'none'",
    "bounding set": "assert any(libc.prctl(23, ctypes.c_ulong(n), 0, 0, 0) == 1 for n in range(41)), 'empty'",
    "ambient set": "checked(libc.prctl(47, ctypes.c_ulong(2), ctypes.c_ulong(21), 0, 0))",
    "securebits": "checked(libc.prctl(28, ctypes.c_ulong(0), 0, 0, 0))",
    "new privileges again": "checked(libc.prctl(38, ctypes.c_ulong(0), 0, 0, 0))",
    "filter off": "checked(libc.prctl(22, ctypes.c_ulong(0), 0, 0, 0))",
    "filter by seccomp": "call(317, 277, 1, 0, bytes(16))",
    "setuid program": (
        "import shutil; shutil.copy(F['python'], 'su'); os.chmod('su', 0o6755)\n"
        "done = os.spawnl(os.P_WAIT, './su', 'su', '-c', 'import os; os._exit(os.geteuid() == 1000 and os.getuid() == 1000)')\n"
        "assert done != 1, 'the same user'"
    ),
    "file capabilities": "open('f', 'w'); os.setxattr('f', 'security.capability', struct.pack('IIIII', 0x02000001, 1 << 21, 0, 0, 0))",
    "more memory": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "more processes": "resource.setrlimit(resource.RLIMIT_NPROC, (-1, -1))",
    "more processor time": "resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
    "more open files": "resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 16, 1 << 16))",
    "larger files": "resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))",
    "core files": "resource.setrlimit(resource.RLIMIT_CORE, (-1, -1))",
    "locked memory": "checked(libc.mlockall(3))",
    **{
        f"unshare {name}": f"call(272, 97, {flag:#x})"
        for name, flag in {
            **{"user": 0x10000000, "mount": 0x20000, "pid": 0x20000000, "net": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000},
            **{"cgroup": 0x02000000, "time": 0x80, "user and mount": 0x10020000},
        }.items()
    },
    **{
        f"clone into a new {name} namespace": f"call(56, 220, {flag:#x} | 17, 0, 0, 0, 0)"
        for name, flag in {"user": 0x10000000, "mount": 0x20000, "pid": 0x20000000, "net": 0x40000000}.items()
    },
    "clone3": "call(435, 435, struct.pack('QQQQQQQQ', 0x10000000, 0, 0, 0, 17, 0, 0, 0), 64)",
    "setns own": "call(308, 268, os.open('/proc/self/ns/net', 0), 0)",
    "setns of number 1": "call(308, 268, os.open('/proc/1/ns/user', 0), 0)",
    "setns by pidfd": "call(308, 268, os.pidfd_open(os.getppid()), 0x10000000)",
    "personality": "call(135, 92, 0x0040000)",
}
KERNEL = {
    "keyctl": "call(250, 219, 0, -3, 1)",
    "add_key": "call(248, 217, b'user', b'x', b'y', 1, -3)",
    "request_key": "call(249, 218, b'user', b'x', 0, -3)",
    "bpf": "call(321, 280, 0, bytes(128), 128)",
    "perf": "call(298, 241, bytes(128), 0, -1, -1, 0)",
    "userfaultfd": "call(323, 282, 0)",
    "kexec": "call(246, 104, 0, 0, 0, 0)",
    "kexec of a file": "call(320, 294, 0, 0, 0, 0, 0)",
    "module": "call(175, 105, bytes(64), 64, b'')",
    "module of a file": "call(313, 273, 0, b'', 0)",
    "module away": "call(176, 106, b'x', 0)",
    "reboot": "call(169, 142, 0, 0, 0, 0)",
    "host name": "call(170, 161, b'x', 1)",
    "domain name": "call(171, 162, b'x', 1)",
    "time of day": "call(164, 170, bytes(16), 0)",
    "clock": "call(227, 112, 0, bytes(16))",
    "clock's pace": "call(159, 171, bytes(208))",
    "kernel's log": "call(103, 116, 3, ctypes.create_string_buffer(64), 64)",
    "ports": "call(172, None, 3)",
    "one port": "call(173, None, 0x70, 1, 1)",
    "descriptor table": "call(154, None, 0, ctypes.create_string_buffer(64), 64)",
    "hang up": "call(153, 58)",
    "asynchronous files": "call(206, 0, 1, ctypes.create_string_buffer(8))",
    "memory policy": "call(238, 237, 0, 0, 0)",
    "anonymous file": "os.memfd_create('x')",
    "secret memory": "call(447, 447, 0)",
    "shared memory": "call(29, 194, 0, 1 << 20, 0o1600)",
    "message queue": "call(68, 186, 0, 0o1600)",
    "semaphores": "call(64, 190, 0, 1, 0o1600)",
    "posix queue": "call(240, 180, b'/x', 0o102, 0o600, 0)",
    "landlock": "call(444, 444, 0, 0, 1)",
    "lookup cookie": "call(212, 18, 0, 0, 0)",
    "a call that is newer than the table": "call(463, 463, 0)",
    "a call of the far future": "call(9999, 9999, 0)",
}
ATTEMPTS = {
    f"{kind}: {name}": code
    for kind, rows in {
        **{"network": NETWORK, "read": READ, "write": WRITE, "mount": MOUNT},
        **{"processes": PROCESSES, "privileges": PRIVILEGES, "kernel": KERNEL},
    }.items()
    for name, code in rows.items()
}
