#!/bin/bash
# again.sh COMMAND...: runs it, and again when it dies, until it ends in good order (0) or cannot
# work as it was called (2). A SIGTERM is passed on, once however many come, and then it may end.
set -m # in a process group of its own: some Slurms signal the whole of ours
trap 'told=yes; trap "" TERM; kill -TERM $!' TERM
pause_s=1
while [ -z "$told" ]; do
    began=$SECONDS
    "$@" &
    wait $!
    code=$?
    if [ -n "$told" ]; then
        wait $! # the trap has ended the first wait
        exit 0
    fi
    case $code in 0 | 2) exit "$code" ;; esac
    [ $((SECONDS - began)) -lt 300 ] || pause_s=1
    echo "again.sh: $1 ended with $code; once more in $pause_s s" >&2
    sleep $pause_s &
    wait $!
    pause_s=$((pause_s < 32 ? pause_s * 2 : 60))
done
