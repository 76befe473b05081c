"""Where a server listens: whether an address and port can be had, said before the work and not after it."""

from __future__ import annotations

import errno
import socket

from quadapt.errors import ConfigError


def check_port(host: str, port: int) -> None:
    """Check that a server can listen on a port.

    Raises:
        ConfigError: It is taken, or not allowed, or the address is not one of this machine.
    """
    listening(host, port).close()


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens on a port; requests wait in it until a server takes it.

    Raises:
        ConfigError: It is taken, or not allowed, or the address is not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise ConfigError(f"host={host!r} is no address that is known here. Use 127.0.0.1 or 0.0.0.0") from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was closed a moment ago is free
        found.bind(address)
        found.listen()
    except OSError as error:
        found.close()
        raise ConfigError(_why_not(host, port, error)) from None
    return found


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port={port} is taken by another program. Use another --port, or --port 0 for a free one"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port={port} is not allowed to this user ({error.strerror}). Use a --port from 1024 on"
    return f"host={host!r} cannot be listened on ({error.strerror}). Use an address of this machine, such as 127.0.0.1"
