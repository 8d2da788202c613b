"""The interface that a gang's workers name for gloo and NCCL."""

from __future__ import annotations

import os

import pytest

from moedisco_ray.execution.ray import interfaces
from moedisco_ray.execution.ray.interfaces import interface_variables, name_interface

ADDRESSES = [
    ("lo", "127.0.0.1"),
    ("lo", "::1"),
    ("lo", "00:00:00:00:00:00"),
    ("docker0", "172.17.0.1"),
    ("docker0", "fe80::42%docker0"),
    ("eth1", "10.0.0.7"),
    ("eth1", "2001:db8::7"),
    ("eth1:0", "10.0.0.8"),
    ("tun7001", "10.97.0.3"),
    ("tun7001", "fe80::7%tun7001"),
]


@pytest.mark.parametrize(
    ("address", "gloo", "nccl"),
    [
        ("10.0.0.7", "eth1", "=eth1"),
        ("10.0.0.8", "eth1:0", "=eth1"),
        ("2001:db8::7", "eth1", "=eth1"),
        ("fe80::7", "tun7001", "=tun7001"),
        ("127.0.0.1", "lo", "=lo"),
    ],
)
def test_the_interface_is_the_one_that_has_the_address(address: str, gloo: str, nccl: str) -> None:
    assert interface_variables(address, ADDRESSES) == {"GLOO_SOCKET_IFNAME": gloo, "NCCL_SOCKET_IFNAME": nccl}


@pytest.mark.parametrize("address", ["10.0.0.9", "203.0.113.5", ""])
def test_an_address_behind_a_translation_names_nothing(address: str) -> None:
    assert interface_variables(address, ADDRESSES) == {}


def test_a_variable_that_the_user_has_set_keeps_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"NCCL_SOCKET_IFNAME": "ib0"})
    monkeypatch.setattr(interfaces.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    name_interface()
    assert os.environ == {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "lo"}
