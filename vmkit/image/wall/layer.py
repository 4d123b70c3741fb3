"""The wall's kernel layer for one kernel: a loader that attaches its two programs, made when the image is built.

The kernel attaches a program to a hook by the hook's BTF type id, which only a walk through all types finds. So the
walk is done here, and the guest checks that its kernel has the same bytes in the same places. The links are pinned in
the guest's bpffs, closed to all but root: they outlive the loader. Pure.
"""

import re
import struct

from vmkit.image.wall.btf import Btf, BtfFunction, Mark, find_functions, parse_btf
from vmkit.image.wall.loader import Loader, Place
from vmkit.image.wall.programs import make_bind_program, make_connect_program

LOADER_PATH = "usr/lib/vmkit/raise-wall"
VSHD_PORT = 9001

_CONNECT, _BIND = "bpf_lsm_socket_connect", "bpf_lsm_socket_bind"
# The program's own licence, not the project's: the kernel demands one that it counts as GPL-compatible.
_LICENSE = "Dual MIT/GPL"
_BTF_PATH = "/sys/kernel/btf/vmlinux"
_BPFFS = "/sys/fs/bpf"
# arch/x86/entry/syscalls/syscall_64.tbl.
_OPEN, _PREAD64, _MOUNT, _BPF = 2, 17, 165, 321
_O_CLOEXEC = 0o2000000
# linux/mount.h: MS_NOSUID, MS_NODEV, MS_NOEXEC.
_MOUNT_FLAGS = 2 | 4 | 8
# linux/bpf.h: enum bpf_cmd, bpf_prog_type, bpf_attach_type, and the members of union bpf_attr.
_PROG_LOAD, _OBJ_PIN, _RAW_TRACEPOINT_OPEN = 5, 6, 17
_PROG_TYPE_LSM, _BPF_LSM_MAC = 29, 27
_LOAD_ATTR = struct.Struct("<IIQQIIQII16sIIIIQIIQIIII")
_LOAD_INSNS_AT, _LOAD_LICENSE_AT = 8, 16
_OPEN_ATTR = struct.Struct("<QII")
_OPEN_FD_AT = 8
_PIN_ATTR = struct.Struct("<QII")
_PIN_PATH_AT, _PIN_FD_AT = 0, 8
_INSTRUCTION_BYTES = 8

_OTHER_KERNEL = "this is not the kernel that the image was built with"


def make_loader(btf_data: bytes, cids: tuple[int, ...], port: int) -> bytes:
    """The program that raises the layer in a guest with this BTF. Raises BtfError when the BTF does not serve.

    cids: whom guest processes may connect to beside the host; port: vshd's.
    """
    btf = parse_btf(btf_data)
    functions = find_functions(btf, (_CONNECT, _BIND))
    loader = Loader()
    _check_kernel(loader, btf, functions)
    mount = (loader.text("bpf"), loader.text(_BPFFS), loader.text("bpf"), _MOUNT_FLAGS, loader.text("mode=0700"))
    loader.call("the kernel has no bpffs", _MOUNT, *mount)
    programs = {
        "vshd_connect": (functions[_CONNECT], make_connect_program(cids)),
        "vshd_bind": (functions[_BIND], make_bind_program(port)),
    }
    links = {name: _attach(loader, name, function, code) for name, (function, code) in programs.items()}
    for name, pin in links.items():
        loader.call(f"the program {name} cannot be pinned", _BPF, _OBJ_PIN, pin, _PIN_ATTR.size)
    return loader.render()


def find_vshd_port(flags: object) -> int:
    """The vsock port that vshd's flags name, the last one; without one, vshd's own."""
    port = VSHD_PORT
    for flag in flags if isinstance(flags, tuple) else ():
        found = re.fullmatch(r"--?listen=vsock:([0-9]{1,10})", str(flag))
        port = int(found[1]) if found else port
    return port


def _check_kernel(loader: Loader, btf: Btf, functions: dict[str, BtfFunction]) -> None:
    marks: list[Mark] = [btf.header]
    for function in functions.values():
        marks += [function.record, function.text]
    path = loader.text(_BTF_PATH)
    seen = loader.data(bytes(max(len(mark.data) for mark in marks)))
    # The descriptor is used by five calls, and a result goes to one: it is 3, the first that is free.
    loader.call("the kernel has no BTF", _OPEN, path, _O_CLOEXEC)
    for mark in marks:
        loader.call("the kernel's BTF cannot be read", _PREAD64, 3, seen, len(mark.data), mark.offset)
        loader.compare(_OTHER_KERNEL, seen, loader.data(mark.data), len(mark.data))


def _attach(loader: Loader, name: str, function: BtfFunction, code: bytes) -> Place:
    """Loads a program and attaches it; the place of the attributes that its link is to be pinned with."""
    count = len(code) // _INSTRUCTION_BYTES
    load = loader.data(
        _LOAD_ATTR.pack(
            _PROG_TYPE_LSM, count, 0, 0, 0, 0, 0, 0, 0, name.encode(), 0, _BPF_LSM_MAC, 0, 0, 0, 0, 0, 0, 0,
            function.type_id, 0, 0,
        ),
        [(_LOAD_INSNS_AT, loader.data(code)), (_LOAD_LICENSE_AT, loader.text(_LICENSE))],
    )  # fmt: skip
    attach = loader.data(_OPEN_ATTR.pack(0, 0, 0))
    pin = loader.data(_PIN_ATTR.pack(0, 0, 0), [(_PIN_PATH_AT, loader.text(f"{_BPFFS}/{name}"))])
    loader.call(
        f"the kernel refuses the program {name}", _BPF, _PROG_LOAD, load, _LOAD_ATTR.size,
        result_to=attach.at(_OPEN_FD_AT),
    )  # fmt: skip
    loader.call(
        f"the kernel does not attach the program {name}", _BPF, _RAW_TRACEPOINT_OPEN, attach, _OPEN_ATTR.size,
        result_to=pin.at(_PIN_FD_AT),
    )  # fmt: skip
    return pin
