"""Peak rates of the GPUs that a plan can be made for: tensor throughput, memory and link.

NVIDIA's figures for each product (data sheets and architecture white papers), without sparsity and
with fp32 accumulation, which GeForce boards before Hopper do at half their fp16 rate. They are
ceilings: no training reaches them. Used to rank plans for a device that is not there, never as a
promise.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RATES", "Rates"]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Operations and bytes a second."""

    flops: dict[str, float]
    """By format; one that is missing runs at fp32's rate."""
    bytes_per_s: float
    """Of memory."""
    link_bytes_per_s: float
    """To another GPU."""

    def flops_in(self, format_name: str) -> float:
        """Return the rate of matrix products whose factors have this format."""
        return self.flops.get(format_name, self.flops["fp32"])


# One way, sixteen lanes; data sheets name both ways together (32, 64 and 128 GB/s).
_PCIE = {3: 16, 4: 32, 5: 64}
# One way; data sheets name both ways together (V100 300, A100 600, A800 400, H100 900, B200 1,800).
_NVLINK = {"V100": 150, "A100": 300, "A800": 200, "H100": 450, "B200": 900}


def _rates(
    fp32: float, tf32: float | None, fp16: float, gb_per_s: float, link_gb_per_s: float
) -> Rates:
    """Turn teraflops and gigabytes a second into a row; without TF32 there is no bf16 either."""
    flops = {"fp32": fp32, "fp16": fp16} | ({} if tf32 is None else {"tf32": tf32, "bf16": fp16})
    return Rates(
        flops={name: rate * 1e12 for name, rate in flops.items()},
        bytes_per_s=gb_per_s * 1e9,
        link_bytes_per_s=link_gb_per_s * 1e9,
    )


RATES: dict[str, Rates] = {
    "t4": _rates(8.1, None, 65, 320, _PCIE[3]),
    "v100-16gb": _rates(15.7, None, 125, 900, _NVLINK["V100"]),
    "v100-32gb": _rates(15.7, None, 125, 900, _NVLINK["V100"]),
    "rtx2080ti": _rates(13.4, None, 53.8, 616, _PCIE[3]),
    "a100-40gb": _rates(19.5, 156, 312, 1555, _NVLINK["A100"]),
    "a100-80gb": _rates(19.5, 156, 312, 2039, _NVLINK["A100"]),
    "a800-80gb": _rates(19.5, 156, 312, 2039, _NVLINK["A800"]),
    "a30": _rates(10.3, 82, 165, 933, _PCIE[4]),
    "a10": _rates(31.2, 62.5, 125, 600, _PCIE[4]),
    "a6000": _rates(38.7, 77.4, 154.8, 768, _PCIE[4]),
    "rtx3060": _rates(12.7, 12.7, 25.5, 360, _PCIE[4]),
    "rtx3070": _rates(20.3, 20.3, 40.6, 448, _PCIE[4]),
    "rtx3080": _rates(29.8, 29.8, 59.5, 760, _PCIE[4]),
    "rtx3090": _rates(35.6, 35.6, 71, 936, _PCIE[4]),
    "l4": _rates(30.3, 60, 121, 300, _PCIE[4]),
    "l40s": _rates(91.6, 183, 362, 864, _PCIE[4]),
    "rtx4070": _rates(29.1, 29.1, 58.3, 504, _PCIE[4]),
    "rtx4080": _rates(48.7, 48.7, 97.5, 717, _PCIE[4]),
    "rtx4090": _rates(82.6, 82.6, 165.2, 1008, _PCIE[4]),
    "h100": _rates(67, 494, 989, 3350, _NVLINK["H100"]),
    "h100-pcie": _rates(51, 378, 756, 2000, _PCIE[5]),
    "gh200": _rates(67, 494, 989, 4000, _NVLINK["H100"]),
    "h200": _rates(67, 494, 989, 4800, _NVLINK["H100"]),
    "b200": _rates(75, 1100, 2250, 8000, _NVLINK["B200"]),
    "rtx5080": _rates(56.3, 56.3, 112.6, 960, _PCIE[5]),
    "rtx5090": _rates(104.8, 104.8, 209.5, 1792, _PCIE[5]),
}
