"""Out-of-fold figures of recipes, by seed and number of patients: a table, a line of JSON, and learning curves.

    python benchmarks/out_of_fold.py DATA --out figures.json --recipe scratch
        [--recipe head=transfer:trained_layers=head,dropout=0.2] [--recipe ensemble=lite*5]
        [--recipe distilled=lite@ensemble] [--folds 5] [--seeds 0,1,2] [--patients 50,100,200,all]
        [--jobs 2] [--plot curve.png] [--results FILE]

--recipe is [LABEL=]RECIPE[*N][@TEACHER][:field=value,...]; it may be repeated. Frames of DATA/train and DATA/validation
are divided as by `echoquad train --folds` with the same seed: each fold is held out once, and a tenth of the patients
of the others is the validation split of its run. With *N, what a run would see is divided into N folds once more, and
an ensemble of their runs with soft vote takes the place of the run. TEACHER is the label of another recipe: the run is
distilled from what that recipe gives for the same fold. With --patients, a run sees only so many patients (a tenth of
them for validation); fewer are among more, and the fold that is held out stays whole. Intervals are 95 % by patient;
several seeds are averaged. All figures share the resamples of patients: differences from the first recipe are paired.

Each fold is trained in a process of its own, --jobs at a time, with one CPU thread each. The folder OUT keeps the
probabilities of the held-out frames (``.npz``; see workers/fold.py): start a killed benchmark again, and it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, TypedDict

from common import report, run_facts
from matplotlib.figure import Figure
from workers import fold as worker
from workers.fold import Job

from echoquad_runtime.errors import EchoQuadError
from echoquad_runtime.storage.atomic import write_json
from echoquad_train.evaluation.frame_metrics import metrics_of_frames
from echoquad_train.evaluation.scored_frames import ScoredFrames
from echoquad_train.fitting.fold_splits import Fold, FoldSettings, split_folds
from echoquad_train.fitting.out_of_fold import ResampledFigures
from echoquad_train.plot_style import save, stroke
from echoquad_train.recipe import Recipe

FIGURES = {"accuracy": "frame accuracy", "roc_auc": "ROC AUC", "patch_accuracy": "quadrant accuracy"}
ALL = "all"


class Row(TypedDict):
    """The figures of a recipe with a number of patients."""

    recipe: str
    patients: float  # that a run sees, the mean over the runs
    asked: str
    held_out: int  # patients that are measured
    seeds: list[dict[str, Any]]
    estimates: dict[str, dict[str, Any]]
    differences: dict[str, dict[str, Any]]  # from the first recipe with as many patients


def main() -> None:
    options = parse(sys.argv[1:])
    try:
        jobs = list(make_jobs(options))
    except EchoQuadError as error:
        raise SystemExit(str(error)) from error
    Path(jobs[0].folder).mkdir(parents=True, exist_ok=True)
    train(jobs, options.jobs)
    found = summary(jobs)
    write_json(options.out, {**run_facts(Path(__file__).stem, options.threads), **found})
    if options.plot:
        save(draw(found["rows"]), options.plot)
    name = f"{Path(__file__).stem}{', learning curve' if options.patients != [None] else ''}"
    report(
        name,
        table(found["rows"]),
        {"rows": found["rows"]},
        options.results,
        threads=options.threads,
        notes=notes(options, found["runs"]),
    )


def train(jobs: Sequence[Job], at_once: int) -> None:
    """Train what is not finished, so many jobs at once; a student waits for its teacher, which is earlier in `jobs`."""
    todo = [job for job in jobs if not job.result.exists()]
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished before", flush=True)
    running: dict[str, Future[None]] = {}

    def run(job: Job) -> None:
        if job.teacher in running:
            running[job.teacher].result()
        run_worker(job)
        print(line_of(worker.load_result(job.result)[0]), flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        for job in todo:
            running[job.name] = pool.submit(run, job)
        try:
            for done in as_completed(running.values()):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def line_of(facts: dict[str, Any]) -> str:
    return (
        f"{facts['recipe']}, {facts['patients']} patients, seed {facts['seed']}, fold {facts['fold']}: accuracy "
        f"{facts['accuracy']:.3f}, epoch {', '.join(map(str, facts['model_epochs']))}, {facts['epoch_seconds']:.0f} s"
    )


# Jobs


def parse(line: Sequence[str]) -> argparse.Namespace:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with {train,validation}/CLASS/**")
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file; results of folds are kept in OUT without .json"
    )
    parser.add_argument(
        "--recipe", action="append", required=True, help="[LABEL=]RECIPE[*N][@TEACHER][:field=value,...]"
    )
    parser.add_argument("--folds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--seeds", type=numbers, default=[0], help="of training and folds, with commas (default 0)")
    parser.add_argument("--patients", type=counts, default=[None], help="that a run sees, with commas (default all)")
    parser.add_argument("--patient-regex", help="extracts the patient from a frame's name")
    parser.add_argument("--jobs", type=int, default=1, help="folds that are trained at once (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the run folders, which hold the weights, in OUT")
    parser.add_argument("--plot", type=Path, help="PNG file of the learning curves")
    parser.add_argument("--results", type=Path, help="Markdown file whose section of this script is replaced")
    return parser.parse_args(line)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def counts(text: str) -> list[int | None]:
    return [None if part == ALL else int(part) for part in text.split(",")]


@dataclass(frozen=True)
class Entry:
    """A `--recipe`: its label, the recipe, the members of an ensemble (0: a single run), the label of the teacher."""

    label: str
    recipe: Recipe
    members: int = 0
    teacher: str | None = None


def parse_recipe(text: str) -> Entry:
    """Parse ``[LABEL=]RECIPE[*N][@TEACHER][:field=value,...]``; the label is the text if there is none."""
    found = re.fullmatch(r"(?:([^:]+)=)?([^:=*@]+)(?:\*(\d+))?(?:@([^:=]+))?(?::(.+))?", text)
    if not found:
        raise SystemExit(f"--recipe {text}: expected [LABEL=]RECIPE[*N][@TEACHER][:field=value,...]")
    label, name, members, teacher, settings = found.groups()
    recipe = Recipe.load(name).replace(re.split(r",(?=\w+=)", settings) if settings else ())
    return Entry(label or text, recipe, int(members or 0), teacher)


def entries_of(options: argparse.Namespace) -> dict[str, Entry]:
    """Return the recipes by label, each after its teacher; refuse labels that occur twice, and unsuitable teachers."""
    entries = {entry.label: entry for entry in map(parse_recipe, options.recipe)}
    if len(entries) < len(options.recipe):
        raise SystemExit("--recipe: two have the same label; expected a label for each, as in LABEL=RECIPE")
    for entry in entries.values():
        if entry.teacher and (entry.teacher not in entries or entries[entry.teacher].teacher or entry.members):
            raise SystemExit(
                f"--recipe {entry.label}: found teacher {entry.teacher}; expected a single run whose teacher is the "
                "label of another --recipe that has no teacher"
            )
    return dict(sorted(entries.items(), key=lambda item: item[1].teacher is not None))


def make_jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Yield a job for each seed, recipe, number of patients and fold, the first seed first.

    A number of patients that no fold has means all, and is trained once.
    """
    settings, entries = FoldSettings(options.folds, options.patient_regex), entries_of(options)
    teachers = {entry.teacher for entry in entries.values()}
    splits = worker.read_splits(str(options.data))

    @cache
    def folds_of(seed: int) -> list[Fold]:
        return split_folds(splits, settings, seed)

    most = max(worker.count_patients(fold, settings) for fold in folds_of(options.seeds[0]))
    asked = dict.fromkeys(None if count is None or count >= most else count for count in options.patients)
    names: dict[tuple[Any, ...], str] = {}
    for seed, entry, count, number in product(options.seeds, entries.values(), asked, range(1, options.folds + 1)):
        job = Job(
            data=str(options.data),
            folder=str(options.out.with_suffix("")),
            name="",
            label=entry.label,
            recipe=entry.recipe.replace(seed=seed).to_toml(),
            patients=count,
            folds=options.folds,
            number=number,
            members=entry.members,
            teacher=names.get((entry.teacher, seed, count, number)),
            patient_regex=options.patient_regex,
            device=options.device,
            threads=options.threads,
            keep=options.keep or entry.label in teachers,
        )
        fold = worker.limit_patients(folds_of(seed)[number - 1], count, settings, seed)
        words = f"{entry.label}.{count or ALL}.seed{seed}.fold{number}"
        name = f"{re.sub(r'[^0-9A-Za-z.-]+', '_', words)}.{worker.fingerprint(job, fold)}"
        names[entry.label, seed, count, number] = name
        yield replace(job, name=name)


def run_worker(job: Job) -> None:
    """Train and measure a fold in a process of its own; its output goes to a file beside the result."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    log = job.result.with_suffix(".log")
    line = [sys.executable, str(worker.__file__), json.dumps(asdict(job))]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(line, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output)
        code = process.wait()  # it ends by itself if this process does, because its standard input is closed then
    if code:
        last = log.read_text("utf-8", "replace").strip().rpartition("\n")[2]
        raise SystemExit(f"{job.name}: exit code {code}, {last}; see {log}")


# Figures


def summary(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return the rows and the facts of every fold; all jobs are finished."""
    found = {job: worker.load_result(job.result) for job in jobs}
    rows: list[Row] = []
    baselines: dict[int | None, ResampledFigures] = {}  # of the first recipe, by number of patients
    for label, count in dict.fromkeys((job.label, job.patients) for job in jobs):
        of_seed: dict[int, list[Job]] = {}
        for job in jobs:
            if (job.label, job.patients) == (label, count):
                of_seed.setdefault(Recipe.from_toml(job.recipe).seed, []).append(job)
        pooled = {seed: worker.joined([found[job][1] for job in folds]) for seed, folds in of_seed.items()}
        seen = [found[job][0]["patients"] for folds in of_seed.values() for job in folds]
        figures = ResampledFigures.of(list(pooled.values()))
        baseline = baselines.setdefault(count, figures)
        rows.append(row_of(label, count, statistics.fmean(seen), pooled, figures, baseline))
    return {"rows": rows, "runs": [{**facts, "predictions": job.result.name} for job, (facts, _) in found.items()]}


def row_of(
    label: str,
    count: int | None,
    patients: float,
    pooled: dict[int, ScoredFrames],
    figures: ResampledFigures,
    baseline: ResampledFigures,
) -> Row:
    """Return the figures of the pooled frames of each seed, their mean with intervals, and how much higher they are."""
    seeds = [
        {"seed": seed, **{name: getattr(metrics_of_frames(scored), name) for name in FIGURES}}
        for seed, scored in pooled.items()
    ]
    estimates, differences = figures.estimates(), figures.estimates(baseline)
    return {
        "recipe": label,
        "patients": patients,
        "asked": str(count or ALL),
        "held_out": len(set(next(iter(pooled.values())).patients)),
        "seeds": seeds,
        "estimates": {name: estimates[name].to_dict() for name in FIGURES},
        "differences": {name: differences[name].to_dict() for name in FIGURES},
    }


def table(rows: Sequence[Row]) -> list[list[str]]:
    titles = (title for name in FIGURES.values() for title in (name, "95 % interval"))
    lines = [["recipe", "patients", "seeds", *titles, "accuracy, difference", "95 % interval"]]
    first = {row["asked"]: row["recipe"] for row in reversed(rows)}
    for row in rows:
        cells = [row["recipe"], f"{row['patients']:.0f}", str(len(row["seeds"]))]
        for name in FIGURES:
            one = row["estimates"][name]
            values = [seed[name] for seed in row["seeds"]]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and None not in values else ""
            cells.append("none" if one["estimate"] is None else f"{one['estimate']:.3f}{spread}")
            cells.append(" to ".join(f"{bound:.3f}" for bound in one["ci95"]) if one["ci95"] else "none")
        one = row["differences"]["accuracy"]
        compared = one["ci95"] and row["recipe"] != first[row["asked"]]
        cells.append(f"{one['estimate']:+.3f}" if compared else "")
        cells.append(" to ".join(f"{bound:+.3f}" for bound in one["ci95"]) if compared else "")
        lines.append(cells)
    return lines


def notes(options: argparse.Namespace, runs: Sequence[dict[str, Any]]) -> list[str]:
    spread = "; ± is the standard deviation over the seeds" if len(options.seeds) > 1 else ""
    trained = " and ".join(sorted({f"{run['device']} in {run['precision']}" for run in runs}))
    return [
        f"Out of {options.folds} folds by patient, seeds {', '.join(map(str, options.seeds))}: each frame is "
        "classified by a run that neither trained nor chose anything on its patient. Intervals are by patient"
        f"{spread}. `patients` is what a run sees, a tenth of them as its validation split. The difference is from the "
        f"first recipe with as many patients, paired. Trained on {trained}."
    ]


def draw(rows: Sequence[Row]) -> Figure:
    """Draw accuracy and ROC AUC against the number of patients, a line with intervals for each recipe."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    titles = {name: FIGURES[name] for name in ("accuracy", "roc_auc")}
    ticks = sorted({round(row["patients"]) for row in rows})
    labels = list(dict.fromkeys(row["recipe"] for row in rows))
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for index, label in enumerate(labels):
            own = sorted((row for row in rows if row["recipe"] == label), key=lambda row: row["patients"])
            own = [row for row in own if row["estimates"][name]["ci95"]]
            # Intervals at the same number of patients are drawn beside each other.
            x = [row["patients"] * 1.02 ** (index - (len(labels) - 1) / 2) for row in own]
            y = [row["estimates"][name]["estimate"] for row in own]
            bounds = [row["estimates"][name]["ci95"] for row in own]
            errors = [[value - low for value, (low, _) in zip(y, bounds, strict=True)]]
            errors += [[high - value for value, (_, high) in zip(y, bounds, strict=True)]]
            colour, style = stroke(index)
            axes.errorbar(x, y, errors, color=colour, ls=style, marker="o", ms=5, elinewidth=1, capsize=3, label=label)
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel="patients that a run learns from", ylabel=f"{title}, out of fold (95 % interval by patient)")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize="small")
    return figure


if __name__ == "__main__":
    main()
