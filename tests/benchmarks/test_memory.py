"""What the benchmarks say of memory."""

import os
import time
from types import SimpleNamespace

import pynvml
import pytest
import torch

from benchmarks import memory


def test_resident_memory_of_a_call():
    size = 64 << 20

    def call():
        block = torch.ones(size, dtype=torch.uint8)
        time.sleep(0.2)  # longer than the sampling
        return block

    held = memory.process_bytes(call, "cpu")
    assert held is not None and 0.8 * size < held < 1.5 * size


class TestNvml:
    @pytest.fixture
    def driver(self, monkeypatch):
        """A driver that shows these processes; what was asked of it."""
        asked = SimpleNamespace(processes=[SimpleNamespace(pid=os.getpid(), usedGpuMemory=7)], closed=0)
        properties = SimpleNamespace(uuid="1-2")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: setattr(asked, "closed", asked.closed + 1))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: setattr(asked, "uuid", uuid))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda card: asked.processes)
        return asked

    def test_of_this_process(self, driver):
        driver.processes.insert(0, SimpleNamespace(pid=-1, usedGpuMemory=9))
        assert memory.nvml_bytes() == 7
        assert driver.uuid == "GPU-1-2" and driver.closed == 1

    def test_of_a_process_that_it_does_not_show(self, driver):
        driver.processes = []
        assert memory.nvml_bytes() is None

    def test_a_driver_that_does_not_say(self, driver, monkeypatch):
        def refuse(card):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

        monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", refuse)
        assert memory.nvml_bytes() is None and driver.closed == 1

    def test_no_driver(self, driver, monkeypatch):
        def missing():
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

        monkeypatch.setattr(pynvml, "nvmlInit", missing)
        assert memory.nvml_bytes() is None


def test_what_does_not_fit_is_skipped(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)
    memory.skip_unless_it_fits("a head", 0.8e9, "cpu")
    with pytest.raises(pytest.skip.Exception, match=r"a head needs 0\.85 GB, 1 GB are free"):
        memory.skip_unless_it_fits("a head", 0.85e9, "cpu")
