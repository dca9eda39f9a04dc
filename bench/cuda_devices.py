"""What GPUs can do, by their published figures: limits of a multiprocessor, occupancy, and peaks of whole devices.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Occupancy: the formula of
cuda_occupancy.h in the CUDA toolkit, without its options for devices before 7.0; the tests hold it to that header.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
PARTITIONS = 4
REGISTERS = 65536
REGISTER_UNIT = 256
"""A warp's registers are rounded up to this."""


@dataclass(frozen=True, kw_only=True)
class Multiprocessor:
    """Limits of one multiprocessor, by compute capability."""

    warps: int
    blocks: int
    shared: int
    """Bytes for all its blocks."""
    shared_unit: int = 128
    reserved: int = 1024
    """Bytes that the driver takes of each block."""


KIB = 1024
MULTIPROCESSORS = {
    61: Multiprocessor(warps=64, blocks=32, shared=96 * KIB, shared_unit=256, reserved=0),
    70: Multiprocessor(warps=64, blocks=32, shared=96 * KIB, shared_unit=256, reserved=0),
    75: Multiprocessor(warps=32, blocks=16, shared=64 * KIB, shared_unit=256, reserved=0),
    80: Multiprocessor(warps=64, blocks=32, shared=164 * KIB),
    86: Multiprocessor(warps=48, blocks=16, shared=100 * KIB),
    89: Multiprocessor(warps=48, blocks=24, shared=100 * KIB),
    90: Multiprocessor(warps=64, blocks=32, shared=228 * KIB),
    100: Multiprocessor(warps=64, blocks=32, shared=228 * KIB),
    120: Multiprocessor(warps=48, blocks=24, shared=100 * KIB),
}


@dataclass(frozen=True, kw_only=True)
class Device:
    """Peaks of a GPU: what its maker states, at the boost clock."""

    name: str
    arch: int
    multiprocessors: int
    clock: float
    bandwidth: float
    """Of its memory, in bytes a second."""
    flops: float
    """fp32 without tensor cores, an addition and a multiplication in each lane a clock."""
    tensor_flops: float
    """bf16 or fp16 products summed in fp32, dense."""
    tensor_int8: float
    shared_optin: int
    """Bytes of shared memory that one block may ask for."""
    source: str

    @property
    def issue_rate(self) -> float:
        """Warp instructions a second: each of four schedulers starts one a clock."""
        return PARTITIONS * self.multiprocessors * self.clock

    @property
    def tf32_flops(self) -> float:
        """tf32 products summed in fp32, dense: half of those of 16 bits."""
        return self.tensor_flops / 2

    @property
    def special_rate(self) -> float:
        """exp2, reciprocal, square root: 16 lanes a multiprocessor and clock."""
        return 16.0 * self.multiprocessors * self.clock

    @property
    def dot_rate(self) -> float:
        """Additions and multiplications of int8 by dp4a: 64 lanes a multiprocessor and clock, 8 each."""
        return 8 * 64.0 * self.multiprocessors * self.clock


DEVICES = (
    Device(
        name="A100-SXM4-40GB",
        arch=80,
        multiprocessors=108,
        clock=1.41e9,
        bandwidth=1.555e12,
        flops=19.5e12,
        tensor_flops=312e12,
        tensor_int8=624e12,
        shared_optin=163 * KIB,
        source="NVIDIA A100 Tensor Core GPU Architecture, whitepaper, 2020",
    ),
    Device(
        name="H100-SXM5-80GB",
        arch=90,
        multiprocessors=132,
        clock=1.98e9,
        bandwidth=3.352e12,
        flops=66.9e12,
        tensor_flops=989.4e12,
        tensor_int8=1978.9e12,
        shared_optin=227 * KIB,
        source="NVIDIA H100 Tensor Core GPU Architecture, whitepaper 1.04, 2023",
    ),
)


def blocks_per_multiprocessor(arch: int, registers: int, threads: int, shared: int) -> int:
    """Return how many blocks of a kernel a multiprocessor holds at a time; 0: it cannot be launched.

    Args:
        arch: Compute capability; 86 is 8.6.
        registers: Of a thread.
        threads: Of a block.
        shared: Bytes of a block, static and dynamic together.
    """
    limits = MULTIPROCESSORS[arch]
    warps = -(-threads // WARP)
    found = [limits.blocks, limits.warps // warps]
    of_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    if of_warp:
        if of_warp * -(-warps // PARTITIONS) * PARTITIONS > REGISTERS:
            return 0
        found.append(REGISTERS // PARTITIONS // of_warp * PARTITIONS // warps)
    whole = -(-(shared + limits.reserved) // limits.shared_unit) * limits.shared_unit
    if whole:
        found.append(limits.shared // whole)
    return min(found)


def occupancy(arch: int, registers: int, threads: int, shared: int) -> float:
    """Return the share of a multiprocessor's warps that are there at a time."""
    warps = -(-threads // WARP)
    return blocks_per_multiprocessor(arch, registers, threads, shared) * warps / MULTIPROCESSORS[arch].warps
