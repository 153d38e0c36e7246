"""Stand-ins for machines with NVIDIA's driver, CUDA, and an ONNX Runtime that is built for it."""

import ctypes
import sys

import onnxruntime

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class Driver:
    """NVIDIA's driver, as ctypes sees it."""

    def __init__(self, version=13020, gpus=("NVIDIA L4",), status=0):
        self.version, self.gpus, self.status = version, gpus, status

    def cuInit(self, flags):
        assert flags == 0
        return self.status

    def cuDriverGetVersion(self, version):
        return put(version, self.version)

    def cuDeviceGetCount(self, count):
        return put(count, len(self.gpus))

    def cuDeviceGet(self, device, number):
        return put(device, number + 40)

    def cuDeviceGetName(self, name, length, device):
        name.value = self.gpus[device.value - 40].encode()[: length - 1]
        return 0

    def cuDeviceTotalMem_v2(self, memory, device):
        return put(memory, (device.value - 39) * 24 * 2**30)

    def cuDeviceGetAttribute(self, value, attribute, device):
        return put(value, {75: 8, 76: 9}[attribute])


def put(reference, value):
    reference._obj.value = value
    return 0


def libraries(monkeypatch, found):
    """The shared libraries of a machine: by name, what loading each gives."""

    def load(name):
        if name not in found:
            raise OSError(f"{name}: cannot open shared object file")
        return found[name]

    monkeypatch.setattr(ctypes, "CDLL", load)


DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def cuda_built(monkeypatch, driver=None):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    libraries(monkeypatch, {DRIVER: driver} if driver else {})
