"""What is here, and all kernels compiled for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bench.gpu_check.part import Failed, Run, Skipped
from minibert.cli.options import machine as host

LIBRARIES = ("numpy", "ml_dtypes", "cupy-cuda12x", "cupy-cuda13x", "cupy", "torch", "triton", "transformers", "numba")
# Only asked, never set: the card's clocks and limits stay as they are.
ASKED = (
    "name", "driver_version", "memory.total", "memory.used", "utilization.gpu", "clocks.sm", "clocks.mem",
    "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu", "mig.mode.current", "ecc.mode.current",
)  # fmt: skip


def machine(run: Run) -> None:
    """Device, driver, libraries, clocks: what figures are to be read with."""
    run.keep(host=host(), versions={name: found for name in LIBRARIES if (found := installed(name))})
    run.keep(nvidia_smi=nvidia_smi(), load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None)
    backend = run.backend
    run.keep(backend=backend.describe(), multiprocessors=backend.multiprocessors, memory=backend.driver.memory()[1])
    run.keep(device="emulator" if run.emulated else device_facts(run))


def device_facts(run: Run) -> str:
    """Note what the CUDA runtime says of the device; its name."""
    import cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    run.keep(
        capability=f"{properties['major']}.{properties['minor']}",
        l2_bytes=int(properties.get("l2CacheSize", 0)),
        cuda_driver=runtime.driverGetVersion(),
        cuda_runtime=runtime.runtimeGetVersion(),
    )
    return str(properties["name"].decode())


def installed(name: str) -> str | None:
    """The version of a package, None without one."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def nvidia_smi() -> dict[str, str]:
    """What nvidia-smi answers; of what it does not know, nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"missing": "nvidia-smi is not on the PATH"}
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    found: dict[str, str] = {}
    for asked in (ASKED, *((one,) for one in ASKED)):  # all at once; where it refuses one, one by one
        command = [program, f"--id={first}", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError) as error:
            return {**found, "missing": str(error)}
        answers = [word.strip() for word in said.stdout.strip().split(",")]
        if said.returncode == 0 and len(answers) == len(asked):
            found.update(zip(asked, answers, strict=True))
        if len(found) == len(ASKED):
            break
    return found


def compile_all(run: Run) -> None:
    """Every variant of every launch table, on all cores; from here on they come from the cache on disk."""
    if run.emulated:
        raise Skipped("the emulator's compiler is g++, called when a kernel is first launched")
    import cupy

    from minibert.backends.cuda import nvrtc
    from minibert.backends.cuda.cupy_driver import architecture, driver_version
    from minibert.cli.build import plan

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    newest = (driver_version() or 0) // 1000
    arch = architecture(10 * properties["major"] + properties["minor"], newest)
    units, failures = plan()
    began = time.perf_counter()
    compiled: list[Any] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            pool.submit(nvrtc.compile_kernels, u.file.path, u.defines, arch, newest=newest): f"{u.family} {u.label}"
            for u in units
        }
        for job in as_completed(jobs):
            try:
                compiled.append(job.result())
            except Exception as error:
                failures.append(f"{jobs[job]}: {error}")
            run.say(f"{len(compiled)} of {len(units)} files for {arch}")
    run.keep(
        arch=arch, files=len(units), from_cache=sum(c.from_disk for c in compiled),
        seconds=round(time.perf_counter() - began, 2), failures=failures,
    )  # fmt: skip
    if failures:
        raise Failed(f"{len(failures)} of {len(units)} do not compile, the first: {failures[0]}")
