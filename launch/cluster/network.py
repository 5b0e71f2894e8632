"""Which network interface a node reaches its peers through."""

from __future__ import annotations

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915


def find_interface(master_addr: str) -> str | None:
    """The interface on the way to the first node; None if that cannot be told.

    The first node itself often resolves its own name to 127.0.1.1: then it takes the interface of
    the default route, or the only one it has.
    """
    addresses = interface_addresses()
    own = _own_address(master_addr)
    for name, address in addresses.items():
        if address == own and not address.startswith("127."):
            return name
    default = _default_route()
    if default in addresses:
        return default
    outside = [name for name, address in addresses.items() if not address.startswith("127.")]
    return outside[0] if len(outside) == 1 else None


def interface_addresses() -> dict[str, str]:
    """The IPv4 address of every interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _own_address(peer: str) -> str | None:
    """This machine's address on the way to `peer`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError:
            return None
        address: str = probe.getsockname()[0]
        return address


def _default_route() -> str | None:
    try:
        with open("/proc/net/route", encoding="ascii") as table:
            for line in table.readlines()[1:]:
                name, destination, *_ = line.split()
                if destination == "00000000":
                    return name
    except OSError:
        pass
    return None
