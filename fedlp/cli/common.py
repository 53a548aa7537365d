"""Common code of all commands: Hydra, logging, errors as one line on stderr and an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import hydra
import yaml
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlp.cli.output import close_output
from fedlp.cli.sweeps import job_header, sweep_direction
from fedlp.config import RunConfig, config_dir, explain, prepare, register_schema, schema_of
from fedlp.errors import ConfigError, FedLPError, printable
from fedlp.progress import ERASE_REST

BAD_INPUT, INTERRUPTED = 2, 130
_LONGEST_LINE = 2000
_MODES = ("hydra.mode", "hydra.searchpath", "hydra/")  # overrides that may set the mode


def run_hydra(config_name: str, job: Callable[[DictConfig], float | None]) -> None:
    """Run Hydra's command line on one of the config tree's roots, and exit; sweepers get the job's result."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach _guard whole, instead of being printed by Hydra
    register_schema(config_name)
    schema = schema_of(config_name)
    is_override = {word: "=" in word and not word.startswith("-") for word in sys.argv[1:]}
    flags = [word for word in sys.argv[1:] if not is_override[word]]  # first: argparse takes no words between flags
    overrides = [word for word in sys.argv[1:] if is_override[word]]
    codes: list[int] = []
    main_process = os.getpid()

    def guarded(composed: DictConfig) -> float | None:
        found: list[float | None] = []  # errors are told here, so that the rest of a sweep still runs
        told: list[str] = []
        codes.append(0)  # before the job: a defect of ours in it keeps its traceback
        codes[-1] = guard(lambda: found.append(job(composed)), _job_name(), schema, told)
        if codes[-1] and os.getpid() != main_process:  # a launcher's own process, whose list of codes is a copy
            raise JobFailed(f"a job of the sweep failed: {''.join(told)}")  # its own line may be in a file of its own
        return found[0] if found else None  # sweepers take None as a failed trial

    run = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)(guarded)

    def compose_and_run() -> None:
        sys.argv[1:] = flags + prepare(config_name, overrides) + sweep_direction(overrides)
        try:
            with _composed_once(sys.argv[1:]):
                run()
        except ValueError as error:  # what Hydra raises about some overrides and flags, before there is a job
            if codes and "No trials are completed" not in str(error):  # Optuna's words, after every job failed
                raise
            if codes:
                raise ConfigError("no job of the sweep has a finite objective") from error
            raise ConfigError(_name_file(error) + explain(error, schema)) from error

    sys.exit(end(lambda: max(guard(compose_and_run, schema=schema), *codes, 0)))


@contextmanager
def _composed_once(words: Sequence[str]) -> Iterator[None]:
    """Spare Hydra the composition by which it looks for a mode, where neither flag nor override can set one."""
    original = Hydra.get_mode
    if not any(word.startswith("-") or any(name in word for name in _MODES) for word in words):
        Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = original  # type: ignore[method-assign]


def _name_file(error: ValueError) -> str:
    """Return the name of the config file that is not UTF-8; Hydra's own error lacks it."""
    if not isinstance(error, UnicodeDecodeError):
        return ""
    folders = [config_dir(), *(Path(word) for word in sys.argv[1:] if Path(word).is_dir())]
    folders += [Path(word.partition("=")[2]) for word in sys.argv[1:] if word.startswith("--config-dir=")]
    for path in (path for folder in folders for path in sorted(folder.rglob("*.yaml"))):
        with suppress(OSError):
            if path.read_bytes().startswith(error.object):
                return f"{path}: "
    return ""


class JobFailed(FedLPError):
    """Failure of a sweep's job in another process."""


def output_dir() -> Path:
    """Return the output folder of the current job."""
    return Path(HydraConfig.get().runtime.output_dir)


def announce(composed: DictConfig, source: str | None = None) -> None:
    """Print the first line of a command: what is loading (``source``, else data and model), and its folder."""
    source = source or " and ".join(_name_of(composed, group) for group in ("dataset", "model"))
    print(f"{job_header()}loading {source}  -> {output_dir()}", flush=True)


def _name_of(composed: DictConfig, group: str) -> str:
    """Return the chosen part of a group, and the last part of the path that it reads."""
    name, path = (OmegaConf.select(composed, f"{group}.{field}") for field in ("name", "path"))
    return f"{name or '?'} ({Path(str(path)).name})" if path else f"{name or '?'}"


def set_up_logging() -> None:
    """Direct fedlp's warnings to stderr, prefixed by the program's name, each text once."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("fedlp: %(message)s"))
    handler.addFilter(_Once())
    logger = logging.getLogger("fedlp")
    logger.handlers, logger.propagate = [handler], False
    logger.disabled = False  # Hydra disables all loggers it finds before every job of a sweep
    logger.setLevel(logging.WARNING)


class _Once(logging.Filter):
    """Filter of messages that were told before, such as of every candidate of a search."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the text is new."""
        text = record.getMessage()
        is_new = text not in self._told
        self._told.add(text)
        return is_new


class _Printable(logging.Formatter):
    """Formatter of messages as one line without terminal escapes; messages may quote clients."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        return _line_start() + printable(super().format(record), _LONGEST_LINE)


def _line_start() -> str:
    """Return the escape sequence that clears the progress line of a terminal; empty elsewhere."""
    return f"\r{ERASE_REST}" if sys.stderr.isatty() else ""


def _job_name() -> str:
    """Return the prefix of error messages of a sweep's job."""
    config = HydraConfig.get()
    if config.mode != RunMode.MULTIRUN:
        return ""
    return f"job {config.job.num} ({', '.join(word.lstrip('+') for word in config.overrides.task)}): "


def guard(action: Callable[[], object], name: str = "", schema: type = RunConfig, told: list[str] | None = None) -> int:
    """Run an action; report user errors as one line, which is added to ``told``, and an exit code."""
    try:
        action()
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        close_output()
    except (FedLPError, HydraException, OmegaConfBaseException, OSError, yaml.YAMLError) as error:
        text = f"{name}{explain(error, schema)}"
        print(f"{_line_start()}fedlp: {text}", file=sys.stderr)
        if told is not None:
            told.append(text)
        return BAD_INPUT
    return 0


def end(guarded: Callable[[], int]) -> int:
    """Exit the program with a code, after both streams are flushed."""

    def refuse(_: argparse.ArgumentParser, message: str) -> NoReturn:
        raise ConfigError(message)

    argparse.ArgumentParser.error = refuse  # type: ignore[method-assign, assignment] # Hydra's own parser would print its usage
    try:
        with _stoppable():
            code = guarded()
            close_output()
            return code
    except Stopped as stop:
        return 128 + stop.number
    except KeyboardInterrupt:
        return INTERRUPTED


class Stopped(KeyboardInterrupt):
    """Termination signal, raised as an exception so that the run ends as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def _stoppable() -> Iterator[None]:
    """Raise :class:`Stopped` on SIGTERM and SIGHUP, once; where they are ignored, as under nohup, they stay so."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [getattr(signal, name) for name in names if signal.getsignal(getattr(signal, name)) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        heeded = []

    def stop(number: int, _: object) -> None:
        for each in heeded:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    for number in heeded:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, signal.SIG_DFL)
