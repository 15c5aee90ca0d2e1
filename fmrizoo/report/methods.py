"""A methods section to paste: what the run folders say was done, with the works to cite.

Every sentence is made from recorded facts (contracts, recipes, splits, versions); what was not
recorded is not claimed. Citations are those of what was really used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fmrizoo.report import sections
from fmrizoo.report.citations import WORKS, Reference
from fmrizoo.report.collect import Evidence, Run
from fmrizoo.report.words import TaskReport, grouped, trained_words

_BACKBONES: dict[str, tuple[str, tuple[str, ...]]] = {
    "swin4d": (
        "a Swin transformer with joint windows in space and time (SwiFT)",
        ("kim2023swift", "liu2021swin"),
    ),
    "swin_factorized": (
        "a Swin transformer with attention in time and in space by turns and rotary positions",
        ("kim2023swift", "liu2021swin", "su2024roformer"),
    ),
    "neuromamba": (
        "a state-space model over the patches inside the brain (Mamba-2 blocks)",
        ("dao2024mamba2",),
    ),
}
_OBJECTIVES: dict[str, tuple[str, tuple[str, ...]]] = {
    "simmim": ("hidden patches are filled in (SimMIM)", ("xie2022simmim",)),
    "autoregressive": ("the next step is predicted", ()),
}
_HEADS: dict[str, tuple[str, ...]] = {"lora": ("hu2022lora",), "prompt": ("jia2022vpt",)}
_HAXBY = {"face", "house", "scrambledpix"}
_PACKAGES = {
    "torch": ("PyTorch", "paszke2019pytorch"),
    "deepspeed": ("DeepSpeed", "rasley2020deepspeed"),
    "nibabel": ("nibabel", ""),
    "numpy": ("NumPy", ""),
    "h5py": ("h5py", ""),
}


@dataclass(frozen=True)
class WriteUp:
    """A methods section.

    Attributes:
        parts: (heading, sentences) in the order to read them; empty without runs.
        references: The works cited, by first author and year.
    """

    parts: tuple[tuple[str, str], ...]
    references: tuple[Reference, ...]

    @property
    def text(self) -> str:
        """Plain text: a paragraph for each part, then the references."""
        found = [f"{heading}. {said}" for heading, said in self.parts]
        listed = [reference.text for reference in self.references]
        return "\n\n".join([*found, *(["References\n\n" + "\n".join(listed)] if listed else [])])

    @property
    def bibtex(self) -> str:
        """All references."""
        return "\n\n".join(reference.bibtex for reference in self.references)


@dataclass
class _Cited:
    """Collects what is cited."""

    keys: set[str] = field(default_factory=set)

    def __call__(self, *keys: str) -> str:
        """`` (Kim et al., 2023; Liu et al., 2021)``; nothing for no key."""
        known = [key for key in keys if key]
        self.keys |= set(known)
        return f" ({'; '.join(WORKS[key].short for key in known)})" if known else ""

    def sorted(self) -> tuple[Reference, ...]:
        works = (WORKS[key] for key in self.keys)
        return tuple(sorted(works, key=lambda work: (work.authors[0], work.year)))


def write_up(evidence: Evidence, tasks: Sequence[TaskReport]) -> WriteUp:
    """The methods section of everything that was found."""
    cite = _Cited()
    parts = (
        ("Data and preprocessing", _data(evidence, tasks, cite)),
        ("Models", _models(evidence, cite)),
        ("Training", _training(evidence, cite)),
        ("Tasks and scores", " ".join(_tasks(evidence, tasks, cite))),
        ("Splits", _splits(evidence)),
        ("Statistics", _statistics(tasks, cite)),
        ("Software", _software(evidence, tasks, cite)),
    )
    return WriteUp(tuple((name, said) for name, said in parts if said), cite.sorted())


def _data(evidence: Evidence, tasks: Sequence[TaskReport], cite: _Cited) -> str:
    said = []
    if any(set(task.task.classes) >= _HAXBY for task in tasks):
        said.append(f"The object categories are those of a published study{cite('haxby2001')}.")
    for _, rows in sections.data(evidence):
        v = dict(rows)
        clips = re.sub(r"every 1\b", "every frame", v["clips"])
        placed = "kept in their own voxels"
        if v["space"] != "native":
            placed = f"in {v['space']} space"
        said.append(
            f"Functional runs were {placed} ({v['orientation']} axes, {v['grid (voxels)']} voxels "
            f"of {v['voxel size (mm)']} mm, repetition time {v['repetition time (s)']} s). They "
            f"were normalised by {v['normalisation']!r} (statistics: {v['statistics over']}; "
            f"outside the brain: {v['outside the brain']}) and cut into clips ({clips})."
        )
        said.append(
            _counts(
                v["runs trained on (over all folds)"],
                v["runs tested on (over all folds)"],
                v["subjects tested"],
            )
        )
    return " ".join(filter(None, said))


def _counts(trained: str, tested: str, subjects: str) -> str:
    """How many runs each job saw, in words."""
    on = f"Over all folds {trained} of these runs were trained on" if trained.isdigit() else ""
    if not tested.isdigit():
        return f"{on}." if on else ""
    people = f"{subjects} subject{'' if subjects == '1' else 's'}"
    return f"{on} and {tested} tested on, of {people}." if on else f"{tested} were tested on."


def _models(evidence: Evidence, cite: _Cited) -> str:
    said = []
    for name in _named(evidence.runs, "backbone"):
        what, keys = _BACKBONES.get(name, ("", ()))
        own = [r for r in evidence.runs if _name(r.recipe.get("backbone")) == name]
        sizes = sorted({int(r.model["parameters"]) for r in own if r.model.get("parameters")})
        with_size = f"; {_range(sizes)} parameters, decoders and heads included" if sizes else ""
        said.append(f"Encoder {name}: {what or 'of its own kind'}{cite(*keys)}{with_size}.")
    for name in _named(evidence.runs, "objective"):
        what, keys = _OBJECTIVES.get(name, ("", ()))
        said.append(f"Pretraining objective {name}: {what or 'of its own kind'}{cite(*keys)}.")
    for name, trained in dict.fromkeys(
        (r.result.head, r.result.train_encoder) for r in evidence.runs if r.result and r.result.head
    ):
        words = trained_words(name, str(trained))
        said.append(f"Head {name}: {words}{cite(*_HEADS.get(str(name), ()))}.")
    return " ".join(said)


def _training(evidence: Evidence, cite: _Cited) -> str:
    """Steps, clips, rates: pretraining, then fine-tuning; equal settings are said once."""
    said = []
    kinds = {
        "Pretraining, without labels": [r for r in evidence.runs if r.pretraining],
        "Fine-tuning": [r for r in evidence.runs if r.recipe.get("head")],
    }
    for kind, runs in kinds.items():
        settings = [t for r in runs if isinstance(t := r.recipe.get("train"), dict)]
        if not settings:
            continue
        count = len({run.owner or run.folder for run in runs})
        facts = {
            "{} steps": "steps",
            "{} clips a step": "batch_size",
            "peak learning rate {}": "lr",
            "weight decay {}": "weight_decay",
            "precision {}": "precision",
            "seed {}": "seed",
        }
        known = [w.format(v) for w, key in facts.items() if (v := _values(settings, key))]
        said.append(
            f"{kind} ({count} run{'s' if count > 1 else ''}): AdamW"
            f"{cite('loshchilov2019adamw')} with linear warm-up and cosine decay; "
            f"{', '.join(known)}."
        )
    if any(_name(r.recipe.get("parametrization")) == "mup" for r in evidence.runs):
        said.append(
            f"Widths were scaled by the maximal update parametrisation{cite('yang2021mup')}."
        )
    return " ".join(said)


def _tasks(evidence: Evidence, tasks: Sequence[TaskReport], cite: _Cited) -> list[str]:
    """The paragraphs of :func:`sections.methods` on tasks and baselines, with what they cite."""
    pretraining = len(sections.methods(evidence, ()))
    said = sections.methods(evidence, tasks)[pretraining:]
    if any(task.baselines for task in tasks):
        said.append(f"Baselines were fitted with scikit-learn{cite('pedregosa2011sklearn')}.")
    return said


def _splits(evidence: Evidence) -> str:
    groups: dict[str, set[str]] = {}
    for run in evidence.runs:
        split = run.recipe.get("split")
        if not isinstance(split, dict) or not run.result:
            continue
        if not {"by", "folds", "validation", "seed"} <= split.keys():
            continue
        words = (
            f"No {split['by']} is in two parts: {split['folds']} folds, "
            f"{100 * split['validation']:.0f} % of what is not tested held out for validation, "
            f"seed {split['seed']}"
        )
        groups.setdefault(words, set()).add(run.result.split_sha)
    return " ".join(
        f"{words}; split files {', '.join(sorted(sha[:8] for sha in hashes))} (SHA-256)."
        for words, hashes in groups.items()
    )


def _statistics(tasks: Sequence[TaskReport], cite: _Cited) -> str:
    found = dict.fromkeys(
        (gap.group, gap.n_groups, gap.n_units)
        for task in tasks
        for pair in task.verdict.pairs
        if (gap := pair.gap)
    )
    said = [
        f"Rows were compared on the {units} test units that both predicted, seeds averaged; 95 % "
        f"intervals are of a bootstrap over "
        + (f"{groups} whole {group}s." if group != "unit" else "single units.")
        for group, groups, units in found
    ]
    if said:
        said.append(
            "Paired p-values are of sign flips over the same groups (of the bootstrap for metrics "
            f"that a single unit does not have), corrected after Holm{cite('holm1979')} over the "
            "comparisons of a task; p-values against chance are of permuted labels"
            f"{cite('phipson2010permutation')}. Over several folds the spreads behind intervals of "
            "differences and p-values are √2 wider, because each unit's label helped to train the "
            "models that other folds were tested by."
        )
    return " ".join(said)


def _software(evidence: Evidence, tasks: Sequence[TaskReport], cite: _Cited) -> str:
    found = dict(sections.environment(evidence))
    if not found:
        return ""
    versions = {k.removesuffix(" version"): v for k, v in found.items() if k.endswith(" version")}
    words = [f"fmrizoo {versions['fmrizoo']}"] if "fmrizoo" in versions else []
    for package, (name, key) in _PACKAGES.items():
        if package in versions:
            words.append(f"{name} {versions[package]}{cite(key)}")
    if _uses_nilearn(evidence, tasks):
        words.append(f"nilearn {versions.get('nilearn', '')}".strip() + cite("abraham2014nilearn"))
    python = f" under Python {found['python']}" if "python" in found else ""
    device = f" on {found['device']}" if "device" in found else ""
    return f"Runs were made with {', '.join(words)}{python}{device}." if words else ""


def _uses_nilearn(evidence: Evidence, tasks: Sequence[TaskReport]) -> bool:
    """Runs were resampled, masked or cleaned with it, or a baseline is made with it."""
    resampled = any(r.contract.get("space") not in (None, "native") for r in evidence.runs)
    asked = (s for r in evidence.runs if isinstance(s := r.recipe.get("prepare"), dict))
    made = any(s.get("confounds") or s.get("mask") in ("compute", "template") for s in asked)
    return resampled or made or any("tangent" in r.name.lower() for t in tasks for r in t.rows)


def _named(runs: Iterable[Run], section: str) -> list[str]:
    return sorted({name for run in runs if (name := _name(run.recipe.get(section)))})


def _name(section: Any) -> str:
    return str(section.get("name", "")) if isinstance(section, dict) else ""


def _range(values: Sequence[int]) -> str:
    low, high = grouped(values[0]), grouped(values[-1])
    return low if low == high else f"{low} to {high}"


def _values(settings: Sequence[dict[str, Any]], key: str) -> str:
    """All values of a setting: ``0.001 or 0.003``; empty if it was not recorded."""
    found = {s[key] for s in settings if s.get(key) is not None}
    *most, last = [str(v) for v in sorted(found, key=lambda v: (str(type(v)), v))] or [""]
    return f"{', '.join(most)} or {last}" if most else last
