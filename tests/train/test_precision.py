from pathlib import Path

import pytest
import tensorflow as tf

from caption_train.precision import dtype_of_products, has_bfloat16

pytestmark = pytest.mark.tf


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse avx512f amx_bf16 amx_tile", True),
        ("fpu avx512_bf16", True),
        ("fpu avx512f avx512bf16x", False),
        ("", False),
    ],
)
def test_the_processors_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, expected: bool) -> None:
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nmodel name\t: amx_bf16\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert has_bfloat16(info) is expected
    assert not has_bfloat16(tmp_path / "gone")


@pytest.mark.parametrize(("capabilities", "expected"), [([(8, 0)], True), ([(9, 0), (7, 5)], False), ([None], False)])
def test_gpus_decide_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int] | None], expected: bool
) -> None:
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: capabilities)
    monkeypatch.setattr(
        tf.config.experimental,
        "get_device_details",
        lambda capability: {"compute_capability": capability} if capability else {},
    )
    assert has_bfloat16() is expected


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr("caption_train.precision.has_bfloat16", lambda there=there: there)
        assert dtype_of_products("auto") == (tf.bfloat16 if there else tf.float32)
        assert dtype_of_products("float32") == tf.float32
        assert dtype_of_products("bfloat16") == tf.bfloat16
