"""Joules from a tree as Linux shows RAPL's counters, and from a library that plays NVML; never a guess without them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minibert.lab.measure.energy import Counter, Meter, Source, nvml, open_meter, rapl

RANGE = 262_143_328_850  # of an Intel server


def zone(root: Path, name: str, label: str, energy: int, largest: int = RANGE) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "max_energy_range_uj").write_text(f"{largest}\n")
    return counted(folder, energy)


def counted(folder: Path, energy: int) -> Path:
    (folder / "energy_uj").write_text(f"{energy}\n")
    return folder


def test_packages_and_their_memory_are_summed_and_nothing_twice(tmp_path: Path) -> None:
    zones = {
        name: zone(tmp_path, name, label, 1_000_000)
        for name, label in {
            "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram",
            "intel-rapl:1": "package-1", "intel-rapl:2": "psys",
        }.items()
    }  # fmt: skip
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5)  # the same package, by another way
    meter = open_meter(powercap=tmp_path)
    assert meter.why(on_cpu=True) == ""
    assert meter.source(with_gpu=False) == "RAPL package-0, RAPL dram of package-0, RAPL package-1"
    before = meter.read()
    for number, folder in enumerate(zones.values()):
        counted(folder, 1_000_000 + 10**number)  # core is 10, psys 10 000: neither is to be seen
    assert meter.joules(before, meter.read(), on_cpu=True) == pytest.approx(1101e-6)


def test_a_counter_that_starts_again_has_gone_on(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 1_000_000)
    meter = open_meter(powercap=tmp_path)
    before = meter.read()
    counted(folder, 2_500_000)
    assert meter.joules(before, meter.read(), on_cpu=True) == pytest.approx(3.5)


def test_one_that_goes_back_without_a_range_says_nothing(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    (folder / "max_energy_range_uj").unlink()
    meter = open_meter(powercap=tmp_path)
    before = meter.read()
    counted(folder, 50)
    assert meter.joules(before, meter.read(), on_cpu=True) is None


def test_a_counter_that_does_not_move_is_no_zero(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 100)
    still = zone(tmp_path, "intel-rapl:1", "package-1", 100)
    meter = open_meter(powercap=tmp_path)
    before = meter.read()
    counted(tmp_path / "intel-rapl:0", 200)
    assert meter.joules(before, meter.read(), on_cpu=True) is None
    counted(still, 300)
    assert meter.joules(before, meter.read(), on_cpu=True) == pytest.approx(300e-6)


def test_a_counter_that_goes_away_says_nothing(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    meter = open_meter(powercap=tmp_path)
    before = meter.read()
    (folder / "energy_uj").unlink()
    assert meter.joules(before, meter.read(), on_cpu=True) is None


def test_no_counters_is_said(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:2", "psys", 1)
    meter = open_meter(powercap=tmp_path)
    assert "has no intel-rapl:* of a package" in meter.why(on_cpu=True)
    assert meter.source(with_gpu=True) == ""
    assert meter.joules(meter.read(), meter.read(), on_cpu=True) is None
    assert "has no intel-rapl:*" in rapl(tmp_path / "nowhere").why


def test_counters_for_root_alone_are_said_and_none_is_left_out_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    shut = zone(tmp_path, "intel-rapl:1", "package-1", 1) / "energy_uj"
    read: Callable[..., str] = Path.read_text

    def as_a_user(path: Path, *arguments: Any, **options: Any) -> str:
        if path == shut:
            raise PermissionError(13, "Permission denied")
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", as_a_user)
    source = rapl(tmp_path)
    assert source.counters == ()
    assert str(shut) in source.why and "permission denied" in source.why and "chmod a+r" in source.why


def test_what_is_no_number_is_said(tmp_path: Path) -> None:
    (zone(tmp_path, "intel-rapl:0", "package-0", 1) / "energy_uj").write_text("much\n")
    assert "cannot be read: invalid literal" in rapl(tmp_path).why


# -------------------------------------------------------------------------------------------------------------- GPU


class NVMLError(Exception):
    """As pynvml has one."""


class PlayedNVML(SimpleNamespace):
    """GPUs of which each counts millijoules of its own."""

    NVMLError = NVMLError

    def __init__(self, *energies: int) -> None:
        super().__init__(energies=list(energies), fails=False)

    def nvmlInit(self) -> None:
        if self.fails:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.energies)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByPciBusId(self, bus: str) -> int:
        return int(bus.removeprefix("0000:"))

    def nvmlDeviceGetName(self, index: int) -> bytes:
        return f"Card {index}".encode()

    def nvmlDeviceGetTotalEnergyConsumption(self, index: int) -> int:
        return self.energies[index]


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PlayedNVML]:
    def play(*energies: int) -> PlayedNVML:
        library = PlayedNVML(*energies)
        monkeypatch.setitem(sys.modules, "pynvml", library)
        return library

    return play


def test_work_of_a_gpu_takes_the_processors_joules_too(tmp_path: Path, cards: Callable[..., PlayedNVML]) -> None:
    library = cards(7_000)
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = open_meter(gpu=True, powercap=tmp_path)
    assert meter.source(with_gpu=True) == "RAPL package-0, NVML Card 0"
    before = meter.read()
    counted(folder, 500_000)
    assert meter.joules(before, meter.read(), on_cpu=False) is None, "the card has not moved"
    assert meter.joules(before, meter.read(), on_cpu=True) == pytest.approx(0.5)
    library.energies[0] += 2_000
    assert meter.joules(before, meter.read(), on_cpu=False) == pytest.approx(2.5)
    assert meter.joules(before, meter.read(), on_cpu=True) == pytest.approx(0.5)


def test_of_several_gpus_the_one_that_cuda_uses_is_read(
    cards: Callable[..., PlayedNVML], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(10, 20)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "several GPUs" in nvml().why
    runtime = SimpleNamespace(getDevice=lambda: 0, deviceGetPCIBusId=lambda device: f"0000:{1 - device}")
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    (counter,) = nvml().counters
    assert (counter.name, counter.read()) == ("NVML Card 1", 20)


def test_what_the_gpu_lacks_is_said(
    tmp_path: Path, cards: Callable[..., PlayedNVML], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(1).fails = True
    assert nvml() == Source((), "NVML: Driver Not Loaded")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in nvml().why
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = open_meter(gpu=True, powercap=tmp_path)
    before = meter.read()
    counted(folder, 1_000_000)
    assert "pynvml" in meter.why(on_cpu=False) and meter.joules(before, meter.read(), on_cpu=False) is None
    assert meter.why(on_cpu=True) == "" and meter.joules(before, meter.read(), on_cpu=True) == pytest.approx(1)


def test_a_meter_of_the_processor_alone_does_not_answer_for_a_gpu() -> None:
    values = iter(range(10))
    meter = Meter(Source((Counter("played", lambda: next(values), 1.0),)))
    before, after = meter.read(), meter.read()
    assert meter.joules(before, after, on_cpu=True) == 1
    assert meter.joules(before, after, on_cpu=False) is None and meter.why(on_cpu=False)
