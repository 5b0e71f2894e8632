"""The network between nodes, before anything is sent: names and interfaces."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from accrete.launch.cluster.contract import INTERFACES, Place
from accrete.launch.cluster.network import interface_addresses
from accrete.launch.doctor.checks import Check, failure, ok, warning


def judge_network(
    place: Place,
    environment: Mapping[str, str],
    where: str,
    addresses: Mapping[str, str] | None = None,
) -> list[Check]:
    """Whether this node can find the first one, and through an interface that exists.

    Args:
        place: The launch.
        environment: What the processes of this node will find.
        where: Added to the checks' names.
        addresses: Interface -> IPv4 address; default: this machine's.
    """
    if place.nodes == 1:
        return []
    return [
        _master(place, where),
        _interface(environment, interface_addresses() if addresses is None else addresses, where),
    ]


def _master(place: Place, where: str) -> Check:
    name = f"first node{where}"
    try:
        found = socket.getaddrinfo(place.master_addr, place.master_port, type=socket.SOCK_STREAM)
    except OSError as error:
        return failure(
            name,
            f"MASTER_ADDR={place.master_addr}: {error}",
            "a name or address that all nodes know",
            "use the address of the first node's interface",
        )
    address = str(found[0][4][0])
    if address.startswith("127.") and not place.is_first:
        return failure(
            name,
            f"MASTER_ADDR={place.master_addr} is {address}, this node itself",
            "the address of the first node",
            "use the address of the first node's interface",
        )
    return ok(name, f"{place.master_addr} is {address}, port {place.master_port}")


def _interface(environment: Mapping[str, str], addresses: Mapping[str, str], where: str) -> Check:
    name = f"interface{where}"
    there = ", ".join(f"{key} {value}" for key, value in addresses.items())
    for variable in INTERFACES:
        # NCCL takes lists, prefixes and exclusions as well; only a plain name can be judged.
        wanted = environment.get(variable, "")
        if wanted and wanted[0] not in "^=" and "," not in wanted:
            exact = variable == INTERFACES[0]
            if not any(
                key == wanted or (key.startswith(wanted) and not exact) for key in addresses
            ):
                return failure(
                    name,
                    f"{variable}={wanted}: no such interface with an IPv4 address",
                    there or "none has an address",
                    f"set {variable} or network.interface in the cluster's settings",
                )
    chosen = environment.get(INTERFACES[0])
    if not chosen:
        return warning(
            name,
            f"none is named, and it cannot be told which one leads to the first node: {there}",
            "one named interface",
            f"set {' and '.join(INTERFACES)}, or network.interface in the cluster's settings",
        )
    return ok(name, f"{chosen} {addresses.get(chosen, '')}".strip())
