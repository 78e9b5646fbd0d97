"""Takes the network away from this process and from all that it starts, native programs included.

pytest-socket stops Python code of the test process alone. This is a seccomp filter
(https://docs.kernel.org/userspace-api/seccomp_filter.html): from then on the kernel refuses every
socket of an internet family, loopback too, with EACCES. It needs no rights and cannot be taken back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
import sys
from typing import Any

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # classic BPF: ld [k], jeq #k, ret #k
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16  # struct seccomp_data, little-endian
_SOCKET_CALL = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}  # AUDIT_ARCH_*, __NR_socket
_DENIED = (socket.AF_INET, socket.AF_INET6, socket.AF_PACKET)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def deny_network() -> None:
    """Deny it for good. Raises :class:`OSError` where the kernel or the architecture has no such filter."""
    if platform.machine() not in _SOCKET_CALL:
        raise OSError(errno.ENOSYS, f"no filter is written for {platform.machine()}")
    architecture, number = _SOCKET_CALL[platform.machine()]
    after = len(_DENIED)
    instructions = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_JUMP_IF_EQUAL, 0, after + 3, architecture),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_JUMP_IF_EQUAL, 0, after + 1, number),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
        *((_JUMP_IF_EQUAL, after - index, 0, family) for index, family in enumerate(_DENIED)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | errno.EACCES),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in instructions))
    program = _Program(len(instructions), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*call):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def end_at_a_connection() -> None:
    """From now on this process ends with code 77 when Python code in it looks up a name or connects to an address."""

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        internet = event == "socket.getaddrinfo" or (
            event in ("socket.connect", "socket.sendto") and arguments[0].family != socket.AF_UNIX
        )
        if internet:
            os.write(2, f"{event} {arguments[1:]}\n".encode())
            os._exit(77)

    sys.addaudithook(look)
