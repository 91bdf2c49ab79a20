"""Every Triton kernel compiles for GPUs that are not there, without spilled registers and with wide memory accesses: for the
16k tokens of a training step, for one token, and for a number that 16 does not divide."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests import ROOT

pytestmark = pytest.mark.integration

# Bound by memory: each must move 16 bytes at once per thread.
STREAMING = (
    "_gather_rows_kernel",
    "_swiglu_kernel",
    "_swiglu_backward_kernel",
    "_combine_kernel",
    "_zero_idle_experts_kernel",
    "jitter_kernel",
)


@pytest.fixture(
    scope="module", params=[pytest.param(80, id="sm_80", marks=pytest.mark.slow), pytest.param(90, id="sm_90")]
)
def kernels(request, tmp_path_factory) -> dict[str, list[dict]]:
    """What `tests.kernels.compiled_kernels` says of each, by name; compiled anew."""
    cache = tmp_path_factory.mktemp("triton-cache")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.compiled_kernels", str(request.param)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, list[dict]] = {}
    for line in done.stdout.splitlines():
        facts = json.loads(line)
        found.setdefault(facts["kernel"], []).append(facts)
    return found


def test_all_of_them_compile(kernels):
    in_files = set()
    for path in (ROOT / "grinmoe" / "kernels").glob("*.py"):
        in_files |= set(re.findall(r"^@triton\.jit.*\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert in_files == kernels.keys()


def test_none_spills_registers(kernels):
    assert not [facts for variants in kernels.values() for facts in variants if facts["stack_bytes"]]


def test_decoding_fits_into_the_shared_memory_of_every_card_from_sm_80_on(kernels):
    """A program may have 99 KB on sm_86, sm_89 and sm_120, and more on the others."""
    decoding = [facts for name in ("_gate_up_kernel", "_down_kernel") for facts in kernels[name]]
    assert 0 < max(facts["shared_bytes"] for facts in decoding) <= 99 * 1024


@pytest.mark.parametrize("name", STREAMING)
def test_what_memory_bounds_moves_sixteen_bytes_at_once(kernels, name):
    assert all(facts["widest_access_bits"] == 128 for facts in kernels[name])


# Whose decisions and draws equal the reference's, which rounds every product.
ROUNDED = ("router_kernel", "router_backward_kernel", "jitter_kernel")


def test_router_kernels_round_each_product(kernels):
    """By an option, not by Triton's default, which changes with 3.10."""
    assert not any(facts["fp_fusion"] for name in ROUNDED for facts in kernels[name])
    assert not any(facts["fused"] for name in ("router_backward_kernel", "jitter_kernel") for facts in kernels[name])
    # Sampling takes a logarithm, and the library's has fused steps of its own; choosing the largest has none.
    assert min(facts["fused"] for facts in kernels["router_kernel"]) == 0
