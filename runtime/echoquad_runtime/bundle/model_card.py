"""The model card: what a reader must know about a bundle before using it, built from the manifest alone.

``MODEL_CARD.md`` is its Markdown; ``echoquad inspect`` shows the same blocks on a terminal. A manifest may come from
another release or from an untrusted source: missing values are "not stated", and any other value becomes printable text
in one line.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from echoquad_runtime.bundle.code_section import code_section
from echoquad_runtime.bundle.document import Block, BulletList, Document, Paragraph, Section, Table
from echoquad_runtime.bundle.manifest import INTENDED_USE
from echoquad_runtime.contract import QUADRANT_POSITIONS, QUADRANTS, layout_name

__all__ = ["format_value", "model_card"]

_NOT_STATED: Final = "not stated"
_MAX_DEPTH: Final = 5  # of nested values; deeper ones are unreadable in a line

_CONTRACT: Final[Mapping[str, str]] = {
    "classes": "classes, in the order of the outputs",
    "positive": "positive class of ROC curves",
    "keep": "fraction of each side that the centre crop keeps",
    "input_size": "side of a quadrant at the network, pixels",
    "interpolation": "resize, Pillow's antialiased filter",
    "quadrants": "quadrants, from the top left to the bottom right",
    "mean": "mean, of grey levels as 0 to 1",
    "std": "standard deviation, of the same",
    "vote": "vote rule",
    "vote_weights": "weights of LA, RA, LV, RV, for the weighted rule",
    "temperature": "temperature of the softmax",
    "frame_temperature": "temperature of the frame's mean, for its confidence",
    "schema": "schema",
}
_RECIPE: Final = (
    "weights trained_layers epochs batch_size optimizer lr weight_decay dropout label_smoothing class_weights "
    "balanced_sampler mixed_precision"
)
_SOURCES: Final[Mapping[str, str]] = {
    "phantom": "synthetic phantoms, so that no patient's pixels are in this bundle",
    "validation": "frames of the validation split: this bundle holds patients' pixels",
    "folder": "frames of a folder that the exporter named: this bundle may hold patients' pixels",
}
_LIMITS: Final = (
    "The quadrants are fixed; a tilted, mirrored or zoomed view puts other anatomy in them.",
    "Each quadrant was trained with the label of its whole frame, even if it shows no sign of that class.",
    "On-screen text, borders and scanner settings can reveal a class; a high accuracy does not rule that out.",
    "The model was not measured on frames of another scanner, view or population than the training data.",
)


def model_card(manifest: Mapping[str, Any]) -> Document:
    """Build the model card of a bundle.

    Parameters
    ----------
    manifest
        The content of ``bundle.json``; any value may be missing or have an unexpected type.
    """
    classes = ", ".join(_class_names(manifest)) or _NOT_STATED
    return Document(
        f"Model card: {classes} from echo frames, by quadrants",
        (
            _intended_use(manifest, classes),
            _contract(manifest),
            _training(manifest),
            _metrics(manifest),
            *_typicality(manifest),
            _parity(manifest),
            _golden_frames(manifest),
            *code_section(manifest),
            Section("Limits", (BulletList(_LIMITS),)),
            _versions(manifest),
        ),
    )


def format_value(value: Any, depth: int = _MAX_DEPTH) -> str:
    """Format any JSON value as one line, keys before values: ``frames 64, method percentile 99.99, seed 0``."""
    if isinstance(value, Mapping | list | tuple) and not depth:
        return "..."
    if isinstance(value, Mapping):
        return ", ".join(f"{_name(key)} {format_value(item, depth - 1)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        separator = "; " if any(isinstance(item, Mapping | list | tuple) for item in value) else ", "
        return separator.join(format_value(item, depth - 1) for item in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    text = _printable(str(value))
    return f"{text[:12]}..." if len(text) == 64 and not set(text) - set("0123456789abcdef") else text


# ---------------------------------------------------------------------------------------------- sections


def _intended_use(manifest: Mapping[str, Any], classes: str) -> Section:
    # EchoQuad's own statement always comes first, whatever the manifest says.
    statements = dict.fromkeys((INTENDED_USE, _fill("{intended_use}", manifest)))
    strong = [Paragraph(text, strong=True) for text in statements if text != _NOT_STATED]
    text = (
        "Classifies a still echocardiogram frame as one of {classes}. The frame is converted to grey levels, the "
        "central {contract.keep:.0%} of each side is kept and split into four quadrants, and each is resized to "
        "{contract.input_size:d}x{contract.input_size:d} and classified by a {training.backbone}. The quadrants' "
        "results are combined by {contract.vote} vote."
    )
    origin = "Exported {created} by EchoQuad {versions.echoquad}."
    summary = Paragraph(_fill(text, manifest, classes=classes))
    return Section("Intended use", (*strong, summary, Paragraph(_fill(origin, manifest))))


def _contract(manifest: Mapping[str, Any]) -> Section:
    fields = dict(_items(manifest, "contract"))
    order = [key for key in _CONTRACT if key in fields] + [key for key in fields if key not in _CONTRACT]
    rows = ((_CONTRACT.get(key, _name(key)), format_value(fields[key])) for key in order)
    digest = _printable(str(_at(manifest, "contract_sha256")))
    return Section(
        "Contract",
        (
            Paragraph(f"Training, export and inference share this contract, SHA-256 {digest}:"),
            _table("field | value", rows),
            *_quadrant_layout(fields.get("quadrants")),
            Paragraph("The names are a heuristic: nothing checks that a quadrant shows the chamber of its name."),
        ),
    )


def _quadrant_layout(names: Any) -> tuple[Block, ...]:
    if not isinstance(names, list) or sorted(map(str, names)) != sorted(QUADRANTS):
        return (Paragraph(f"Quadrant layout: {_NOT_STATED}."),)
    table = _table("quadrant | part of the frame", zip(names, QUADRANT_POSITIONS, strict=True))
    return Paragraph(f"Quadrant layout: {layout_name(names)}."), table


def _training(manifest: Mapping[str, Any]) -> Section:
    training, classes = _at(manifest, "training"), _class_names(manifest)
    counts = tuple(
        (_name(split), *(_number(_at(split_counts, name), "d") for name in classes))
        for split, split_counts in _items(training, "frames")
    )
    blocks: list[Block] = [
        Table(("frames", *classes), counts) if counts else Paragraph(f"Numbers of frames: {_NOT_STATED}.")
    ]
    if _at(training, "kind") == "ensemble":
        blocks += _ensemble_members(training)
    else:
        text = "Unreadable frames: {unreadable:d}. Seed {seed:d}, {epochs:d} epochs, on {device} in {precision}."
        blocks.append(Paragraph(_fill(text, training)))
    if (audit := _at(training, "audit")) is not None:
        blocks.append(_leaks(audit))
    if (origin := _at(training, "pretrained")) is not None:
        text = "Initial weights: {source}, SHA-256 {sha256}, licence {license}."
        blocks.append(Paragraph(_fill(text, origin)))
    if (teacher := _at(training, "teacher")) is not None:
        blocks.append(Paragraph(f"Distilled from a teacher ({format_value(teacher)})."))
    if (linear := _at(training, "fit")) is not None:
        text = "Only the last layer was trained, a linear classifier on the features of the pretrained backbone"
        effect = "the training options of the recipe had no effect"
        blocks.append(Paragraph(f"{text} ({format_value(linear)}); {effect}."))
    recipe = _recipe(training)
    if rows := tuple((_name(key), format_value(recipe[key])) for key in _RECIPE.split() if key in recipe):
        blocks += [_table("recipe | value", rows), Paragraph("`bundle.json` holds the whole recipe.")]
    return Section("Training data", tuple(blocks))


def _recipe(training: Any) -> dict[str, Any]:
    """Return the recipe, which the manifest holds as TOML; empty if it is missing or invalid."""
    text = _at(training, "recipe")
    try:
        return tomllib.loads(text) if isinstance(text, str) else {}
    except (tomllib.TOMLDecodeError, RecursionError):
        return {}


def _leaks(audit: Any) -> Paragraph:
    counts = ", ".join(f"{_name(split)} {_number(count, 'd')}" for split, count in _items(audit, "patients"))
    text = (
        "In more than one of its splits: {patients_across:d} patients, {exact_across:d} exact and {near_across:d} near "
        "duplicates of frames (patients by file name: {counts}). Any number but 0 makes the metrics too optimistic."
    )
    leaks = (_at(audit, f"{name}_across") for name in ("patients", "exact", "near"))
    return Paragraph(_fill(text, audit, counts=counts or _NOT_STATED), any(map(_is_number, filter(None, leaks))))


def _ensemble_members(training: Any) -> list[Block]:
    members = _list(_at(training, "members"))
    text = (
        "Unreadable frames: {unreadable:d}. {count} members classify every quadrant, {vote} vote, each in the views: "
        "{view_list}. The latencies of members and views add up."
    )
    texts = {"count": str(len(members)), "view_list": format_value(_at(training, "views"))}
    header = "member | held-out fold | seed | epoch | accuracy on its validation frames | weights, SHA-256"
    cells = ("{seed:d}", "{best.epoch:d}", "{best.validation_frame_accuracy:.3f}")
    rows = []
    for member in members:
        fold = "none" if _at(member, "fold") is None else "{fold.number:d} of {fold.of:d}"
        rows.append((*_row(member, "{backbone}", fold, *cells), _fill("{weights_sha256}", member)[:12]))
    return [Paragraph(_fill(text, training, **texts)), _table(header, rows)]


def _metrics(manifest: Mapping[str, Any]) -> Section:
    metrics = _at(manifest, "metrics")
    if not isinstance(metrics, Mapping):
        return Section("Metrics", (Paragraph(f"Metrics: {_NOT_STATED}. Measure with `echoquad evaluate`."),))
    exported, held_out = _at(metrics, "export"), _at(metrics, "out_of_fold")
    rows = [
        _share("frames, at the export", _at(exported, "frame_accuracy")),
        *(_share(f"frames of {_printable(name)}, at the export", one) for name, one in _items(exported, "recall")),
        _share("quadrants, at the export", _at(exported, "quadrant_accuracy")),
    ]
    if _at(manifest, "training", "kind") != "ensemble":  # the table of members has their epochs
        label = _fill("frames, in training epoch {training.epoch:d}", metrics)
        rows.insert(0, _share(label, _at(metrics, "training", "frame_accuracy")))
    elif held_out is not None:
        label = _fill("frames, each by the member of {folds:d} that did not see its patient", held_out)
        rows.insert(0, _share(label, _at(held_out, "frame_accuracy")))
    caveat = (
        "At the export the training code classified the {source} in float32. {choice}; measure on a test split of "
        "other patients with `echoquad evaluate`. The intervals at the export are Wilson's: with several frames of one "
        "patient they are too narrow. Quadrants of a frame are not independent, so they have no interval."
    )
    table = _table("accuracy | correct | of | share | 95 % interval", rows)
    blocks: list[Block] = [table, Paragraph(_fill(caveat, exported, choice=_epoch_choice(_at(manifest, "training"))))]
    if (calibration := _at(manifest, "training", "calibration")) is not None:
        blocks += _calibration(calibration)
    return Section("Metrics", tuple(blocks))


def _epoch_choice(training: Any) -> str:
    """Return what the run's own validation frames decided."""
    if all(_recipe(run).get("model_epoch") == "last" for run in _list(_at(training, "members")) or [training]):
        return "The weights are those of the last epoch: the run's own validation frames served for temperatures alone"
    return "The epoch was chosen on the run's own validation frames, so their metrics are optimistic"


def _calibration(calibration: Any) -> tuple[Block, ...]:
    """Return how well the probabilities are calibrated."""
    kinds = (
        ("plain mean, no temperatures", "before"),
        ("calibrated, on the frames of the fit", "after"),
        ("calibrated on other patients, cross-fitted", "cross_fitted"),
    )
    rows = (
        (label, *(_number(_at(calibration, key, name), ".3f") for name in ("ece", "ece_equal_width", "nll")))
        for label, key in kinds
        if _at(calibration, key) is not None
    )
    text = (
        "Confidence in the predicted class, on {frames:d} validation frames of {patients:d} patients, with temperature "
        "{temperature:g} of a quadrant's softmax and {frame_temperature:g} of a frame's mean. ECE is the expected "
        "calibration error, bins: {binning}. A perfect model would show {after.ece_if_calibrated.mean:.3f} on so few "
        "frames."
    )
    table = _table("calibration | ECE | ECE, 15 equal widths | negative log-likelihood", rows)
    return table, Paragraph(_fill(text, calibration))


def _share(label: str, share: Any) -> tuple[str, ...]:
    interval = " to ".join(_number(bound, ".3f") for bound in _list(_at(share, "ci95"))) or "none"
    return label, *_row(share, "{right:d}", "{count:d}", "{share:.3f}"), interval


def _parity(manifest: Mapping[str, Any]) -> Section:
    parity = _items(manifest, "parity")
    header = (
        "precision | frames | largest logit difference | largest probability difference | largest relative typicality "
        "difference | quadrant flips | frame flips | smallest margin at a flip"
    )
    text = (
        "Each graph compared with the training code in float32: the largest value over all batch sizes and, in "
        "brackets, the limit of its gate. A flip is a changed decision."
    )
    sources = []
    for name, figures in parity:
        sizes = ", ".join(_fill("{batch_size:d}", batch) for batch in _list(_at(figures, "batches"))) or _NOT_STATED
        where = _fill("on the {source}, on {device}", figures)
        sources.append(f"{_printable(name)}: {where}, in batches of {sizes} frames")
    table = _table(header, (_parity_row(name, figures) for name, figures in parity))
    lines = BulletList((*sources, *_graph_details(manifest)))
    return Section("Parity with the training code", (table, Paragraph(text), lines))


def _parity_row(name: str, figures: Any) -> tuple[str, ...]:
    gate, frames = _at(figures, "gate"), _at(figures, "frames")

    def column(figure: str) -> list[Any]:
        values = (_at(batch, figure) for batch in _list(_at(figures, "batches")))
        return [value for value in values if _is_number(value)]

    def worst(figure: str, spec: str, bound: str, *times: Any) -> str:
        return _number(max(column(figure), default=None), spec) + _limit(_at(gate, bound), *times)

    margins = column("smallest_margin_at_flip")
    return (
        _printable(name),
        _number(frames, "d"),
        worst("max_abs_dlogit", ".2e", "max_abs_dlogit"),
        worst("max_abs_dprobability", ".2e", "max_abs_dprobability"),
        worst("max_rel_dtypicality", ".2e", "max_rel_dtypicality") if column("max_rel_dtypicality") else "none",
        worst("patch_flips", "d", "max_patch_flip_fraction", frames, 4),
        worst("frame_flips", "d", "max_frame_flip_fraction", frames),
        _number(min(margins), ".3g") if margins else "no flip",
    )


def _limit(bound: Any, *times: Any) -> str:
    """Return a gate's limit in brackets: `bound`, or the fraction `bound` of the product of `times`."""
    if bound is None:
        return " (any)"
    try:
        if all(map(_is_number, (bound, *times))):
            return f" (at most {math.prod((bound, *times)):g})"
    except OverflowError:  # an integer of hundreds of digits
        pass
    return f" ({_NOT_STATED})"


def _graph_details(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Return what the manifest states about each graph; nested values have lines of their own."""
    for key, title in (("precisions", ""), ("frame_graphs", "frame graph ")):
        for name, details in _items(manifest, key):
            label = f"{title}{_printable(name)}"
            if not isinstance(details, Mapping):
                yield f"{label}: {format_value(details)}"
                continue
            nested = {fact: value for fact, value in details.items() if value and isinstance(value, Mapping | list)}
            if plain := {fact: value for fact, value in details.items() if fact not in nested}:
                yield f"{label}: {format_value(plain)}"
            for fact, value in nested.items():
                yield f"{label}, {_name(fact)}: {format_value(value)}"
    yield _fill("default precision: {default_precision}", manifest)


def _typicality(manifest: Mapping[str, Any]) -> tuple[Section, ...]:
    text = (
        "The typicality of a frame says how near its features lie to those of {frames:d} training frames: about 1 for "
        "a frame like them, near 0 for a picture of another thing. Of {validation_frames:d} validation frames 99 % "
        "exceed the threshold 99; below it a row has the flag `unlike-training`. Thresholds: {thresholds}. The score "
        "does not detect wrong decisions, and may miss changes within the picture such as colour Doppler."
    )
    found = _at(manifest, "typicality")
    return () if found is None else (Section("Frames unlike the training frames", (Paragraph(_fill(text, found)),)),)


def _golden_frames(manifest: Mapping[str, Any]) -> Section:
    golden = _at(manifest, "golden")
    text = "The bundle contains frames with the outputs of the training code; what they cover is not stated."
    if isinstance(golden, Mapping):
        text = (
            "{frames:d} frames with the outputs of the training code: {origin}; a blank, a saturated and the smallest "
            "frame among them. {patterns_found:d} of {patterns_possible:d} vote patterns, {ties:d} ties; decisions "
            "{decisions}. The smallest decision margin of a frame is {smallest_margin:.2g}, that of a quadrant "
            "{smallest_quadrant_margin:.2g}."
        )
    source = _at(golden, "source")
    origin = _SOURCES.get(source, _printable(source)) if isinstance(source, str) else _NOT_STATED
    coverage = _fill(text, golden, origin=origin, decisions=format_value(_at(golden, "classes")))
    replay = (
        "`echoquad verify` replays them on the device at hand. fp32 must reproduce these outputs, and a reduced "
        "precision must reproduce its own outputs at the export. A probability difference beyond the gate fails. A "
        "decision that a difference within the gate can change is reported and does not fail."
    )
    return Section("Golden frames", (Paragraph(coverage), Paragraph(replay)))


def _versions(manifest: Mapping[str, Any]) -> Section:
    columns = {
        "at the training": dict(_items(_at(manifest, "training"), "versions")),
        "at the export": dict(_items(manifest, "versions")),
    }
    columns = {title: versions for title, versions in columns.items() if versions}
    # Too long for a column.
    platforms = ", ".join(f"{title} {_fill('{platform}', versions)}" for title, versions in columns.items())
    names = sorted({name for versions in columns.values() for name in versions} - {"platform"})
    rows = tuple(
        (_printable(name), *(format_value(versions.get(name)) for versions in columns.values())) for name in names
    )
    blocks: list[Block] = [Table(("package", *columns), rows), Paragraph(f"Platform {platforms}.")] if rows else []
    commit = Paragraph(_fill("Trained by commit {training.git_commit} of EchoQuad.", manifest))
    return Section("Versions", (*blocks, commit))


# ---------------------------------------------------------------------------------------------- untrusted values


def _at(value: Any, *keys: str) -> Any:
    """Return the value below nested keys; None if a mapping or a key is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _table(header: str, rows: Iterable[tuple[str, ...]]) -> Table:
    return Table(tuple(header.split(" | ")), tuple(rows))


def _row(value: Any, *templates: str) -> tuple[str, ...]:
    return tuple(_fill(template, value) for template in templates)


def _fill(template: str, value: Any, **texts: str) -> str:
    """Replace ``{name}`` by one of `texts`, ``{path}`` by the text and ``{path:spec}`` by the number at a path."""

    def replace(match: re.Match[str]) -> str:
        if match[1] in texts:
            return texts[match[1]]
        found = _at(value, *match[1].split("."))
        return _number(found, match[2]) if match[2] else _NOT_STATED if found is None else format_value(found)

    return re.sub(r"\{([\w.]+):?([^}]*)\}", replace, template)


def _items(value: Any, key: str) -> list[tuple[str, Any]]:
    value = _at(value, key)
    return list(value.items()) if isinstance(value, Mapping) else []


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _class_names(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_printable(str(name)) for name in _list(_at(manifest, "contract", "classes")))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any, spec: str) -> str:
    try:
        return format(value, spec) if _is_number(value) else _NOT_STATED
    except (ValueError, OverflowError):  # a fraction instead of an integer, or an integer of hundreds of digits
        return format_value(value)


def _name(key: str) -> str:
    return _printable(key).replace("_", " ")


def _printable(text: str) -> str:
    """Replace control characters, which a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)
