"""The model card: what a reader must know of a bundle before using it, from its manifest alone.

``MODEL_CARD.md`` is its Markdown; ``echoquad inspect`` lays the same blocks out for a terminal. A manifest may come
from another release, or from anybody: what it lacks is called "not stated", and whatever stands in it for a number or
a name becomes plain text in one line.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, Final

from echoquad_runtime.bundle.bundle import INTENDED_USE
from echoquad_runtime.bundle.document import Block, Document, Items, Paragraph, Section, Table
from echoquad_runtime.contract import QUADRANTS

__all__ = ["model_card", "phrase"]

NOT_STATED: Final = "not stated"
DEPTH: Final = 5  # of values within values that are put into words: nobody reads on

_POSITIONS: Final = ("top left", "top right", "bottom left", "bottom right")
_CONTRACT: Final[Mapping[str, str]] = {
    "classes": "classes, in the order of the outputs",
    "positive": "positive class of ROC curves",
    "keep": "fraction of each side that the centre crop keeps",
    "input_size": "side of a quadrant at the network, pixels",
    "interpolation": "resize, Pillow's antialiased filter",
    "quadrants": "quadrants, in order",
    "mean": "mean, of grey levels as 0 to 1",
    "std": "standard deviation, of the same",
    "vote": "vote rule",
    "vote_weights": "weights of the quadrants, for the weighted rule",
    "temperature": "temperature of the softmax",
    "frame_temperature": "temperature of the frame's mean, for its confidence",
    "schema": "schema",
}
_RECIPE: Final = (
    "weights",
    "trained_layers",
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "weight_decay",
    "dropout",
    "label_smoothing",
    "class_weights",
    "balanced_sampler",
    "mixed_precision",
)
_SOURCES: Final[Mapping[str, str]] = {
    "phantom": "synthetic phantoms, so that no patient's pixels are in this bundle",
    "validation": "frames of the validation split: this bundle holds patients' pixels",
    "folder": "frames of a folder that the exporter named: this bundle may hold patients' pixels",
}
_LIMITS: Final = (
    "The quadrants are fixed; a tilted, mirrored or zoomed view puts other anatomy in them.",
    "Each quadrant was trained with its whole frame's label, whether or not it shows anything of it.",
    "On-screen text, borders and scanner settings can give a class away; a high accuracy does not rule that out.",
    "Frames of another scanner, view or population than the training data were not measured.",
)


def model_card(manifest: Mapping[str, Any]) -> Document:
    """Make the card of a bundle.

    Parameters
    ----------
    manifest
        What ``bundle.json`` holds. Nothing in it is taken for granted.
    """
    classes = ", ".join(_names(_at(manifest, "contract", "classes"))) or NOT_STATED
    return Document(
        f"Model card: {classes} from echo frames, by quadrants",
        (
            _intended_use(manifest, classes),
            _contract(manifest),
            _training(manifest),
            _metrics(manifest),
            _parity(manifest),
            _golden(manifest),
            Section("Limits", (Items(_LIMITS),)),
            _versions(manifest),
        ),
    )


def phrase(value: Any, depth: int = DEPTH) -> str:
    """Put any JSON value into one line of words, keys first: ``frames 64, method percentile 99.99, seed 0``."""
    if isinstance(value, Mapping | list | tuple) and not depth:
        return "..."
    if isinstance(value, Mapping):
        return ", ".join(f"{_name(key)} {phrase(item, depth - 1)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        joint = "; " if any(isinstance(item, Mapping | list | tuple) for item in value) else ", "
        return joint.join(phrase(item, depth - 1) for item in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    text = _plain(str(value))
    return f"{text[:12]}..." if len(text) == 64 and not set(text) - set("0123456789abcdef") else text


def _recipe(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Give the recipe that a manifest holds as TOML; empty where it holds none."""
    text = _at(manifest, "training", "recipe")
    try:
        return tomllib.loads(text) if isinstance(text, str) else {}
    except (tomllib.TOMLDecodeError, RecursionError):
        return {}


def _intended_use(manifest: Mapping[str, Any], classes: str) -> Section:
    contract, stated = _at(manifest, "contract"), _text(_at(manifest, "intended_use"))
    # Whatever a manifest says, nobody reads a card without EchoQuad's own words.
    uses = [Paragraph(text, strong=True) for text in dict.fromkeys((INTENDED_USE, stated)) if text != NOT_STATED]
    size = _number(_at(contract, "input_size"), "d")
    what = (
        f"Judges a still echocardiogram frame as one of {classes}. The frame is read as grey, the centre "
        f"{_number(_at(contract, 'keep'), '.0%')} of each side is kept and cut into four quadrants, each is resized to "
        f"{size}x{size} and judged by a {_text(_at(manifest, 'training', 'backbone'))}; the quadrants are joined by "
        f"{_text(_at(contract, 'vote'))} vote."
    )
    made = f"Exported {_text(_at(manifest, 'created'))} by EchoQuad {_text(_at(manifest, 'versions', 'echoquad'))}."
    return Section("Intended use", (*uses, Paragraph(what), Paragraph(made)))


def _contract(manifest: Mapping[str, Any]) -> Section:
    fields = _items(_at(manifest, "contract"))
    rows = [(_CONTRACT.get(key, _name(key)), phrase(value)) for key, value in sorted(fields, key=_rank)]
    identity = _plain(str(_at(manifest, "contract_sha256")))
    return Section(
        "Contract",
        (
            Paragraph(f"What training, export and inference agree on, SHA-256 {identity}:"),
            Table(("field", "value"), tuple(rows)),
            Table(("quadrant", "part of the frame"), tuple(zip(QUADRANTS, _POSITIONS, strict=True))),
            Paragraph("The names are a heuristic: nothing checks that the chamber really lies there."),
        ),
    )


def _training(manifest: Mapping[str, Any]) -> Section:
    training, classes = _at(manifest, "training"), _names(_at(manifest, "contract", "classes"))
    counted = [
        (_name(split), *(_number(_at(counts, name), "d") for name in classes))
        for split, counts in _items(_at(training, "frames"))
    ]
    table = Table(("frames", *classes), tuple(counted)) if counted else Paragraph(f"Counts of frames: {NOT_STATED}.")
    unread = f"Frames that could not be read: {_number(_at(training, 'unreadable'), 'd')}."
    blocks: list[Block] = [table]
    if _at(training, "kind") == "ensemble":
        blocks += _members(training, unread)
    else:
        blocks.append(Paragraph(f"{unread} {_course(training)}."))
    if (audit := _at(training, "audit")) is not None:
        blocks.append(_leaks(audit))
    if (teacher := _at(training, "teacher")) is not None:
        blocks.append(Paragraph(f"Distilled from a teacher ({phrase(teacher)})."))
    if (linear := _at(training, "fit")) is not None:
        words = "No layer was trained but the last, a linear classifier on the backbone's features as it began"
        blocks.append(Paragraph(f"{words} ({phrase(linear)}); of the recipe, what concerns training did nothing."))
    recipe = _recipe(manifest)
    if kept := tuple((_name(key), phrase(recipe[key])) for key in _RECIPE if key in recipe):
        blocks += [Table(("recipe", "value"), kept), Paragraph("`bundle.json` holds the whole recipe.")]
    return Section("Training data", tuple(blocks))


def _leaks(audit: Any) -> Paragraph:
    across = [_number(_at(audit, key), "d") for key in ("patients_across", "exact_across", "near_across")]
    people = ", ".join(f"{_name(split)} {_number(count, 'd')}" for split, count in _items(_at(audit, "patients")))
    return Paragraph(
        f"In more than one of its splits: {across[0]} patients, {across[1]} exact and {across[2]} near duplicates of "
        f"frames (patients by file name: {people or NOT_STATED}). Any but 0 makes figures too good.",
        strong=any(count not in ("0", NOT_STATED) for count in across),
    )


def _course(training: Any) -> str:
    return (
        f"Seed {_number(_at(training, 'seed'), 'd')}, {_number(_at(training, 'epochs'), 'd')} epochs, trained on "
        f"{_text(_at(training, 'device'))} in {_text(_at(training, 'precision'))}"
    )


def _members(training: Any, unread: str) -> list[Block]:
    """Say who the members of an ensemble are, and how they judge together."""
    rows = []
    for member in _list(_at(training, "members")):
        fold = f"{_number(_at(member, 'fold', 'number'), 'd')} of {_number(_at(member, 'fold', 'of'), 'd')}"
        best = _at(member, "best")
        rows.append(
            (
                _text(_at(member, "backbone")),
                fold if _at(member, "fold") is not None else "none",
                _number(_at(member, "seed"), "d"),
                _number(_at(best, "epoch"), "d"),
                _number(_at(best, "validation_frame_accuracy"), ".3f"),
                _text(_at(member, "weights_sha256"))[:12],
            )
        )
    header = ("member", "held-out fold", "seed", "epoch kept", "its validation frames", "weights, SHA-256")
    text = (
        f"{unread} {len(rows)} members judge every quadrant, {_text(_at(training, 'vote'))} vote, each in the views: "
        f"{phrase(_at(training, 'views'))}. Their latencies add up, and so do those of the views."
    )
    return [Paragraph(text), Table(header, tuple(rows))]


def _metrics(manifest: Mapping[str, Any]) -> Section:
    metrics = _at(manifest, "metrics")
    if not isinstance(metrics, Mapping):
        return Section("Metrics", (Paragraph(f"Figures: {NOT_STATED}. Measure with `echoquad evaluate`."),))
    trained, exported = _at(metrics, "training"), _at(metrics, "export")
    epoch = _number(_at(trained, "epoch"), "d")
    first = [_share(f"frames, in training's epoch {epoch}", _at(trained, "frame_accuracy"))]
    if _at(manifest, "training", "kind") == "ensemble":  # its members' epochs are told with them
        held_out = _at(metrics, "out_of_fold")
        label = f"frames, each by the member of {_number(_at(held_out, 'folds'), 'd')} that had not learned from it"
        first = [_share(label, _at(held_out, "frame_accuracy"))] if held_out is not None else []
    rows = [
        *first,
        _share("frames, at the export", _at(exported, "frame_accuracy")),
        *(_share(f"frames of {_plain(name)}, at the export", found) for name, found in _items(_at(exported, "recall"))),
        _share("quadrants, at the export", _at(exported, "quadrant_accuracy")),
    ]
    caveat = (
        f"At the export the training code judged the {_text(_at(exported, 'source'))} in float32. The epoch was chosen "
        "on the run's own validation frames, so figures on these are optimistic; measure on a test split of other "
        "patients with `echoquad evaluate`. The intervals (Wilson's) take frames as independent; where a patient has "
        "several they are too narrow. The quadrants of a frame are not independent, so they have none."
    )
    header = ("judged rightly", "right", "of", "share", "95 % interval")
    blocks: list[Block] = [Table(header, tuple(rows)), Paragraph(caveat)]
    if (calibration := _at(manifest, "training", "calibration")) is not None:
        blocks += _calibration(calibration)
    return Section("Metrics", tuple(blocks))


def _calibration(found: Any) -> tuple[Block, ...]:
    """Say how reliable probabilities are, and how that was found."""
    kinds = (
        ("plain mean, no temperatures", "before"),
        ("as calibrated, on the frames of the fit", "after"),
        ("as calibrated on other patients, cross-fitted", "cross_fitted"),
    )
    rows = [
        (words, *(_number(_at(found, key, figure), ".3f") for figure in ("ece", "ece_equal_width", "nll")))
        for words, key in kinds
        if _at(found, key) is not None
    ]
    text = (
        f"Confidence in the decided class, on {_number(_at(found, 'frames'), 'd')} validation frames of "
        f"{_number(_at(found, 'patients'), 'd')} patients: temperature {_number(_at(found, 'temperature'), 'g')} of a "
        f"quadrant's softmax, {_number(_at(found, 'frame_temperature'), 'g')} of a frame's mean. ECE is the expected "
        f"calibration error, bins: {_text(_at(found, 'binning'))}. A perfect model would show "
        f"{_number(_at(found, 'after', 'ece_if_calibrated', 'mean'), '.3f')} on so few frames."
    )
    header = ("calibration", "ECE", "ECE, 15 equal widths", "negative log-likelihood")
    return Table(header, tuple(rows)), Paragraph(text)


def _share(label: str, found: Any) -> tuple[str, ...]:
    bounds = [_number(bound, ".3f") for bound in _list(_at(found, "ci95"))]
    counts = [_number(_at(found, name), "d") for name in ("right", "count")]
    return label, *counts, _number(_at(found, "share"), ".3f"), " to ".join(bounds) or "none"


def _parity(manifest: Mapping[str, Any]) -> Section:
    found = _items(_at(manifest, "parity"))
    header = (
        "precision",
        "frames",
        "worst logit difference",
        "worst probability difference",
        "quadrant flips",
        "frame flips",
        "smallest lead at a flip",
    )
    text = (
        "Each graph against the training code in float32; the largest over all batch sizes, in brackets what its gate "
        "allows. A flip is a decision that comes out otherwise."
    )
    sources = []
    for name, figures in found:
        sizes = ", ".join(_number(_at(batch, "batch_size"), "d") for batch in _list(_at(figures, "batches")))
        where = f"on the {_text(_at(figures, 'source'))}, on {_text(_at(figures, 'device'))}"
        sources.append(f"{_plain(name)}: {where}, in batches of {sizes or NOT_STATED} frames")
    table = Table(header, tuple(_parity_row(name, figures) for name, figures in found))
    lines = Items((*sources, *_graphs(manifest)))
    return Section("Parity with the training code", (table, Paragraph(text), lines))


def _parity_row(name: str, figures: Any) -> tuple[str, ...]:
    gate, frames = _at(figures, "gate"), _at(figures, "frames")

    def column(figure: str) -> list[Any]:
        values = (_at(batch, figure) for batch in _list(_at(figures, "batches")))
        return [value for value in values if _is_number(value)]

    def worst(figure: str, spec: str, bound: str, *times: Any) -> str:
        return _number(max(column(figure), default=None), spec) + _allowed(_at(gate, bound), *times)

    leads = column("smallest_margin_at_flip")
    return (
        _plain(name),
        _number(frames, "d"),
        worst("max_abs_dlogit", ".2e", "max_abs_dlogit"),
        worst("max_abs_dprobability", ".2e", "max_abs_dprobability"),
        worst("patch_flips", "d", "max_patch_flip_fraction", frames, 4),
        worst("frame_flips", "d", "max_frame_flip_fraction", frames),
        _number(min(leads), ".3g") if leads else "no flip",
    )


def _allowed(bound: Any, *times: Any) -> str:
    """Say in brackets what a gate allows; a share of `times` where these are given."""
    if bound is None:
        return " (any)"
    if not all(map(_is_number, (bound, *times))):
        return f" ({NOT_STATED})"
    try:
        return f" (at most {math.prod((bound, *times)):g})"
    except OverflowError:  # a whole number of hundreds of digits
        return f" ({NOT_STATED})"


def _graphs(manifest: Mapping[str, Any]) -> Iterable[str]:
    """Say whatever the manifest knows of each graph; what is long stands on a line of its own."""
    for key, title in (("precisions", ""), ("frame_graphs", "frame graph ")):
        for name, details in _items(_at(manifest, key)):
            label = f"{title}{_plain(name)}"
            if not isinstance(details, Mapping):
                yield f"{label}: {phrase(details)}"
                continue
            nested = {fact: value for fact, value in details.items() if value and isinstance(value, Mapping | list)}
            if plain := {fact: value for fact, value in details.items() if fact not in nested}:
                yield f"{label}: {phrase(plain)}"
            for fact, value in nested.items():
                yield f"{label}, {_name(fact)}: {phrase(value)}"
    yield f"{_text(_at(manifest, 'default_precision'))} is what runs where no precision is asked for"


def _golden(manifest: Mapping[str, Any]) -> Section:
    golden = _at(manifest, "golden")
    text = "Frames with the training code's answers come with the bundle; what they cover is not stated."
    if isinstance(golden, Mapping):
        source = _at(golden, "source")
        counts = (
            f"{_number(_at(golden, 'patterns_found'), 'd')} of {_number(_at(golden, 'patterns_possible'), 'd')} "
            f"patterns of votes, {_number(_at(golden, 'ties'), 'd')} ties; decided {phrase(_at(golden, 'classes'))}"
        )
        text = (
            f"{_number(_at(golden, 'frames'), 'd')} frames with the training code's answers: "
            f"{_SOURCES.get(source, _plain(source)) if isinstance(source, str) else NOT_STATED}; a blank, a saturated "
            f"and the smallest frame among them. {counts}. The smallest lead that a decision hangs on is "
            f"{_number(_at(golden, 'smallest_margin'), '.2g')}, that of a quadrant's vote "
            f"{_number(_at(golden, 'smallest_quadrant_margin'), '.2g')}."
        )
    replay = (
        "`echoquad verify` replays them on the device at hand: fp32 is held to these answers, one of less precision "
        "to what it gave itself when it was exported. A probability that is out by more than the gate allows fails; a "
        "decision that a difference within the gate can turn is told apart, and does not."
    )
    return Section("Golden frames", (Paragraph(text), Paragraph(replay)))


def _versions(manifest: Mapping[str, Any]) -> Section:
    kinds = {"at the training": _at(manifest, "training", "versions"), "at the export": _at(manifest, "versions")}
    known = {kind: dict(_items(found)) for kind, found in kinds.items() if _items(found)}
    # Too long to stand in a column.
    where = ", ".join(f"{kind} {_text(found.pop('platform', None))}" for kind, found in known.items())
    names = sorted({name for found in known.values() for name in found})
    rows = tuple((_plain(name), *(phrase(found.get(name)) for found in known.values())) for name in names)
    blocks: list[Block] = [Table(("package", *known), rows), Paragraph(f"Platform {where}.")] if rows else []
    commit = Paragraph(f"Trained by commit {_text(_at(manifest, 'training', 'git_commit'))} of EchoQuad.")
    return Section("Versions", (*blocks, commit))


def _at(value: Any, *keys: str) -> Any:
    """Walk down mappings; None where one of them lacks the key or is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _names(value: Any) -> tuple[str, ...]:
    return tuple(_plain(str(name)) for name in _list(value))


def _rank(field: tuple[str, Any]) -> int:
    return list(_CONTRACT).index(field[0]) if field[0] in _CONTRACT else len(_CONTRACT)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any, spec: str) -> str:
    try:
        return format(value, spec) if _is_number(value) else NOT_STATED
    except (ValueError, OverflowError):  # a fraction where a whole number should be, one of hundreds of digits
        return phrase(value)


def _text(value: Any) -> str:
    return NOT_STATED if value is None else phrase(value)


def _name(key: str) -> str:
    return _plain(key).replace("_", " ")


def _plain(text: str) -> str:
    """Keep what can be printed: a terminal obeys control characters."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)
