"""Whether this machine computes matrix products in bfloat16 faster than in float32."""

from __future__ import annotations

from pathlib import Path

import tensorflow as tf

_CPU_FLAGS = {"amx_bf16", "avx512_bf16"}
_FIRST_GPU = (8, 0)  # compute capability of the first NVIDIA GPUs with bfloat16 (Ampere)


def dtype_of_products(precision: str) -> tf.DType:
    """The type of the matrix products in training.

    Args:
        precision: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the processor, or every GPU, has it.
    """
    if precision == "auto":
        return tf.bfloat16 if has_bfloat16() else tf.float32
    return tf.as_dtype(precision)


def has_bfloat16(cpu_info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether all GPUs, or, where there is none, the processor have instructions for bfloat16.

    Args:
        cpu_info: Linux' description of the processor; where there is none, nothing is known and the answer is no.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = (tf.config.experimental.get_device_details(gpu) for gpu in gpus)
        return all(detail.get("compute_capability", (0, 0)) >= _FIRST_GPU for detail in details)
    try:
        lines = cpu_info.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return bool(_CPU_FLAGS & set(flags))
