"""Freed memory is kept while a run goes on and given back after it; peaks are measured."""

import platform
import resource
import subprocess
import sys

import pytest

# In a process of its own: what malloc keeps hangs on everything that was allocated before.
FAULTS = """
import resource, sys
import torch
from visiontrain.core.memory import kept_memory

def faults():
    for _ in range(20):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(2**24)  # 64 MiB, touched
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

torch.set_num_threads(1)
usual = faults()
with kept_memory():
    kept, inside = faults(), resident()
print(usual, kept, inside, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_and_given_back():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, check=True)
    usual, kept, inside, outside = map(int, done.stdout.split())
    block = 2**26 // resource.getpagesize()
    assert kept < usual / 10
    assert inside - outside > 0.9 * block


PEAK = """
import subprocess, sys
from visiontrain.core.memory import forget_peak, peak_rss_mb
child = "from visiontrain.core.memory import peak_rss_mb; print(peak_rss_mb())"
before = peak_rss_mb()
block = bytearray(b"x") * 2**28
others = subprocess.run([sys.executable, "-c", child], capture_output=True, check=True).stdout
del block
most = peak_rss_mb()
forget_peak()
print(before, most, peak_rss_mb(), float(others))
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="asks /proc")
def test_a_peak_is_of_one_process_since_it_was_forgotten():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, check=True)
    before, most, after, others = map(float, done.stdout.split())
    assert 250 < most - before < 300
    assert abs(after - before) < 20
    assert others < before + 20
