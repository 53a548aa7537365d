"""Validation of run files, field by field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedlp.errors import DataError
from fedlp.types import ClientCost, ClientEvaluation, ClientFailure, ClientTime, DeviceUse, RoundRecord, RoundTime

COUNTERS = ("bytes_up", "bytes_down", "params_up", "params_down", "macs", "wall_time_s")
_INITIAL_ROUND: Mapping[str, Any] = {**dict.fromkeys(COUNTERS, 0), "coverage": {}} | {
    name: [] for name in ("cohort", "failures", "clients")
}


def round_record(entry: Mapping[str, Any], where: str) -> RoundRecord:
    """Return one line of ``rounds.jsonl``; the line of round 0 needs no costs.

    Raises
    ------
    DataError
        If a field is missing, of another type or out of range; ``where`` says of which file and line.
    """
    server_round = _count(entry, "server_round", where)
    if server_round == 0:
        entry = {**_INITIAL_ROUND, **entry}
    coverage = numbers(_field(entry, "coverage", where), f"{where}: coverage")
    for layer, fraction in coverage.items():
        if not 0 <= fraction <= 1:
            raise DataError(f"{where}: coverage of {layer} is {fraction}, not in [0, 1]; the file is damaged")
    cohort = _list(entry, "cohort", where)
    if not all(is_count(client) for client in cohort):
        raise DataError(f"{where}: cohort is not a list of client ids; the file is damaged")
    return RoundRecord(
        server_round=server_round,
        cohort=tuple(cohort),
        bytes_up=_count(entry, "bytes_up", where),
        bytes_down=_count(entry, "bytes_down", where),
        params_up=_count(entry, "params_up", where),
        params_down=_count(entry, "params_down", where),
        macs=_amount(entry, "macs", where),
        coverage=coverage,
        failures=tuple(_failure(mapping(item, where), where) for item in _list(entry, "failures", where)),
        clients=tuple(_cost(mapping(item, where), where) for item in _list(entry, "clients", where)),
        metrics=numbers(_field(entry, "metrics", where), f"{where}: metrics"),
        wall_time_s=_amount(entry, "wall_time_s", where),
        evaluations=tuple(
            _evaluation(mapping(item, where), where) for item in _optional_list(entry, "evaluations", where)
        ),
        absent=_absent(mapping(entry.get("absent", {}), where), where),
        phases=_phases(mapping(entry.get("phases", {}), where), where),
        privacy=_privacy(entry, where),
        clipped=_clipped(mapping(entry.get("clipped", {}), where), where),
        staleness=_staleness(mapping(entry.get("staleness", {}), where), where),
        simulated=round_time(mapping(entry["simulated"], where), where) if "simulated" in entry else None,
    )


def _failure(item: Mapping[str, Any], where: str) -> ClientFailure:
    reason, message = (str(_field(item, name, where)) for name in ("reason", "message"))
    return ClientFailure(_count(item, "client_id", where), reason, message)


def _cost(item: Mapping[str, Any], where: str) -> ClientCost:
    counts = {name: _count(item, name, where) for name in ("client_id", "num_examples", *COUNTERS[:4])}
    loss = item.get("train_loss")  # None of a client that sent none, and in files of fedlp 0.1
    if loss is not None:
        loss = numbers({"train_loss": loss}, where)["train_loss"]
    return ClientCost(**counts, macs=_amount(item, "macs", where), train_loss=loss)


def _absent(item: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    for reason, ids in item.items():
        if not isinstance(ids, list) or not all(is_count(client_id) for client_id in ids):
            raise DataError(f"{where}: absent clients ({reason}) are not a list of client ids; the file is damaged")
    return {reason: tuple(ids) for reason, ids in item.items()}


def _phases(item: Mapping[str, Any], where: str) -> dict[str, dict[str, int]]:
    counters = ("bytes_down", "bytes_up")
    return {name: {key: _count(mapping(found, where), key, where) for key in counters} for name, found in item.items()}


def _privacy(entry: Mapping[str, Any], where: str) -> dict[str, float]:
    return numbers(mapping(entry.get("privacy") or {}, where), f"{where}: privacy")


def _clipped(item: Mapping[str, Any], where: str) -> dict[int, float]:
    if not all(name.isdecimal() for name in item):
        raise DataError(f"{where}: clipped clients are not named by their ids; the file is damaged")
    return {int(name): scale for name, scale in numbers(item, f"{where}: clipped").items()}


def _staleness(item: Mapping[str, Any], where: str) -> dict[int, int]:
    if not all(name.isdecimal() and is_count(steps) for name, steps in item.items()):
        raise DataError(f"{where}: staleness is not a count of steps by client; the file is damaged")
    return {int(name): steps for name, steps in item.items()}


def _evaluation(item: Mapping[str, Any], where: str) -> ClientEvaluation:
    counts = {name: _count(item, name, where) for name in ("client_id", "num_examples")}
    metrics = numbers(_field(item, "metrics", where), f"{where}: metrics of a client")
    return ClientEvaluation(tier=str(_field(item, "tier", where)), metrics=metrics, **counts)


def _field(entry: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in entry:
        raise DataError(f"{where} is damaged: it has no {name}")
    return entry[name]


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """Return ``value``, which must be an object."""
    if not isinstance(value, dict):
        raise DataError(f"{where} is damaged: it holds {type(value).__name__} where an object belongs")
    return value


def _list(entry: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = _field(entry, name, where)
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} is not a list; the file is damaged")
    return value


def _optional_list(entry: Mapping[str, Any], name: str, where: str) -> list[Any]:
    return _list(entry, name, where) if name in entry else []


def round_time(item: Mapping[str, Any], where: str) -> RoundTime:
    """Return the simulated time of a round; DataError as of :func:`round_record`."""
    clients = (mapping(one, where) for one in _list(item, "clients", where))
    devices = mapping(_field(item, "devices", where), where)
    return RoundTime(
        seconds=_amount(item, "seconds", where),
        since_start_s=_amount(item, "since_start_s", where),
        clients=tuple(_client_time(one, where) for one in clients),
        devices={name: _device_use(mapping(use, where), where) for name, use in devices.items()},
    )


def _client_time(item: Mapping[str, Any], where: str) -> ClientTime:
    started, *phases = (_amount(item, name, where) for name in ("started_s", "download_s", "training_s", "upload_s"))
    client_id, staleness = (_count(item, name, where) for name in ("client_id", "staleness"))
    device, finished = str(_field(item, "device", where)), _field(item, "finished", where) is True
    return ClientTime(client_id, device, started, phases[0], phases[1], phases[2], staleness, finished)


def _device_use(item: Mapping[str, Any], where: str) -> DeviceUse:
    counts = {name: _count(item, name, where) for name in ("clients", "asked", "finished")}
    energy = None if item.get("energy_j") is None else _amount(item, "energy_j", where)
    busy, utilisation = (_amount(item, name, where) for name in ("busy_s", "utilisation"))
    return DeviceUse(busy_s=busy, utilisation=utilisation, energy_j=energy, **counts)


def is_count(value: Any) -> bool:
    """Whether ``value`` is a whole number >= 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _count(entry: Mapping[str, Any], name: str, where: str) -> int:
    value = _field(entry, name, where)
    if not is_count(value):
        raise DataError(f"{where}: {name} is {value!r}, not a whole number >= 0; the file is damaged")
    return int(value)


def _amount(entry: Mapping[str, Any], name: str, where: str) -> float:
    value = numbers({name: _field(entry, name, where)}, where)[name]
    if not 0 <= value < math.inf:
        raise DataError(f"{where}: {name} is {value}, not a finite number >= 0; the file is damaged")
    return value


def budgets(values: Any, where: str) -> dict[str, dict[str, dict[str, float]]]:
    """Return tier -> name of a limit -> ``limit`` (> 0) and ``used`` (>= 0)."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for tier, limits in mapping(values, where).items():
        for name, entry in mapping(limits, f"{where}: {tier}").items():
            place = f"{where}: {tier}: {name}"
            pair = {key: _amount(mapping(entry, place), key, place) for key in ("limit", "used")}
            if not pair["limit"]:
                raise DataError(f"{place}: limit is 0, not a number > 0; the file is damaged")
            found.setdefault(tier, {})[name] = pair
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def only_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among ``values``, as floats."""
    return {name: float(value) for name, value in values.items() if _is_number(value)}


def numbers(values: Any, where: str) -> dict[str, float]:
    """Return ``values`` as floats; null stands for a number that was not finite."""
    for name, value in mapping(values, where).items():
        if value is not None and not _is_number(value):
            raise DataError(f"{where}: {name} is {value!r}, not a number; the file is damaged")
    return {name: math.nan if value is None else float(value) for name, value in values.items()}
