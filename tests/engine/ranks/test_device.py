import pytest

from engine.ranks.device import NoSuchAddress, device_of


def test_gloo_is_given_the_device_that_has_the_hosts_address():
    assert device_of("127.0.0.1") == "lo"
    with pytest.raises(NoSuchAddress, match=r"192\.0\.2\.1"):
        device_of("192.0.2.1")
