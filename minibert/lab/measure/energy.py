"""Joules that work took, by the counters of the machine: RAPL's of the processor, NVML's of an NVIDIA GPU.

Linux shows RAPL (Running Average Power Limit: Intel SDM volume 3, section "Platform specific power management support")
as `intel-rapl:*` in /sys/class/powercap, for AMD's processors too: microjoules since some moment, which start again
beyond `max_energy_range_uj`. Summed are the packages and the memory beside them ("dram"), not the cores within a
package, nor the platform ("psys") around it. NVML counts millijoules of a whole GPU.

A counter cannot tell whose the joules are: of everything that ran at that time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from minibert.errors import pip_install

POWERCAP = Path("/sys/class/powercap")


class Counter(NamedTuple):
    """One counter of energy."""

    name: str
    read: Callable[[], int]  # raises OSError or RuntimeError where it cannot be read any more
    unit: float  # joules
    range: int = 0  # the value beyond which it starts again from 0; 0: it does not

    def joules(self, before: int, after: int) -> float | None:
        """Between two readings; None where it did not move, or went back and nobody knows from where."""
        if after < before and not self.range:
            return None
        moved = after - before + (self.range if after < before else 0)
        return moved * self.unit if moved else None


class Source(NamedTuple):
    """Counters that are read together; none, and why."""

    counters: tuple[Counter, ...]
    why: str = ""


class Reading(NamedTuple):
    """What the counters of both sources showed at one moment; None for one that could not be read."""

    cpu: tuple[int | None, ...] = ()
    gpu: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Meter:
    """Read before and after a stretch of work."""

    cpu: Source
    gpu: Source | None = None  # None: no work of a GPU is measured

    def read(self) -> Reading:
        return Reading(_read(self.cpu), _read(self.gpu) if self.gpu else ())

    def joules(self, before: Reading, after: Reading, on_cpu: bool) -> float | None:
        """Between two readings: of the processor, and for work of a GPU of that as well.

        None where a counter is missing, or did not move: its steps are coarser than that work.
        """
        counters, starts, ends = self.cpu.counters, before.cpu, after.cpu
        if self.why(on_cpu):
            return None
        if not on_cpu and self.gpu is not None:
            counters, starts, ends = counters + self.gpu.counters, starts + before.gpu, ends + after.gpu
        total = 0.0
        for counter, start, end in zip(counters, starts, ends, strict=True):
            spent = None if start is None or end is None else counter.joules(start, end)
            if spent is None:
                return None
            total += spent
        return total

    def why(self, on_cpu: bool) -> str:
        """Why the joules of work there cannot be known; empty where they can."""
        gpu = "" if on_cpu else self.gpu.why if self.gpu else "the GPU's counter was not asked for"
        return "; ".join(filter(None, (self.cpu.why, gpu)))

    def source(self, with_gpu: bool) -> str:
        """The counters' names; empty where there is none."""
        read = [self.cpu, *([self.gpu] if with_gpu and self.gpu else [])]
        return ", ".join(counter.name for source in read for counter in source.counters)


def open_meter(gpu: bool = False, powercap: Path = POWERCAP) -> Meter:
    """A meter of the counters that can be read here; `gpu`: work of an NVIDIA GPU is to be measured too."""
    return Meter(rapl(powercap), nvml() if gpu else None)


def _read(source: Source) -> tuple[int | None, ...]:
    values: list[int | None] = []
    for counter in source.counters:
        try:
            values.append(counter.read())
        except (OSError, RuntimeError, ValueError):
            values.append(None)
    return tuple(values)


# -------------------------------------------------------------------------------------------------------- processor


def rapl(powercap: Path = POWERCAP) -> Source:
    """The processor's counters: all of them, or none and why."""
    zones = {zone: _text(zone / "name") for zone in sorted(powercap.glob("intel-rapl:*"))}
    counters = []
    for zone, name in zones.items():
        if not (name.startswith("package") or name == "dram"):
            continue
        file = zone / "energy_uj"
        try:
            int(file.read_text())
            largest = int(_text(zone / "max_energy_range_uj") or 0)
        except PermissionError:
            remedy = "only root may read it; `sudo chmod a+r` on it lasts until the next start"
            return Source((), f"RAPL: {file}: permission denied: {remedy}")
        except (OSError, ValueError) as error:
            return Source((), f"RAPL: {file} cannot be read: {error}")
        counters.append(Counter(_named(zone, name, zones), _reader(file), 1e-6, largest))
    if not counters:
        missing = f"{powercap} has no intel-rapl:* of a package (virtual machines and most containers have none)"
        return Source((), f"RAPL: {missing}")
    return Source(tuple(counters))


def _named(zone: Path, name: str, zones: dict[Path, str]) -> str:
    """Two packages each have memory of the name "dram"."""
    owner = zones.get(zone.with_name(zone.name.rpartition(":")[0]), "")
    return f"RAPL {name}" + (f" of {owner}" if owner else "")


def _reader(file: Path) -> Callable[[], int]:
    return lambda: int(file.read_text())


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


# -------------------------------------------------------------------------------------------------------------- GPU


def nvml() -> Source:
    """The counter of the GPU that CUDA uses, or why there is none."""
    try:
        library = import_module("pynvml")
    except ImportError:
        return Source((), f"NVML: pynvml is not installed: {pip_install('nvidia-ml-py')}")
    try:
        library.nvmlInit()
        gpu = _gpu(library)

        def read() -> int:
            try:
                return int(library.nvmlDeviceGetTotalEnergyConsumption(gpu))
            except library.NVMLError as error:
                raise RuntimeError(str(error)) from error

        read()
        name = library.nvmlDeviceGetName(gpu)
    except (library.NVMLError, RuntimeError) as error:
        return Source((), f"NVML: {error}")
    return Source((Counter(f"NVML {name.decode() if isinstance(name, bytes) else name}", read, 1e-3),))


def _gpu(library: Any) -> Any:
    """NVML's handle of the GPU that CUDA uses: the two number them differently."""
    if library.nvmlDeviceGetCount() == 1:
        return library.nvmlDeviceGetHandleByIndex(0)
    try:
        runtime = import_module("cupy").cuda.runtime
    except ImportError:
        raise RuntimeError("there are several GPUs, and without cupy nothing says which one is used") from None
    return library.nvmlDeviceGetHandleByPciBusId(runtime.deviceGetPCIBusId(runtime.getDevice()))
