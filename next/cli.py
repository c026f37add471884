"""How every job reads its command line and ends: flags, the near match, exit codes."""

from __future__ import annotations

import argparse
import codecs
import inspect
import io
import logging
import os
import sys
import time
import traceback
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from next.addresses import require_no_secret
from next.benchmark.card import Benchmark, load_card
from next.config import RunConfig, load_recipe, near_matches, override
from next.data.shards.reader import open_manifest
from next.stopping import INTERRUPTED, LostRayError, Stopped, heeding, lost_ray

USER_ERROR = 2
"""Exit code of a run that did not start because of what the user gave."""
FAILURE = 1
"""Exit code of a run that started and failed."""

REQUIRED: Any = tyro.MISSING
"""Default of a flag that has to be given."""

_OUTSIDE = (
    *("cache", "check", "checkpoint", "data", "figures", "folder", "gallery", "peek", "picture"),
    *("labels", "ledger", "out", "queries", "replay", "shards", "source", "verify_order"),
)
"""Fields of jobs that name data or results, which are never part of the project's own files."""

_RENAMED = {"peers": "peers-schedule"}
"""Recipes of cards by their former names; shards that were prepared earlier still have those."""

_log = logging.getLogger(__name__)

Job = TypeVar("Job")

Settings = Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
"""A job's field of this type gives it all settings as flags, under their own names."""


def parse(job: type[Job], argv: Sequence[str], *, default: Job | None = None) -> Job:
    """Read ``argv`` into ``job``; a wrong flag ends the process with code 2 and the near match.

    Raises:
        ValueError: flags that are fine one by one but do not fit each other, a folder that a
            Ray job would not find or would lose (:func:`refuse_fleeting`), or an address that
            holds a secret.
    """
    refuse_secrets(argv)
    settings: dict[str, Any] = {} if default is None else {"default": default}
    parsed = tyro.cli(
        job,
        args=[_underscored(word) for word in argv],
        prog=Path(sys.argv[0]).name,
        description=inspect.cleandoc(job.__doc__ or ""),
        use_underscores=True,
        **settings,
    )
    for name, value in vars(parsed).items():
        if name in _OUTSIDE and value is not None:
            refuse_fleeting(f"--{name}", value)
        elif isinstance(value, RunConfig) and "data" in vars(parsed):
            refuse_fleeting("run.storage_path", value.run.storage_path, buckets=False)
            refuse_fleeting("checkpoint.storage_path", value.checkpoint.storage_path)
            refuse_fleeting("data.cache", value.data.cache, buckets=False)
    return parsed


def call_verb(
    argv: Sequence[str],
    verbs: Mapping[str, Callable[[Sequence[str]], int]],
    usage: str,
    *,
    unsaid: str | None = None,
) -> int:
    """Call the verb that a command line begins with; gives the exit code.

    Args:
        argv: words of the command line. ``--help``, or none, shows the usage.
        verbs: each gets the words after its own.
        usage: of the job.
        unsaid: verb of a command line that begins with a flag; None: there is none.

    Raises:
        ValueError: there is no such verb; the near match is named.
    """
    first = argv[0] if argv else ""
    if first in verbs:
        return verbs[first](argv[1:])
    if first in ("", "-h", "--help"):
        sys.stdout.write(f"{usage.rstrip()}\n")
        return 0 if first else USER_ERROR
    if unsaid is not None and first.startswith("-"):
        return verbs[unsaid](argv)
    close = near_matches(first, list(verbs)) or list(verbs)
    raise ValueError(
        f"the first word must be one of {', '.join(verbs)}, but got {first!r}; did you mean "
        f"{' or '.join(close)}?"
    )


@dataclass(frozen=True)
class ModelFlags:
    """Flags of every job that uses a trained model, wherever it is kept."""

    threads: int | None = None
    """Torch threads; None: as torch chooses."""
    tracking_uri: Annotated[str | None, tyro.conf.arg(name="tracking.uri")] = None
    """MLflow server that has the model; without it, the local one of --storage_path."""
    storage_path: Path = Path("runs")
    """Folder of all runs, whose local server is asked for the model."""

    @property
    def registry(self) -> dict[str, Any]:
        """Where registered models are, for :meth:`next.training.embedder.Embedder.load`."""
        return {"tracking_uri": self.tracking_uri, "storage_path": self.storage_path}


Place = Annotated[ModelFlags, tyro.conf.arg(name="")]
"""A job's field of this type gives it these flags, under their own names."""


@dataclass(frozen=True)
class RunJob(ABC):
    """Fields of every job that trains a run; each job adds its own."""

    data: str
    """Folder of shards that jobs/prepare.py wrote."""
    card: Path | None = None
    """Card whose recipe gives the defaults; the shards' own card where it is left out."""
    recipe: Path | None = None
    """Name of one of the card's recipes, or a TOML file of settings; flags replace both."""
    fresh: bool = False
    """Start from nothing although a run of this name exists; the same as --run.fresh True."""
    dry_run: bool = False
    """Print the resolved plan with a measured estimate of time, and start nothing."""
    json: bool = False
    """Print the answer as one JSON object."""
    config: Settings = RunConfig()  # noqa: RUF009 (frozen)


AnyRunJob = TypeVar("AnyRunJob", bound=RunJob)


def parse_run(job: type[AnyRunJob], argv: Sequence[str]) -> tuple[AnyRunJob, RunConfig]:
    """The job, and its settings with the data and whether the run starts from nothing.

    Raises:
        ValueError: as :func:`parse` and :func:`run_defaults`.
        FileNotFoundError: as :func:`run_defaults`.
    """
    parsed = parse(job, argv, default=job(data=REQUIRED, config=run_defaults(argv)))
    fresh = parsed.fresh or parsed.config.run.fresh
    return parsed, override(parsed.config, {"data.uri": parsed.data, "run.fresh": fresh})


def refuse_fleeting(name: str, path: str | Path | None, *, buckets: bool = True) -> None:
    """In a job of ``ray job submit``, refuse a relative folder of data or results.

    Args:
        name: the flag or setting, for the message.
        path: None is fine.
        buckets: whether it may lie in an object store.

    Raises:
        ValueError: it would be looked up in the copy of the project in which Ray runs the job;
            data are not copied, and what a run writes there is deleted with the copy.
    """
    in_ray_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    where = "absolute path or s3:// address" if buckets else "absolute path"
    if in_ray_job and path is not None and not str(path).startswith(("/", "~", "s3://")):
        raise ValueError(
            f"{name} must be an {where} in a Ray job, because Ray runs it in a copy of the "
            f"project that holds no data and is deleted afterwards, but got {str(path)!r}"
        )


def refuse_secrets(argv: Sequence[str]) -> None:
    """Refuse a command line whose addresses hold a user, a password or a key.

    Raises:
        ValueError: one does; the flag is named, and the secret not repeated.
    """
    flag = "an address"
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            flag, word = name, value if equals else ""
        require_no_secret(word, flag)


def named_options(argv: Sequence[str], *names: str) -> dict[str, str]:
    """The values of single flags that decide the defaults of all others (``--card``)."""
    scout = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        scout.add_argument(f"--{name}")
    found, _ = scout.parse_known_args(argv)
    return {name: value for name, value in vars(found).items() if value is not None}


def run_defaults(argv: Sequence[str]) -> RunConfig:
    """The configuration that ``--card``, ``--data`` and ``--recipe`` amount to; flags come on top.

    The recipe is that of ``--card`` where it is given, else of the card within the shards.

    Raises:
        ValueError: card and shards are of different benchmarks, a recipe does not fit, or the
            shards are named by a relative path in a Ray job, or an address holds a secret.
        FileNotFoundError: one of the files is missing.
    """
    refuse_secrets(argv)
    named = named_options(argv, "card", "data", "recipe")
    refuse_fleeting("--data", named.get("data"))
    card = load_card(named["card"]) if "card" in named else None
    stored = open_manifest(named["data"]).benchmark if "data" in named else None
    if card is not None and stored is not None and card.name != stored.name:
        raise ValueError(
            f"--card is of {card.name}, but the shards in --data are of {stored.name}; "
            f"give the card that they were prepared with, or leave --card out"
        )
    chosen = card or stored
    config = base_config(chosen, named.get("recipe"))
    epochs = named_options(argv, "optim.epochs").get("optim.epochs", "")
    if epochs.isdecimal() and not any(word.startswith("--optim.warmup") for word in argv):
        config = override(config, _warmup_left_to(config.optim.warmup_epochs, int(epochs)))
    return override(config, {"data.uri": named["data"]}) if "data" in named else config


def _warmup_left_to(epochs: float | None, given: float) -> dict[str, Any]:
    """What becomes of a recipe's warm-up of so many epochs where fewer are ``given`` to train."""
    if epochs is None or epochs <= given:
        return {}
    _log.info(
        "optim.warmup_epochs = %g of the recipe does not fit optim.epochs = %g; it is derived",
        *(epochs, given),
    )
    return {"optim.warmup_epochs": None}


def base_config(card: Benchmark | None, recipe: str | Path | None) -> RunConfig:
    """Defaults, then the card's recipe, then the one asked for; flags come last.

    Args:
        card: of the data; None: no data yet.
        recipe: name of one of the card's recipes, or a TOML file of settings.

    Raises:
        ValueError: a recipe names an unknown setting or holds a bad value.
        FileNotFoundError: the card has no such recipe, and there is no such file.
    """
    settings: dict[str, Any] = dict(card.recipe) if card is not None else {}
    asked: dict[str, Any] = {}
    if recipe is not None:
        named = card.recipes if card is not None else {}
        new = _RENAMED.get(str(recipe))
        if new is not None and (recipe in named or new in named) and not Path(recipe).exists():
            _log.warning(
                "--recipe %s is the former name of %s, which is less than what DeMo and IDEA run; "
                "--recipe demo-training and idea-training train as they do",
                *(recipe, new),
            )
            recipe = recipe if recipe in named else new
        if str(recipe) in named:
            asked = named[str(recipe)]
        elif not Path(recipe).exists() and named:
            raise FileNotFoundError(
                f"--recipe must name a TOML file or one of the card's recipes "
                f"({', '.join(named)}), but got {str(recipe)!r}"
            )
        else:
            asked = load_recipe(recipe)
    epochs = asked.get("optim.epochs")
    if isinstance(epochs, int) and "optim.warmup_epochs" not in asked:
        asked = asked | _warmup_left_to(settings.get("optim.warmup_epochs"), epochs)
    return override(RunConfig(), settings | asked)


class ProgressLine:
    """A line on stderr that says how far the work is and what is left of it.

    On a terminal it has a bar and is rewritten in place; in a log it comes every five seconds.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.started = self.shown = time.monotonic()
        self.alive = sys.stderr.isatty()

    def __enter__(self) -> ProgressLine:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` samples are done, if it is time to."""
        now = time.monotonic()
        if now - self.shown < (0.2 if self.alive else 5) and done < total:
            return
        self.shown = now
        left = (now - self.started) / done * (total - done)
        line = f"{done}/{total} samples  {done / total:.0%}  about {left:.0f} s left"
        bar = "█" * (20 * done // total)
        shown = f"\r{self.what}  {bar:░<20}  {line:<48}" if self.alive else f"{self.what}  {line}\n"
        sys.stderr.write(shown)
        sys.stderr.flush()

    def __exit__(self, *exception: object) -> None:
        if self.alive:
            sys.stderr.write("\n")


def run_job(main: Callable[[Sequence[str]], int], kept: str = "nothing is half written") -> None:
    """Call a job's ``main`` with the command line and end the process with its exit code.

    What a user can mend (``ValueError``, ``OSError``) is printed as its message alone, with code 2;
    everything else is a failure of the run: code 1, with the traceback. SIGTERM and Ctrl-C end a
    job with code 75 and a line that says what is kept and how to go on.

    Args:
        main: gets the command line, gives the exit code.
        kept: what is kept of a job that is stopped, where ``main`` does not say it by
            :class:`next.stopping.Stopped`.
    """
    # What a terminal's encoding lacks is shown by its code; a name must not end the job.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Libraries log to the root logger or their own; only what the user should act on is shown.
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("next").setLevel(logging.INFO)
    stopped = f"stopped; {kept}, and the same command goes on"
    with heeding() as asked:
        try:
            code = main(sys.argv[1:])
        except Stopped as error:
            code = _end(f"{error}", INTERRUPTED)
        except LostRayError as error:
            code = _end(f"error: {error}", FAILURE)
        except KeyboardInterrupt:
            lost = lost_ray()
            code = (
                _end(stopped, INTERRUPTED)
                if lost is None
                else _end(f"error: {lost}; {kept}, and the same command goes on", FAILURE)
            )
        except Exception as error:
            if asked.is_set():  # an import or a library made it of the signal
                code = _end(stopped, INTERRUPTED)
            elif isinstance(error, UnicodeError):
                code = _end(f"error: {_unreadable(error)}", USER_ERROR)
            elif isinstance(error, ValueError | OSError):
                code = _end(f"error: {error}", USER_ERROR)
            else:
                code = _end(traceback.format_exc().rstrip(), FAILURE)
    sys.stdout.flush()
    if lost_ray() is not None:
        os._exit(code)  # what Ray does at exit would wait for the processes that are gone
    sys.exit(code)


def _unreadable(error: UnicodeError) -> str:
    """What an error of encoding is about: a name or a text, which Python's message leaves out."""
    about = getattr(error, "object", b"")
    encoding = sys.getfilesystemencoding()
    if codecs.lookup(encoding).name != "utf-8":
        return (
            f"{ascii(about)[:300]}: {error}; names of files are {encoding} in this locale: "
            f"export PYTHONUTF8=1, or LC_ALL=C.UTF-8"
        )
    return f"{ascii(about)[:300]}: {error}; rename the file, or write it as UTF-8"


def _end(said: str, code: int) -> int:
    sys.stderr.write(f"{said}\n")
    sys.stderr.flush()
    _log.debug("%s", traceback.format_exc())
    return code


def _underscored(word: str) -> str:
    """``--dry-run`` as ``--dry_run``: tyro takes both, and knows near matches of the latter."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value
