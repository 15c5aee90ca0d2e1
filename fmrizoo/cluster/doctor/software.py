"""Checks of what is installed. Each is a function of values, so that it can be shown any machine.

Packages whose import can take a process down (compiled kernels, DeepSpeed) are tried in a process
of their own: :func:`probe`.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from fmrizoo.cluster.doctor.line import Line, broken, ok, warning

NAME = "fmrizoo"
ROOT = Path(__file__).resolve().parents[3]
REINSTALL = "pip install --force-reinstall --no-deps fmrizoo"
Installed = Callable[[str], str | None]  # version of a distribution; None: not installed


def installed(name: str) -> str | None:
    """Version of the distribution ``name``; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def declared(root: Path = ROOT) -> tuple[str, list[str]]:
    """(bounds on Python, requirements with extras' markers) of this fmrizoo.

    From the checkout that it runs from (what pip wrote down there may be of an older one), else
    from the installed package; both are empty where there is neither.

    Args:
        root: Folder above the package.
    """
    file = root / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == NAME:
            extras = project.get("optional-dependencies", {})
            optional = [_marked(text, extra) for extra, some in extras.items() for text in some]
            return project["requires-python"], [*project["dependencies"], *optional]
    try:
        own = metadata.metadata(NAME)
    except metadata.PackageNotFoundError:
        return "", []
    return own["Requires-Python"] or "", metadata.requires(NAME) or []


def _marked(text: str, extra: str) -> str:
    """The requirement as an installed package's metadata put it."""
    needed, _, marker = text.partition(";")
    also = f"({marker.strip()}) and " if marker else ""
    return f'{needed.strip()}; {also}extra == "{extra}"'


def python(bounds: str, version: str) -> Line:
    """Python against ``requires-python``."""
    if Version(version) in SpecifierSet(bounds):
        return ok("Python", version)
    return broken("Python", f"{version}, needs {bounds}", "make an environment with Python 3.12")


def packages(requirements: Sequence[str], found: Installed) -> list[Line]:
    """One line for all that fit their bounds, and one for each that does not."""
    if not requirements:
        fix = "pip install fmrizoo"
        return [broken("packages", "fmrizoo is not installed as a package", fix)]
    lines, fitting = [], 0
    for text in requirements:
        needed = Requirement(text)
        if "extra" in str(needed.marker or "") or not _applies(needed):
            continue
        line = _package(needed, found(needed.name), broken)
        fitting += line is None
        lines += [line] if line else []
    return [ok("packages", f"{fitting} within pyproject's bounds"), *lines]


def extras(requirements: Sequence[str], found: Installed) -> list[Line]:
    """What optional packages are there. That one is missing is no fault; a wrong version is."""
    there: dict[str, str] = {}
    missing, lines = [], []
    for text in requirements:
        needed = Requirement(text)
        names = [n for n in ("mamba", "mup", "understand", "bench") if _of_extra(needed, n)]
        if not names or needed.name == NAME:
            continue
        version = found(needed.name)
        if version is None:
            missing.append(f"{needed.name} [{names[0]}]")
        elif line := _package(needed, version, warning):
            lines.append(line)
        else:
            there[needed.name] = version
    said = ", ".join(f"{name} {version}" for name, version in there.items()) or "none"
    said += f"; not installed: {', '.join(missing)}" if missing else ""
    return [ok("optional packages", said), *lines]


def _applies(needed: Requirement) -> bool:
    return needed.marker is None or needed.marker.evaluate({"extra": ""})


def _of_extra(needed: Requirement, extra: str) -> bool:
    marker = needed.marker
    return marker is not None and not _applies(needed) and marker.evaluate({"extra": extra})


def _package(
    needed: Requirement, version: str | None, fault: Callable[[str, str, str], Line]
) -> Line | None:
    """None where the version fits."""
    bounds = str(needed.specifier)
    fix = f"pip install '{needed.name}{bounds}'"
    if version is None:
        return fault(needed.name, f"not installed, needs {bounds}", fix)
    # Builds for a device carry a local part, 2.8.0+cu128, and count as their release.
    if not needed.specifier.contains(Version(version).public, prereleases=True):
        return fault(needed.name, f"{version}, needs {bounds}", fix)
    return None


@dataclass(frozen=True)
class Probe:
    """How an import in a process of its own ended.

    Attributes:
        code: Exit code; negative: killed by that signal.
        said: Last line of what it printed, or of its error.
    """

    code: int
    said: str


def probe(code: str, environment: Mapping[str, str], seconds: float = 120) -> Probe:
    """Run ``code`` in a new Python."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=dict(environment),
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return Probe(-1, f"no answer within {seconds:g} s")
    text = done.stderr if done.returncode else done.stdout
    lines = text.strip().splitlines() or [f"no output, exit code {done.returncode}"]
    return Probe(done.returncode, lines[-1])


ASK_DEEPSPEED = (
    "import deepspeed; from deepspeed.accelerator import get_accelerator as a; "
    "print(deepspeed.__version__, a()._name)"
)


def deepspeed(found: Probe, device: str) -> Line:
    """Does DeepSpeed import, and which device does it take (:data:`ASK_DEEPSPEED`)."""
    name = "DeepSpeed"
    if found.code:
        return broken(name, f"cannot be imported: {found.said}", "pip install 'deepspeed>=0.19'")
    version, _, accelerator = found.said.rpartition(" ")
    if accelerator != device:
        said = f"{version} takes {accelerator}, the device is {device}"
        return warning(name, said, f"export DS_ACCELERATOR={device}")
    return ok(name, f"{version}, accelerator {accelerator}")


def mamba(probes: Mapping[str, Probe | None], device: str) -> Line:
    """Which scan NeuroMamba would compute with.

    Args:
        probes: How each package's import ended; None: not installed.
        device: ``cpu``, ``cuda`` or ``xpu``.
    """
    name, fix = "Mamba kernels", "pip install --no-build-isolation 'fmrizoo[mamba]'"
    missing = [package for package, found in probes.items() if found is None]
    if device != "cuda":
        there = "not needed" if missing else "not used"
        return ok(name, f"scan backend torch on {device} (CUDA kernels {there})")
    if missing:
        return warning(name, f"scan backend torch: {', '.join(missing)} not installed", fix)
    for package, found in probes.items():
        if found is not None and found.code:
            again = (
                f"pip install --force-reinstall --no-build-isolation {package.replace('_', '-')}"
            )
            return broken(name, f"{package} cannot be imported: {found.said}", again)
    return ok(name, f"scan backend mamba_ssm ({', '.join(probes)})")


def fast_libraries(found: Installed) -> Line:
    """isal for checksums, deflate for stores of the codec gzip."""
    name = "fast checksums, inflate"
    missing = [package for package in ("isal", "deflate") if found(package) is None]
    if not missing:
        return ok(name, f"isal {found('isal')}, deflate {found('deflate')}")
    said = f"zlib stands in for {', '.join(missing)}, several times slower"
    return warning(name, said, f"pip install {' '.join(missing)}")


def hdf5(h5py: str, library: str, locking: str | None) -> Line:
    """h5py and its HDF5. fmrizoo reads without HDF5's locks whatever the environment says."""
    name, said = "HDF5", f"{library}, h5py {h5py}"
    if Version(library) < Version("1.12"):
        return warning(name, f"{said}: older than 1.12", "pip install --force-reinstall h5py")
    if locking is not None:
        said += f", HDF5_USE_FILE_LOCKING={locking} (fmrizoo reads without locks)"
    return ok(name, said)


def integrity(recipes: int, registries: Mapping[str, int], sample: bool) -> list[Line]:
    """Is the installed package whole: recipes, registered components, the sample recording."""
    lines = []
    empty = [name for name, count in registries.items() if not count]
    if not recipes:
        lines.append(broken("recipes", "none found", REINSTALL))
    if empty:
        lines.append(broken("registry", f"no {' and no '.join(empty)}", REINSTALL))
    if not sample:
        lines.append(broken("sample recording", "its files are missing", REINSTALL))
    if lines:
        return lines
    counts = ", ".join(f"{count} {name}" for name, count in registries.items())
    return [ok("package", f"{recipes} recipes, {counts}, sample recording")]


def python_version() -> str:
    """Of this process."""
    return platform.python_version()
