"""The training loop: epochs over a data set, a run folder that survives a kill, the best epoch as a checkpoint.

RUN/
  run.json        what was asked for: data, labels, architecture, frontend, training settings
  metrics.csv     a row an epoch
  best/           the checkpoint of the best epoch on the validation split
  state-NNNN/     parameters, optimizer state and history after NNNN epochs, for resuming; only the newest is kept

An epoch is done when its state folder stands. `best/` and `metrics.csv` follow from it: where a kill came between,
`resume` makes them from the state. What comes before the state is lost with a kill, and done again in the same way.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import io
import json
import math
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import data, datasets, distill, model, optimizers, survey, train
from .checkpoint import Checkpoint, load, restore_numpy, save, write_numpy
from .config import ASTConfig, FrontendConfig
from .files import remove_scratch, sole_use, whole_folder, write_text
from .metrics import evaluate_logits
from .parallel import DataParallel
from .settings import TrainConfig

RUN_FILE = "run.json"
METRICS_FILE = "metrics.csv"
OURS = r"run\.json|metrics\.csv|best|state-\d{4}"  # the names in a run folder that a killed run may leave scratch of
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """All that decides a run, as stored in `run.json`."""

    data: str
    config: ASTConfig
    frontend: FrontendConfig
    training: TrainConfig
    metadata: dict[str, Any]
    teacher: str | None = None

    def to_json(self) -> str:
        """Return the text of `run.json`."""
        content = {
            "data": self.data,
            "config": self.config.to_json_dict(),
            "frontend": self.frontend.to_json_dict(),
            "training": dataclasses.asdict(self.training),
            "metadata": self.metadata,
            "teacher": self.teacher,
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Invert `to_json`; a text that is none of its own raises KeyError, TypeError, AttributeError or ValueError."""
        content = json.loads(text)
        teacher = content.get("teacher")  # runs of older versions have none
        if not (isinstance(content["data"], str) and isinstance(content["metadata"], dict)):
            raise TypeError("data or metadata have another type")
        if not isinstance(teacher, str | None):
            raise TypeError("teacher has another type")
        return cls(
            content["data"],
            ASTConfig.from_json_dict(content["config"]),
            FrontendConfig.from_json_dict(content["frontend"]),
            TrainConfig(**content["training"]),
            content["metadata"],
            teacher,
        )


def start(
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    training: TrainConfig,
    *,
    initial: Checkpoint | None = None,
    architecture: ASTConfig | None = None,
    problem_type: str | None = None,
    teacher: str | pathlib.Path | None = None,
    say: Say = print,
) -> Checkpoint:
    """Train a model on a data set, from `initial` or from scratch, into a new run folder.

    Args:
        source: data set, see `datasets.read_dataset`.
        output: run folder, new or empty.
        training: the settings.
        initial: a checkpoint to start from; its classifier is kept where it has the data set's labels, else drawn anew.
        architecture: the model to draw where there is no `initial`.
        problem_type: None chooses multi-label where any example has several labels or none.
        teacher: a model or an exported program whose scores soften the labels, see `distill.load_teacher`.
        say: where progress is told.

    Returns:
        The best epoch's checkpoint, which also lies in `output/best`.

    Raises:
        DataError: the data set cannot be used. An error before the first epoch's end leaves the folder free again.
        ValueError: a setting is out of range, the teacher does not fit, or `output` already holds a run or is another
            process's.
        FloatingPointError: the loss is not finite; the message names the step.
    """
    output = pathlib.Path(output)
    if output.exists():
        with sole_use(output):
            _refuse_occupied(output)
    dataset = datasets.read_dataset(source, training.seed)
    has_head = initial is not None and "classifier" in initial.params
    keeps_head = has_head and set(initial.config.labels) == set(dataset.labels)
    if keeps_head:
        dataset = dataset.reordered(initial.config.labels)
    kind = problem_type or ("multi_label_classification" if dataset.multi_label else "single_label_classification")
    if kind == "single_label_classification" and dataset.multi_label:
        raise datasets.DataError(f"{source}: some examples have several labels or none, which {kind} cannot learn")
    DataParallel().check_batch_size(training.batch_size)
    if len(dataset.splits["train"]) < training.batch_size:
        raise datasets.DataError(
            f"{source}: {len(dataset.splits['train'])} training examples are less than one batch of "
            f"{training.batch_size}; choose a smaller --batch-size"
        )
    config = (initial.config if initial else architecture or ASTConfig()).replace(
        num_labels=len(dataset.labels), id2label=dataset.labels, problem_type=kind
    )
    conversion = initial.metadata.get("conversion", {}) if initial else {}
    heard = initial is not None and not conversion.get("statistics_assumed")
    drawn = FrontendConfig(max_length=config.max_length, num_mel_bins=config.num_mel_bins)
    frontend = initial.frontend if heard else drawn
    used = dataset.splits["train"] + dataset.splits["validation"]
    if longer := survey.check_headers(used, frontend):
        say(f"{longer} of {len(used)} sounds are longer than the model's input: their first {frontend.max_seconds:.2f} "
            "s are used")  # fmt: skip
    if not heard:
        mean, std = survey.statistics(dataset.splits["train"], frontend)
        frontend = frontend.replace(mean=round(mean, 4), std=round(std, 4))
        say(f"features of the training split: mean {frontend.mean}, standard deviation {frontend.std}")
    for note in conversion.get("notes", ()):
        say(f"the model to start from: {note}")
    if dataset.passed_over:
        say(f"passed over: {len(dataset.passed_over)} files that are no sound files of a class, the first is "
            f"{dataset.passed_over[0]}")  # fmt: skip
    params = model.init(jax.random.key(training.seed), config)
    if initial:
        params = {**initial.params} if keeps_head else {**initial.params, "classifier": params["classifier"]}
    metadata = {"trained_from": initial.metadata if initial else "scratch", "data": pathlib.Path(source).name}
    if teacher is not None:
        teacher = str(pathlib.Path(teacher).absolute() if pathlib.Path(teacher).exists() else teacher)
        per_device = training.batch_size // len(DataParallel().devices)
        distill.load_teacher(teacher, config, frontend, per_device)  # before anything is written
        metadata |= {"teacher": pathlib.Path(teacher).name, "teacher_weight": training.teacher_weight}
    run = Run(str(pathlib.Path(source).absolute()), config, frontend, training, metadata, teacher)
    output.mkdir(parents=True, exist_ok=True)
    with sole_use(output):
        _refuse_occupied(output)  # again: another process may have been here while the data were read
        try:
            return _train(run, dataset, params, output, [], None, say)
        except Exception:
            if _newest_state(output) in (None, output / "state-0000"):  # nothing to go on with: the folder stays free
                (output / RUN_FILE).unlink(missing_ok=True)
                for state in _states(output):
                    shutil.rmtree(state)
            raise


def _refuse_occupied(output: pathlib.Path) -> None:
    """Raise ValueError where a folder holds a run or other things; what a start leaves that was killed goes.

    To be called in sole use of the folder.
    """
    if can_resume(output):
        raise ValueError(f"{output}: already holds a run; go on with it (--resume) or choose another folder")
    remove_scratch(output, OURS)
    if {path.name for path in output.iterdir()} == {RUN_FILE}:
        with contextlib.suppress(ValueError):  # one that is no run's is somebody's own file
            read_run(output)
            (output / RUN_FILE).unlink()
    if any(output.iterdir()):
        raise ValueError(f"{output}: expected a new or empty folder, got one with other things in it")


def resume(output: str | pathlib.Path, source: str | pathlib.Path | None = None, *, say: Say = print) -> Checkpoint:
    """Go on with a run after its last saved epoch, with the settings it was started with.

    Args:
        output: run folder.
        source: where the data set lies now, if it was moved; the run folder keeps it.
        say: where progress is told.

    Returns:
        The best epoch's checkpoint.

    Raises:
        DataError: the data set is no longer the one that the run was started with.
        ValueError: `output` holds no run, or a damaged one, or another process is training into it.
    """
    output = pathlib.Path(output)
    read_run(output)
    with sole_use(output):
        return _resume(output, source, say)


def _resume(output: pathlib.Path, source: str | pathlib.Path | None, say: Say) -> Checkpoint:
    """Do what `resume` says, in a folder that no other process is at work in."""
    run = read_run(output)
    state = _newest_state(output)
    if state is None:
        raise ValueError(f"{output}: stopped before anything was saved; start it again in a new folder")
    history = _read_history(state)
    if source is not None:
        run = dataclasses.replace(run, data=str(pathlib.Path(source).absolute()))
    dataset = datasets.read_dataset(run.data, run.training.seed)
    if set(dataset.labels) != set(run.config.labels):
        raise datasets.DataError(f"{run.data}: its labels are no longer those that the run was started with")
    dataset = dataset.reordered(run.config.labels)
    params = model.init(jax.random.key(run.training.seed), run.config)
    remove_scratch(output, OURS)
    whole = "; that is all of them, and `--init` starts a new run from its checkpoint"
    say(
        f"going on after epoch {len(history)} of {run.training.epochs}"
        f"{whole if len(history) == run.training.epochs else ''}"
    )
    return _train(run, dataset, params, output, history, state, say)


def read_run(output: str | pathlib.Path) -> Run:
    """Read what a run was started with.

    Raises:
        ValueError: `output` holds no run, or its `run.json` is damaged.
    """
    path = pathlib.Path(output) / RUN_FILE
    if not path.exists():
        raise ValueError(f"{output}: expected a run folder to resume, found no {RUN_FILE} in it")
    with _damage(path):
        return Run.from_json(path.read_text(encoding="utf-8"))


def can_resume(output: str | pathlib.Path) -> bool:
    """Whether a folder holds a run with a saved state."""
    output = pathlib.Path(output)
    return (output / RUN_FILE).exists() and _newest_state(output) is not None


def evaluate(
    checkpoint: Checkpoint, examples: Sequence[datasets.Example], batch_size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and labels, each [N, C], of all examples in order, using all local devices."""
    parallel = DataParallel()
    parallel.check_batch_size(batch_size)
    step = functools.partial(train.eval_step, config=checkpoint.config, frontend=checkpoint.frontend)
    params = parallel.replicate(checkpoint.params)
    return _predict(parallel.wrap_eval(step), params, examples, checkpoint, batch_size)


def _predict(
    run_batch: Callable[..., np.ndarray],
    params: Any,
    examples: Sequence[datasets.Example],
    checkpoint: Checkpoint,
    batch_size: int,
    stop_here: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Run an evaluation over whole batches and cut what filled up the last one; call `stop_here` before each."""
    logits, labels = [], []
    batches = data.eval_batches(examples, checkpoint.frontend, checkpoint.config.num_labels, batch_size=batch_size)
    with contextlib.closing(batches):
        for batch, real in batches:
            stop_here()
            labels.append(batch.pop("labels")[:real])
            logits.append(run_batch(params, batch)[:real])
    return np.concatenate(logits), np.concatenate(labels)


def _train(
    run: Run,
    dataset: datasets.DataSet,
    params: Any,
    output: pathlib.Path,
    history: list[dict[str, Any]],
    saved: pathlib.Path | None,
    say: Say,
) -> Checkpoint:
    """Train from after the last epoch in `history` to the end; see `start`."""
    training, examples = run.training, dataset.splits["train"]
    parallel = DataParallel()
    parallel.check_batch_size(training.batch_size)
    steps_per_epoch = len(examples) // training.batch_size
    if not steps_per_epoch:
        raise datasets.DataError(f"{run.data}: its training examples have become less than one batch")
    optimizer = optimizers.make_optimizer(training, steps_per_epoch)
    state = train.init_state(params, optimizer, training)
    if saved is not None:
        state = _restore_state(saved, state)
        if int(state.step) != len(history) * steps_per_epoch:
            raise datasets.DataError(
                f"{run.data}: {len(examples)} training examples make {steps_per_epoch} steps an epoch, but the run "
                f"took {int(state.step)} in {len(history)} epochs; give it the data it was started with"
            )
    settings = {"config": run.config, "frontend": run.frontend}
    step = parallel.wrap_train(
        functools.partial(
            train.train_step, **settings, training=training, optimizer=optimizer, steps_per_epoch=steps_per_epoch
        )
    )
    run_eval = parallel.wrap_eval(functools.partial(train.eval_step, **settings))
    rate = optimizers.learning_rate_schedule(training, steps_per_epoch)
    soften = _softener(run, parallel)
    with _interrupts() as stop_here:
        write_text(output / RUN_FILE, run.to_json())
        if saved is None:
            _save_state(output, state, history)  # the start too, so that a kill in the first epoch can be resumed
        else:
            _publish(run, output, state.kept, history)
        say(
            f"{len(examples)} training examples, {len(dataset.splits['validation'])} for validation, "
            f"{len(dataset.labels)} labels, {model.num_params(state.params):,} parameters, "
            f"{len(parallel.devices)} {parallel.devices[0].platform} device(s)"
        )
        if not dataset.splits["validation"]:
            say("no validation examples: the best epoch will be the one with the lowest training loss")
        say("the first step takes longest: it is compiled")
        state = parallel.replicate(state)
        for epoch in range(len(history), training.epochs):
            stop_here(state)
            began = time.monotonic()
            state, train_loss = _train_epoch(run, examples, step, soften, state, epoch, stop_here)
            single = parallel.unreplicate(state)
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(single.params)):
                raise FloatingPointError(
                    f"the parameters are not finite at the end of epoch {epoch + 1}; try a lower rate"
                )
            row = {"epoch": epoch + 1, "learning_rate": float(rate((epoch + 1) * steps_per_epoch - 1))}
            row["train_loss"] = train_loss
            if dataset.splits["validation"]:
                now = Checkpoint(None, run.config, run.frontend)
                results = _predict(
                    run_eval, state.kept, dataset.splits["validation"], now, training.batch_size, stop_here
                )
                row |= evaluate_logits(*results, run.config)
                if not history and math.isnan(row.get("mAP", 0.0)):
                    say(
                        "no label has both positives and negatives among the validation examples: "
                        "the best epoch will be the one with the lowest training loss"
                    )
            row["seconds"] = round(time.monotonic() - began, 1)
            history.append(row)
            _save_state(output, single, history)
            _publish(run, output, single.kept, history)
            say(
                ", ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                )
            )
    return load((output / "best").absolute())


def _softener(run: Run, parallel: DataParallel) -> Callable[[data.Batch], data.Batch]:
    """Return what a teacher, if there is one, makes of a batch's labels."""
    if run.teacher is None:
        return lambda batch: batch
    per_device = run.training.batch_size // len(parallel.devices)
    teacher = distill.load_teacher(run.teacher, run.config, run.frontend, per_device)
    logits, params = parallel.wrap_eval(teacher.logits), parallel.replicate(teacher.params)

    def soften(batch: data.Batch) -> data.Batch:
        heard = {name: batch[name] for name in ("waveform", "num_samples")}
        weight = run.training.teacher_weight
        return {**batch, "labels": distill.soften(batch["labels"], logits(params, heard), weight, run.config)}

    return soften


def _train_epoch(
    run: Run,
    examples: Sequence[datasets.Example],
    step: Callable[..., tuple[train.TrainState, jax.Array]],
    soften: Callable[[data.Batch], data.Batch],
    state: train.TrainState,
    epoch: int,
    stop_here: Callable[..., None],
) -> tuple[train.TrainState, float]:
    """Take one epoch's steps from a replicated state; return the state after it and the mean loss."""
    training = run.training
    steps_per_epoch = len(examples) // training.batch_size
    at = (epoch, epoch + 1)
    ramp = tuple(min(1.0, end / training.ramp_epochs) if training.ramp_epochs else 1.0 for end in at)
    batches = data.train_batches(
        examples, run.frontend, run.config.num_labels,
        batch_size=training.batch_size, seed=training.seed, epoch=epoch, mixup=training.mixup, ramp=ramp,
    )  # fmt: skip
    losses = []
    progress = _progress(f"epoch {epoch + 1}/{training.epochs}", steps_per_epoch)
    with contextlib.closing(batches), progress as advance:
        for batch in batches:
            state, value = step(state, soften(batch))
            losses.append(value)
            advance()
            stop_here(state)
    values = np.array([float(value) for value in losses])
    if not np.isfinite(values).all():
        first = epoch * steps_per_epoch + int(np.flatnonzero(~np.isfinite(values))[0])
        raise FloatingPointError(f"the loss is not finite at step {first} (epoch {epoch + 1}); try a lower rate")
    return state, float(values.mean())


def _publish(run: Run, output: pathlib.Path, params: Any, history: list[dict[str, Any]]) -> None:
    """Bring the rest of a run folder up to the newest state, and remove older ones; done twice, it changes nothing.

    `best/` can be made from the state's own parameters: it changes only where the last epoch is the best.
    """
    if not history:
        return
    if _is_best(history):
        metadata = {**run.metadata, "training": dataclasses.asdict(run.training), "epoch": history[-1]}
        save(output / "best", Checkpoint(params, run.config, run.frontend, json.dumps(metadata)))
    write_text(output / METRICS_FILE, _csv(history))
    newest = _newest_state(output)
    for other in _states(output):
        if other != newest:
            shutil.rmtree(other / "state", ignore_errors=True)  # first, as what has a history is known as a state
            shutil.rmtree(other)


def _is_best(history: list[dict[str, Any]]) -> bool:
    """Whether the last epoch is the best so far: by the first metric that is a number, else by the training loss."""
    metrics = (key for key in ("mAP", "accuracy", "negative_mse") if not math.isnan(history[-1].get(key, math.nan)))
    metric = next(metrics, None)
    scores = [row[metric] if metric else -row["train_loss"] for row in history]
    return len(scores) == 1 or scores[-1] > max(scores[:-1])


def _save_state(output: pathlib.Path, state: train.TrainState, history: list[dict[str, Any]]) -> None:
    """Save what resuming needs, beside the older states."""
    folder = output / f"state-{len(history):04d}"
    with whole_folder(folder) as new:
        write_numpy(new / "state", {str(index): leaf for index, leaf in enumerate(jax.tree.leaves(state))})
        write_text(new / "history.json", json.dumps(history))


def _restore_state(folder: pathlib.Path, like: train.TrainState) -> train.TrainState:
    """Invert `_save_state`."""
    leaves, expected = restore_numpy(folder / "state"), jax.tree.leaves(like)
    restored = [np.asarray(leaves[name]) for name in sorted(leaves, key=int)]
    if [leaf.shape for leaf in restored] != [np.shape(leaf) for leaf in expected]:
        raise ValueError(f"{folder}: expected what {RUN_FILE} describes, got arrays of other shapes; undo the change")
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def _read_history(state: pathlib.Path) -> list[dict[str, Any]]:
    """Return the rows of the epochs before a saved state."""
    path = state / "history.json"
    with _damage(path):
        history = json.loads(path.read_text(encoding="utf-8"))
        if state.name != f"state-{len(history):04d}":
            raise ValueError(f"got {len(history)} epochs")
        if history:
            _is_best(history), _csv(history)  # what will be made of it
        return history


@contextlib.contextmanager
def _damage(path: pathlib.Path) -> Iterator[None]:
    """Turn what reading a damaged file raises into one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path}: expected the file as finetune wrote it, got a damaged one ({reason}); "
            "put it back, or start again in a new folder"
        ) from error


def _newest_state(output: pathlib.Path) -> pathlib.Path | None:
    """Return the last saved state of a run, or None."""
    return max(_states(output), default=None)


def _states(output: pathlib.Path) -> list[pathlib.Path]:
    """Return the saved states of a run, and nothing that a user may have put beside them."""
    return [path.parent for path in output.glob("state-[0-9][0-9][0-9][0-9]/history.json")]


def _csv(history: list[dict[str, Any]]) -> str:
    """Return the history as CSV text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[..., None]]:
    """Hold Ctrl-C back; yield a function that raises it, to be called where stopping is safe.

    Its arguments are arrays to wait for. An exception in the middle of a step could land in a callback of JAX, which
    swallows it, or leave XLA's threads working while the process ends; in the middle of saving, it would lose the
    epoch. A second Ctrl-C stops at once.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield lambda *_: None
        return
    pressed = threading.Event()

    def note(*_: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, previous)

    def stop_here(*pending: Any) -> None:
        if pressed.is_set():
            jax.block_until_ready(pending)
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield stop_here
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Yield a function that advances a progress bar on stderr, shown on a terminal only."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if not console.is_terminal:  # and not `disable=True`: rich before 15 ends a disabled bar with an empty line
        yield lambda: None
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)
