"""What is known of a cohort, as files: synth.json, truth.tsv, networks.nii.gz, participants.tsv."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from fmrizoo.config import typed_section
from fmrizoo.data.synthetic.cohort import Person, ceiling, cell
from fmrizoo.data.synthetic.config import SynthConfig
from fmrizoo.errors import DataError
from fmrizoo.files import canonical

SYNTH, TRUTH, NETWORKS_FILE = "synth.json", "truth.tsv", "networks.nii.gz"
SCHEMA = "fmrizoo.synth/1"
FORMAT = 1  # raise when the same settings would give other values
_NOT_VALUES = ("subjects", "sessions", "runs", "prepare")  # change no value of a run that they keep


def planted(config: SynthConfig) -> dict[str, Any]:
    """Effects with the ceilings of whoever sees only the brain.

    ``traits``: kind, effect, place and ``ceiling`` (AUROC, or correlation). ``conditions``: the
    network, % signal change and contrast-to-noise (% change / s.d. of the noise in a voxel of
    median brightness). ``pairs``: coupled networks, in the order of truth.tsv's columns.
    """
    places = config.places()
    return {
        "traits": {
            name: {
                "kind": trait.kind,
                "measure": "cohen_d" if trait.kind == "classification" else "correlation",
                "effect": trait.effect,
                "where": trait.where,
                "networks": list(places[name]),
                "ceiling_of": "auroc" if trait.kind == "classification" else "correlation",
                "ceiling": ceiling(trait),
            }
            for name, trait in config.traits.items()
        },
        "conditions": {
            name: {
                "network": config.condition_networks()[name],
                "percent": change,
                "contrast_to_noise": change * config.tsnr / 100,
            }
            for name, change in config.conditions.items()
        },
        "pairs": [list(pair) for pair in config.pairs()],
    }


def describe(config: SynthConfig, form: str) -> dict[str, Any]:
    """Content of synth.json; ``form`` is ``files`` or ``store``."""
    from fmrizoo import __version__

    return {
        "schema": SCHEMA,
        "format": FORMAT,
        "form": form,
        "code_version": __version__,
        "config": asdict(config),
        "planted": planted(config),
    }


def read_description(path: Path) -> tuple[SynthConfig, dict[str, Any]]:
    """Settings of a cohort, and all of its synth.json.

    Raises:
        DataError: not a synth.json, or one whose values this version would not give again.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema, form = content["schema"], content["format"]
        values = dict(content["config"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} does not describe a synthetic cohort: {error}") from None
    if schema != SCHEMA or form != FORMAT:
        raise DataError(
            f"{path} is of format {schema} {form}, this version makes {SCHEMA} {FORMAT}: write the "
            f"cohort anew in another folder"
        )
    config: SynthConfig = typed_section(SynthConfig, values)
    return config, content


@lru_cache(maxsize=4)
def read_cached(path: Path, modified: int) -> SynthConfig:
    """:func:`read_description`, once for all runs of a cohort."""
    return read_description(path)[0]


def digest(config: SynthConfig) -> str:
    """SHA-256 of all that decides a run's values, beside whose run it is and its grid."""
    values = {k: v for k, v in asdict(config).items() if k not in _NOT_VALUES}
    return hashlib.sha256(canonical({"format": FORMAT, "config": values})).hexdigest()


def participants_text(config: SynthConfig, people: list[Person]) -> str:
    """participants.tsv: what a study would know."""
    rows = [["participant_id", *config.traits, "site", "family"]]
    for someone in people:
        cells = [cell(trait, someone.values[name]) for name, trait in config.traits.items()]
        rows.append(
            [
                f"sub-{someone.label}",
                *cells,
                f"site{someone.site + 1}",
                f"f{someone.family + 1:04d}",
            ]
        )
    return _tsv(rows)


def truth_text(config: SynthConfig, people: list[Person]) -> str:
    """truth.tsv: what no study knows. ``<trait>_latent`` is z, ``<trait>_value`` standardised."""
    head = ["participant_id"]
    for name in config.traits:
        head += [f"{name}_value", f"{name}_latent"]
    head += [f"coupling_{a}_{b}" for a, b in config.pairs()]
    head += [f"amplitude_{n}" for n in range(config.networks)]
    rows = [[*head, "mean_displacement", "site_gain", "site_noise"]]
    for someone in people:
        numbers: list[float] = []
        for name in config.traits:
            numbers += [someone.values[name], someone.latents[name]]
        numbers += [*someone.couplings, *someone.amplitudes]
        numbers += [someone.motion, someone.gain, someone.noise]
        rows.append([f"sub-{someone.label}", *(f"{n:.9g}" for n in numbers)])
    return _tsv(rows)


def _tsv(rows: list[list[str]]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)
