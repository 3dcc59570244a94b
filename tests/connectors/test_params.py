"""What clients or gateways put into kv_transfer_params is read once, strictly."""

import msgspec
import pytest

from connectors.errors import ProtocolError
from connectors.params import TransferParams, new_transfer_id, parse_params

ID = new_transfer_id()


def test_ids_are_long_and_never_the_same():
    assert len({new_transfer_id() for _ in range(100)}) == 100
    assert len(ID) == 32


@pytest.mark.parametrize("given", [None, {}, {"do_remote_decode": True}])
def test_params_of_others_are_no_concern(given):
    assert parse_params(given) is None


def test_both_halves():
    assert parse_params({"kvlane": {"transfer_id": ID, "role": "send"}, "other": 1}) == TransferParams(
        ID, "send"
    )
    receive = TransferParams(ID, "receive", "[fd00::1]:5600", 2)
    assert parse_params({"kvlane": msgspec.to_builtins(receive)}) == receive
    assert receive.address == ("fd00::1", 5600)


@pytest.mark.parametrize(
    "given",
    [
        7,
        {},
        {"transfer_id": "short", "role": "send"},
        {"transfer_id": ID.upper() + "Z", "role": "send"},
        {"transfer_id": ID, "role": "steal"},
        {"transfer_id": ID, "role": "receive"},
        {"transfer_id": ID, "role": "receive", "peer": "host"},
        {"transfer_id": ID, "role": "receive", "peer": "http://host:1/"},
        {"transfer_id": ID, "role": "receive", "peer": "host:1", "peer_tp_size": 0},
        {"transfer_id": ID, "role": "send", "blocks": [1]},
    ],
)
def test_malformed_params_are_refused(given):
    with pytest.raises(ProtocolError, match=r"kv_transfer_params\.kvlane"):
        parse_params({"kvlane": given})
