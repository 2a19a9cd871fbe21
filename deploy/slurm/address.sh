#!/bin/bash
# The address by which other hosts reach this one: what SGLANG_HOST_IP says, or the one that the device
# GLOO_SOCKET_IFNAME has, or that of the host's name.
if [ -n "$SGLANG_HOST_IP" ]; then
    echo "$SGLANG_HOST_IP"
elif [ -n "$GLOO_SOCKET_IFNAME" ]; then
    ip -4 -oneline address show dev "${GLOO_SOCKET_IFNAME%%,*}" |
        sed -E 's/.* inet ([0-9.]+).*/\1/;q'
else
    hostname --ip-address | sed 's/ .*//'
fi
