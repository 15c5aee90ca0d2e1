"""Who has what: traits, latents, motion, site and family of every subject, and the ceilings.

A trait's latent ``z`` is what its place in the brain follows. With unit noise ``n``:

- classification: ``z = d · (label − ½) + n`` for labels 0 and 1, so that the classes lie Cohen's d
  apart. Nobody who sees only the brain ranks them better than AUROC Φ(d / √2).
- regression: ``z = r · v + √(1 − r²) · n`` with the standardised value v. Nobody predicts v better
  than with correlation r.

Every draw is seeded by what it is for and by the subject's number, so subject k is the same in a
cohort of any size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmrizoo.data.synthetic.config import SynthConfig, TraitConfig

# What a stream of random numbers is for: the first number of its key after the seed.
LABEL, VALUE, LATENT, FAMILY, MOTION, SITE, SCANNER, NETWORKS, RUN = range(9)
_LOWEST, _HIGHEST = -0.75, 0.95  # a pair's coupling, whatever its latent


@dataclass(frozen=True)
class Person:
    """One subject.

    Attributes:
        number: 0, 1, …; ``label`` is its name in BIDS.
        values: Standardised value (regression) or 0 and 1 (classification) by trait.
        latents: ``z`` by trait.
        couplings: Correlation of each of ``SynthConfig.pairs()``.
        amplitudes: Share of ``network_amplitude``, by network.
        motion: Mean framewise displacement in mm that its runs have.
        site, family: Numbers.
        gain, noise: Scale of the signal and of the noise at its site.
    """

    number: int
    values: dict[str, float]
    latents: dict[str, float]
    couplings: tuple[float, ...]
    amplitudes: tuple[float, ...]
    motion: float
    site: int
    family: int
    gain: float
    noise: float

    @property
    def label(self) -> str:
        """BIDS label; as long for a small cohort as for a large one."""
        return f"{self.number + 1:04d}"


def stream(seed: int, *key: int) -> np.random.Generator:
    """The random numbers of one purpose: a function of the key alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key])))


def ceiling(trait: TraitConfig) -> float:
    """AUROC (classification) or correlation (regression) of an observer who knows the latent."""
    if trait.kind == "classification":
        return 0.5 * (1 + math.erf(trait.effect / 2))  # Φ(d / √2)
    return trait.effect


def person(config: SynthConfig, number: int) -> Person:
    """Subject ``number`` (0, 1, …), whatever the size of the cohort."""
    family = number // config.family_size
    values, latents = {}, {}
    for index, (name, trait) in enumerate(config.traits.items()):
        value = _value(config, index, trait, number)
        noise = _latent_noise(config, index, number, family)
        values[name] = value
        if trait.kind == "classification":
            latents[name] = trait.effect * (value - 0.5) + noise
        else:
            latents[name] = trait.effect * value + math.sqrt(1 - trait.effect**2) * noise
    site = _site(config, number, values)
    scanner = stream(config.seed, SCANNER, site).standard_normal(2) if config.sites > 1 else (0, 0)
    couplings, amplitudes = _places(config, latents)
    return Person(
        number,
        values,
        latents,
        couplings,
        amplitudes,
        _motion(config, number, values),
        site,
        family,
        math.exp(config.site_gain * scanner[0]),
        math.exp(config.site_noise * scanner[1]),
    )


def cohort(config: SynthConfig) -> list[Person]:
    """Everybody."""
    return [person(config, number) for number in range(config.subjects)]


def cell(trait: TraitConfig, value: float) -> str:
    """How a value stands in participants.tsv."""
    if trait.kind == "classification":
        return trait.levels[int(value)]
    return f"{trait.mean + trait.sd * value:.6g}"


def _value(config: SynthConfig, index: int, trait: TraitConfig, number: int) -> float:
    if trait.kind == "regression":
        return float(stream(config.seed, VALUE, index, number).standard_normal())
    # The members of a family are each paired with one of the next: of a pair, one has each level.
    # The levels are thus balanced, and within a family they are independent.
    block, place = divmod(number, 2 * config.family_size)
    second, pair = divmod(place, config.family_size)
    first = int(stream(config.seed, LABEL, index, block, pair).integers(2))
    return float(first ^ second)


def _latent_noise(config: SynthConfig, index: int, number: int, family: int) -> float:
    own = float(stream(config.seed, LATENT, index, number).standard_normal())
    if config.family_size == 1:
        return own
    shared = float(stream(config.seed, FAMILY, index, family).standard_normal())
    share = config.family_correlation
    return math.sqrt(share) * shared + math.sqrt(1 - share) * own


def _standardised(trait: TraitConfig, value: float) -> float:
    return 2 * value - 1 if trait.kind == "classification" else value


def _motion(config: SynthConfig, number: int, values: dict[str, float]) -> float:
    by_trait = sum(t.motion * _standardised(t, values[n]) for n, t in config.traits.items())
    left = math.sqrt(max(0.0, 1 - sum(t.motion**2 for t in config.traits.values())))
    own = float(stream(config.seed, MOTION, number).standard_normal())
    return config.motion * math.exp(config.motion_spread * (by_trait + left * own))


def _site(config: SynthConfig, number: int, values: dict[str, float]) -> int:
    if config.sites == 1:
        return 0
    rng = stream(config.seed, SITE, number)
    chance, follows = int(rng.integers(config.sites)), rng.random() < config.site_bias
    if not config.site_trait or not follows:
        return chance
    trait = config.traits[config.site_trait]
    share = 0.5 * (1 + math.erf(_standardised(trait, values[config.site_trait]) / math.sqrt(2)))
    if trait.kind == "classification":
        share = 0.25 + 0.5 * values[config.site_trait]
    return min(int(share * config.sites), config.sites - 1)


def _places(
    config: SynthConfig, latents: dict[str, float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Couplings of the pairs and relative amplitudes of the networks."""
    places = config.places()
    amplitudes = [1.0] * config.networks
    # Below 2c − 1 the couplings would be no correlation matrix any more.
    lowest = max(_LOWEST, 2 * config.coupling_between - 0.95)
    usual = min(max(config.coupling, lowest), _HIGHEST)
    couplings = [usual] * len(config.pairs())
    where = {pair: i for i, pair in enumerate(config.pairs())}
    for name, trait in config.traits.items():
        shift = trait.gain * latents[name]
        if trait.where == "amplitude":
            amplitudes[places[name][0]] = math.exp(shift)
        else:
            wanted = math.tanh(math.atanh(usual) + shift)
            pair = (places[name][0], places[name][1])
            couplings[where[pair]] = min(max(wanted, lowest), _HIGHEST)
    return tuple(couplings), tuple(amplitudes)


def covariance(config: SynthConfig, couplings: tuple[float, ...]) -> NDArray[np.float64]:
    """Correlations ``(networks, networks)`` of the networks' time courses.

    ``c·11ᵀ`` plus 2 × 2 blocks ``[[1 − c, ρ − c], [ρ − c, 1 − c]]`` is positive definite for every
    ρ between 2c − 1 and 1.
    """
    found = np.full((config.networks, config.networks), config.coupling_between)
    np.fill_diagonal(found, 1.0)
    for (a, b), rho in zip(config.pairs(), couplings, strict=True):
        found[a, b] = found[b, a] = rho
    return found
