"""What a synthetic cohort is made of: every number with its unit, checked when it is set."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fmrizoo.config import PrepareConfig, read_values, typed_section
from fmrizoo.registry import suggest
from fmrizoo.sections import one_of, require

KINDS = ("classification", "regression")
PLACES = ("coupling", "amplitude")
OWN_COLUMNS = ("participant_id", "site", "family")  # of participants.tsv, beside the traits
_MOST_NETWORKS = 24
_LEVEL = re.compile(r"[\w.+-]+")  # what a table and a file name can hold


@dataclass
class TraitConfig:
    """One column of participants.tsv, and how strongly the brain carries it."""

    kind: str = ""  # classification (two levels) | regression
    effect: float = (
        0.0  # classification: Cohen's d ≥ 0; regression: correlation in [-1, 1]; 0: null
    )
    where: str = "coupling"  # coupling (of two networks) | amplitude (of one): what carries it
    networks: list[int] = field(default_factory=list)  # 0, 1, …; empty: the next free ones
    gain: float = 0.3  # per s.d. of the latent: Fisher z of the coupling, or log of the amplitude
    levels: list[str] = field(default_factory=lambda: ["no", "yes"])  # classification, low and high
    mean: float = 0.0  # regression: of the column
    sd: float = 1.0  # regression: of the column
    motion: float = 0.0  # correlation with (log) motion: a confound on purpose; [-1, 1]


DEFAULT_TRAITS: dict[str, dict[str, Any]] = {
    "sex": {"kind": "classification", "effect": 0.8, "levels": ["F", "M"]},
    "age": {"kind": "regression", "effect": 0.5, "where": "amplitude", "mean": 30.0, "sd": 4.0},
}


@dataclass
class SynthConfig:
    """A cohort. Parts are switched off by 0 (``temporal=white``, ``conditions={}``)."""

    subjects: int = 20
    sessions: int = 1  # per subject
    runs: int = 1  # per session
    frames: int = 200  # per run
    tr: float = 2.0  # seconds
    seed: int = 0  # of people and noise
    network_seed: int = 0  # of where the networks lie; keep it, and cohorts share their brain
    prepare: PrepareConfig = field(default_factory=PrepareConfig)  # grid; codec of --store

    traits: dict[str, TraitConfig] = field(default_factory=dict)  # by column
    family_size: int = 1  # subjects in a family
    family_correlation: float = 0.5  # of the latents' noise within a family
    sites: int = 1
    site_gain: float = 0.1  # s.d. over sites of the log of the signal's scale
    site_noise: float = 0.2  # s.d. over sites of the log of the noise's s.d.
    site_trait: str = ""  # trait that the site goes along with: a confound on purpose
    site_bias: float = 0.8  # share of subjects whose site follows site_trait; the rest: by chance

    level: float = 8000.0  # median of the brain's mean image; values are whole numbers below 32768
    tsnr: float = 56.5  # median of mean / s.d. of the noise alone; all in all about 54
    smoothness: float = 3.19  # mm, FWHM of the noise's kernel: neighbour correlation 0.58 at 2 mm
    temporal: str = "ar1"  # of the noise: ar1 | one_over_f | white
    lag1: float = 0.37  # ar1: correlation of neighbouring frames
    exponent: float = 0.7  # one_over_f: power ~ 1 / frequency^exponent
    drift: float = 0.5  # % signal, s.d. over time
    physiology: float = 0.2  # % signal, s.d. over time of breathing and of the heart beat, each
    dropout: float = 0.85  # share of the signal lost in the middle of a hole over a sinus or ear
    motion: float = 0.15  # mm, median over subjects of the mean framewise displacement
    motion_spread: float = 0.4  # s.d. over subjects of the log of it
    motion_left: float = 0.05  # share of its effect on edges that realignment leaves
    spin: float = 0.5  # % signal lost for every mm of framewise displacement

    networks: int = 8
    network_size: float = 30.0  # mm, FWHM of a network's blob; one in each hemisphere
    network_amplitude: float = 1.0  # % signal in the middle of a blob, s.d. over time
    low: float = 0.01  # Hz, band of the networks' time courses
    high: float = 0.1  # Hz
    coupling: float = 0.3  # correlation of the networks of a pair (0–1, 2–3, …)
    coupling_between: float = 0.1  # correlation of networks of different pairs

    task: str = ""  # BIDS task; empty: rest, or synth with conditions
    conditions: dict[str, float] = field(
        default_factory=dict
    )  # % signal change of a long block, in a network each, from the last one down
    design: str = "block"  # block | event
    duration: float = 16.0  # seconds, of a block; events last 1 s
    pause: float = 12.0  # seconds between blocks; between events 2 s to it

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_numbers()
        for name, trait in self.traits.items():
            _check_trait(name, trait, self.networks)
        require(
            sum(t.motion**2 for t in self.traits.values()) <= 1,
            "traits.*.motion: the squares of all correlations with motion add up to more than 1",
        )
        require(
            not self.site_trait or self.site_trait in self.traits,
            f"site_trait={self.site_trait!r} is no trait."
            f"{suggest(self.site_trait, [*self.traits])}",
        )
        require(
            len(self.conditions) <= self.networks,
            f"{len(self.conditions)} conditions need a network each, got networks={self.networks}",
        )
        for name, change in self.conditions.items():
            require(
                bool(_LEVEL.fullmatch(name)) and abs(change) <= 50,
                f"conditions: {name!r}: {change}: give a name of letters, digits, . and -, and a "
                f"number of % signal change up to 50",
            )
        self.places()

    def _check_counts(self) -> None:
        for key, least in (
            ("subjects", 1), ("sessions", 1), ("runs", 1), ("frames", 8), ("family_size", 1),
            ("sites", 1), ("seed", 0), ("network_seed", 0), ("networks", 1),
        ):  # fmt: skip
            value = getattr(self, key)
            require(value >= least, f"{key} must be ≥ {least}, got {value}")
        most = f"networks must be ≤ {_MOST_NETWORKS}, got {self.networks}"
        require(self.networks <= _MOST_NETWORKS, most)
        one_of("temporal", self.temporal, ("ar1", "one_over_f", "white"))
        one_of("design", self.design, ("block", "event"))
        require(
            self.task.isalnum() or not self.task, f"task={self.task!r} is letters and digits only"
        )
        grid = self.prepare
        require(
            grid.space.startswith("MNI152"),
            f"the synthetic brain is the MNI152 one: prepare.space={grid.space!r} does not fit",
        )
        for key in ("mask", "dummy_scans", "tr", "target_tr", "confounds"):
            value, usual = getattr(grid, key), getattr(PrepareConfig(), key)
            require(
                value == usual,
                f"prepare.{key}={value}: synthetic runs are written as they are; leave it at "
                f"{usual} here and set it when you prepare the files",
            )

    def _check_numbers(self) -> None:
        for key, low, high in (
            ("tr", 0.05, 30), ("level", 100, 20000), ("tsnr", 1, 1e4), ("smoothness", 0, 50),
            ("lag1", -0.99, 0.99), ("exponent", 0, 2), ("drift", 0, 20), ("physiology", 0, 20),
            ("dropout", 0, 1), ("motion", 0, 20), ("motion_spread", 0, 2), ("motion_left", 0, 1),
            ("spin", 0, 20), ("network_size", 4, 100), ("network_amplitude", 0, 20),
            ("family_correlation", 0, 1), ("site_gain", 0, 1), ("site_noise", 0, 1),
            ("site_bias", 0, 1), ("coupling_between", 0, 0.9), ("duration", 0.1, 1e4),
            ("pause", 2, 1e4),
        ):  # fmt: skip
            value = getattr(self, key)
            require(
                low <= value <= high, f"{key} must be between {low:g} and {high:g}, got {value:g}"
            )
        require(
            0 < self.low < self.high and self.low < 0.5 / self.tr,
            f"low={self.low:g} and high={self.high:g} Hz are no band below the "
            f"{0.5 / self.tr:.3g} Hz that tr={self.tr:g} s can show",
        )
        require(
            2 * self.coupling_between - 1 < self.coupling < 1,
            f"coupling={self.coupling:g} must lie between 2 × coupling_between − 1 and 1",
        )

    def places(self) -> dict[str, tuple[int, ...]]:
        """Networks of every trait: two for a coupling, one for an amplitude.

        Raises:
            RecipeError: a network is in two couplings, two amplitudes, or none is free.
        """
        named = [n for t in self.traits.values() for n in t.networks]
        free = [n for n in range(self.networks) if n not in named]
        found: dict[str, tuple[int, ...]] = {}
        taken: dict[tuple[str, int], str] = {}
        for name, trait in self.traits.items():
            need = 2 if trait.where == "coupling" else 1
            mine = tuple(trait.networks) or tuple(free[:need])
            free = free if trait.networks else free[need:]
            require(
                len(mine) == need,
                f"traits.{name} finds no free network among {self.networks}: raise networks, or "
                f"set traits.{name}.networks",
            )
            for network in mine:
                other = taken.setdefault((trait.where, network), name)
                require(
                    other == name,
                    f"traits {other} and {name} both change the {trait.where} of network "
                    f"{network}: give one of them other networks",
                )
            found[name] = mine
        return found

    def pairs(self) -> list[tuple[int, int]]:
        """Coupled networks: those of the traits, then the rest in order (an odd one is alone)."""
        places = self.places()
        pairs = [
            (places[name][0], places[name][1])
            for name, trait in self.traits.items()
            if trait.where == "coupling"
        ]
        left = [n for n in range(self.networks) if not any(n in pair for pair in pairs)]
        return pairs + list(zip(left[::2], left[1::2], strict=False))

    def condition_networks(self) -> dict[str, int]:
        """Network that each condition drives, from the last one down."""
        return {name: self.networks - 1 - i for i, name in enumerate(self.conditions)}

    @property
    def task_name(self) -> str:
        """BIDS task of the runs."""
        return self.task or ("synth" if self.conditions else "rest")


def _check_trait(name: str, trait: TraitConfig, networks: int) -> None:
    key = f"traits.{name}"
    require(
        name.isidentifier() and name not in OWN_COLUMNS,
        f"{key}: {name!r} becomes a column: use letters, digits and _, and not "
        f"{', '.join(OWN_COLUMNS)}",
    )
    require(bool(trait.kind), f"{key}.kind is missing: classification or regression")
    one_of(f"{key}.kind", trait.kind, KINDS)
    one_of(f"{key}.where", trait.where, PLACES)
    if trait.kind == "classification":
        require(
            0 <= trait.effect <= 10,
            f"{key}.effect={trait.effect:g}: Cohen's d lies between 0 and 10 (exchange the levels "
            f"for the other direction)",
        )
        require(
            len(set(trait.levels)) == 2 and all(_LEVEL.fullmatch(level) for level in trait.levels),
            f"{key}.levels needs two names of letters, digits, . and -, got {list(trait.levels)}",
        )
    else:
        require(
            -1 <= trait.effect <= 1,
            f"{key}.effect={trait.effect:g}: a correlation lies between -1 and 1",
        )
        require(0 < trait.sd < math.inf, f"{key}.sd must be > 0, got {trait.sd:g}")
        require(math.isfinite(trait.mean), f"{key}.mean must be a number, got {trait.mean}")
    require(0 < trait.gain <= 2, f"{key}.gain must be in (0, 2], got {trait.gain:g}")
    require(-1 <= trait.motion <= 1, f"{key}.motion={trait.motion:g}: a correlation is in [-1, 1]")
    need = 2 if trait.where == "coupling" else 1
    require(
        len(set(trait.networks)) in (0, need) and len(trait.networks) in (0, need),
        f"{key}.networks needs {need} for where={trait.where}, got {list(trait.networks)}",
    )
    for network in trait.networks:
        require(
            0 <= network < networks,
            f"{key}.networks: there is no network {network}, they are 0 to {networks - 1}",
        )


def load_synth_config(
    source: Path | dict[str, Any] | None = None, overrides: Sequence[str] = ()
) -> SynthConfig:
    """Settings from a YAML file or a dict, and dotted ``key=value`` strings, which win.

    A trait may be a number alone, its effect: ``traits={sex: 0.8}`` for the names of
    ``DEFAULT_TRAITS``. ``traits={…}`` names all traits, ``traits.sex=…`` changes one.

    Raises:
        RecipeError: an unknown key, a wrong type, values that contradict.
    """
    values = {} if source is None else read_values(source)
    whole = [item for item in overrides if item.startswith("traits=")]
    given = read_values([item for item in overrides if item not in whole])
    traits = values.pop("traits", DEFAULT_TRAITS)
    if whole:
        traits = read_values(whole[-1:])["traits"]
    changed = given.pop("traits", {})
    for named in (traits, changed):
        require(
            isinstance(named, dict) and all(isinstance(v, _TRAIT) for v in named.values()),
            f"traits={named!r}: write traits={{sex: 0.8}} or traits.sex.effect=0.8",
        )
    full = {}
    for name in {**traits, **changed}:  # in this order
        full[name] = {
            **DEFAULT_TRAITS.get(name, {}),
            **_as_section(traits.get(name, {})),
            **_as_section(changed.get(name, {})),
        }
    config: SynthConfig = typed_section(SynthConfig, values, given, {"traits": full})
    return config


_TRAIT = (int, float, dict)


def _as_section(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"effect": value}


def prepare_arguments(config: SynthConfig) -> list[str]:
    """``prepare.…=…`` overrides that bring the cohort's files into a store."""
    usual, wanted = asdict(PrepareConfig()), asdict(config.prepare)
    usual.pop("qc"), wanted.pop("qc")
    shown = {k: v for k, v in wanted.items() if v != usual[k]}
    return [f"prepare.{k}={str(v).replace(' ', '')}" for k, v in shown.items()]
