"""What a forward frees is there for the next one, without a page fault."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from engine.cpu.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults_of(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(size)[::4096] = bytes(size // 4096)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults_of(64 << 20)
print(faults_of(64 << 20))
"""


def _faults(mode):
    """Of the second use of 64 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_the_second_use_of_freed_memory_faults_no_pages():
    assert _faults("kept") * 10 < _faults("returned")
