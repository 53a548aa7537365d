"""Client app: decode an instruction, hand it to the client's runtime, return the requested slices.

The same app runs in the worker processes of the local engine, in Ray actors and on real SuperNodes. Identity is the
partition id of the node's config.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlp.data.device_data import OwnPlace
from fedlp.errors import DataError, FedLPError
from fedlp.federation.budgets import read_budget
from fedlp.federation.client.cohort_app import CohortApp, Received, attempt
from fedlp.federation.client.runtime import ClientRuntime
from fedlp.federation.flower_compat import make_reply
from fedlp.federation.oneshot import messages as pooling_messages
from fedlp.federation.privacy import protect_update
from fedlp.federation.secagg import messages as secagg_messages
from fedlp.federation.secagg.client import SecAggClient
from fedlp.federation.secagg.pooled_sums import PooledSums
from fedlp.federation.wire import evaluation_messages, messages
from fedlp.federation.wire.stacks import TRAIN_COHORT, decode_instructions, encode_updates
from fedlp.types import ClientUpdate, EvaluationRequest, TrainInstruction

log = logging.getLogger("fedlp")

RAISED = 2  # Flower's code for a ClientApp that raised


class MakeRuntime(Protocol):
    """Factory of the runtime for a config (YAML), the folder of clients' files and the path of a device's own data."""

    def __call__(self, cfg: str, state_dir: str, own: OwnPlace | None = None) -> ClientRuntime: ...  # noqa: D102


ReadSettings = Callable[[Message, Context], tuple[str, Path]]


def make_client_app(make_runtime: MakeRuntime, read_settings: ReadSettings) -> ClientApp:
    """Return the Flower app around a runtime.

    Parameters
    ----------
    make_runtime : callable
        Returns a runtime; expected to cache it.
    read_settings : callable
        Returns the config (YAML) and the run directory of a message or the node's run config.
    """
    app, answers = CohortApp(), _Answers(make_runtime, read_settings)
    app.query("capabilities")(answers.capabilities)
    for kind in pooling_messages.KINDS:
        app.query(kind.removeprefix("query."))(answers.pooling)
    app.query(pooling_messages.MODEL.removeprefix("query."))(answers.take_model)
    for kind in secagg_messages.KINDS:
        app.query(kind.removeprefix("query."))(answers.secure)
    app.query("statistics")(answers.statistics)
    app.train()(answers.train)
    app.train(TRAIN_COHORT.removeprefix("train."))(answers.train_stack)
    app.cohort(answers.train_cohort)
    app.evaluate("client")(answers.evaluate_own)
    app.evaluate("central")(answers.evaluate)
    return app


class _Answers:
    """The answers of a client to the server's messages."""

    def __init__(self, make_runtime: MakeRuntime, read_settings: ReadSettings) -> None:
        self._make_runtime, self._read_settings = make_runtime, read_settings

    def capabilities(self, message: Message, context: Context) -> Message:
        """Return the client's profile; an error reply if it cannot take part."""
        client_id = client_id_of(context)
        try:
            path = context.node_config.get("budget")
            budget = None if path is None else read_budget(Path(str(path)))
            profile = self._runtime(message, context).profile(client_id, budget)
        except FedLPError as error:  # one line in the device's log, and the client's name in the server's
            log.error("client %d cannot take part: %s", client_id, error)
            return Message(Error(RAISED, f"client {client_id}: {error}"), reply_to=message)
        return Message(messages.encode_profile(profile), reply_to=message)

    def train(self, message: Message, context: Context) -> Message:
        """Return the update that an instruction asks for."""
        runtime = self._runtime(message, context)
        instruction = read_instruction(runtime, message, context)
        if runtime.settings.secagg is not None:
            client = self._secure_client(message, context)
            return Message(train_masked(runtime, client, message.content, instruction), reply_to=message)
        return _respond(runtime, message, context, runtime.train(instruction))

    def train_stack(self, message: Message, context: Context) -> Message:
        """Return the stack of the updates of several clients with equal instructions."""
        runtime = self._runtime(message, context)
        settings = runtime.settings
        if not settings.batched or settings.secagg is not None or settings.privacy.name == "local_dp":
            raise DataError("an instruction to several clients is for batched cohorts of the local engine")
        instruction, client_ids = decode_instructions(message.content, runtime.submodels, settings.download)
        stack = runtime.train_stack(instruction, client_ids)
        return make_reply(encode_updates(stack, runtime.submodels), message)

    def train_cohort(self, received: Received) -> list[Message | Exception]:
        """Return the update that each of several instructions asks for, or why there is none."""
        runtime = self._runtime(*received[0])
        if runtime.settings.secagg is not None:
            return [attempt(lambda pair: self.train(*pair), pair) for pair in received]
        known: messages.Known = {}
        read = [attempt(lambda pair: read_instruction(runtime, *pair, known), pair) for pair in received]
        updates = runtime.train_cohort([one for one in read if isinstance(one, TrainInstruction)])
        replies: list[Message | Exception] = []
        for pair, one in zip(received, read, strict=True):
            update = one if isinstance(one, Exception) else next(updates)
            send = partial(_respond, runtime, *pair)
            replies.append(update if isinstance(update, Exception) else attempt(send, update))
        return replies

    def pooling(self, message: Message, context: Context) -> Message:
        """Return the answer to a question of one-shot pruning."""
        runtime, client_id = self._runtime(message, context), client_id_of(context)
        folder = self._state_dir(message, context) / str(client_id)
        kind = message.metadata.message_type
        if runtime.settings.secagg is not None:
            client = self._secure_client(message, context)
            masked = pool_masked(runtime, client, kind, message.content, client_id, folder)
            return Message(masked, reply_to=message)
        return Message(runtime.pooling.answer(kind, message.content, client_id, folder), reply_to=message)

    def take_model(self, message: Message, context: Context) -> Message:
        """Keep the model that questions of one-shot pruning are about; return the answer that says so."""
        runtime, client_id = self._runtime(message, context), client_id_of(context)
        folder = self._state_dir(message, context) / str(client_id)
        return Message(runtime.pooling.take_model(message.content, folder), reply_to=message)

    def secure(self, message: Message, context: Context) -> Message:
        """Return the answer to a message of secure aggregation beside training."""
        content = self._secure_client(message, context).answer(
            message.metadata.message_type, message.content, client_id_of(context)
        )
        return Message(content, reply_to=message)

    def _secure_client(self, message: Message, context: Context) -> SecAggClient:
        runtime = self._runtime(message, context)
        settings = runtime.settings
        if settings.secagg is None:
            raise DataError("this run has no secure aggregation")
        folder = self._state_dir(message, context) / str(client_id_of(context))
        return SecAggClient(settings.secagg, runtime.submodels, folder, settings.sends_deltas)

    def statistics(self, message: Message, context: Context) -> Message:
        """Return the batch norm statistics of a sub-model on the client's examples."""
        runtime = self._runtime(message, context)
        submodel, params = evaluation_messages.decode_submodel(
            message.content, runtime.submodels, runtime.settings.download
        )
        found = runtime.statistics(submodel, params, client_id_of(context))
        return Message(evaluation_messages.encode_statistics(found.params, found.num_examples), reply_to=message)

    def evaluate_own(self, message: Message, context: Context) -> Message:
        """Return the evaluation sums on the client's own test examples."""
        runtime = self._runtime(message, context)
        download = runtime.settings.download
        request = evaluation_messages.decode_evaluation_request(
            message.content, runtime.submodels, download, runtime.settings.encoded_base
        )
        if request.client_id != client_id_of(context):
            raise DataError(f"client {client_id_of(context)} was sent the evaluation of {request.client_id}")
        if runtime.settings.secagg is not None:
            client = self._secure_client(message, context)
            return Message(evaluate_masked(runtime, client, message.content, request), reply_to=message)
        return Message(evaluation_messages.encode_client_sums(*runtime.evaluate_own(request)), reply_to=message)

    def evaluate(self, message: Message, context: Context) -> Message:
        """Return the evaluation sums on a range of the test examples."""
        runtime = self._runtime(message, context)
        submodel, params, start, stop = evaluation_messages.decode_range(message.content, runtime.submodels)
        return Message(
            evaluation_messages.encode_sums(runtime.evaluate(params, start, stop, submodel)), reply_to=message
        )

    def _runtime(self, message: Message, context: Context) -> ClientRuntime:
        cfg, _ = self._read_settings(message, context)
        state_dir, place = str(self._state_dir(message, context)), context.node_config.get("data")
        if place is None:
            return self._make_runtime(cfg, state_dir)
        return self._make_runtime(cfg, state_dir, OwnPlace(client_id_of(context), str(place)))

    def _state_dir(self, message: Message, context: Context) -> Path:
        """Return the folder of the clients' files."""
        _, out = self._read_settings(message, context)
        return Path(str(context.node_config.get("state-dir", out / "clients")))


def train_masked(
    runtime: ClientRuntime, client: SecAggClient, content: RecordDict, instruction: TrainInstruction
) -> RecordDict:
    """Return a masked update; the client's secrets are forgotten where there is none."""
    secrets, most_examples = client.begin_masking(content, instruction.client_id)
    try:
        return client.mask(secrets, most_examples, instruction, runtime.train(instruction))
    except BaseException:
        client.forget()
        raise


def evaluate_masked(
    runtime: ClientRuntime, client: SecAggClient, content: RecordDict, request: EvaluationRequest
) -> RecordDict:
    """Return masked evaluation sums; the client's secrets are forgotten where there are none."""
    secrets, _ = client.begin_masking(content, request.client_id)
    try:
        return client.mask_sums(secrets, request.client_id, *runtime.evaluate_own(request))
    except BaseException:
        client.forget()
        raise


def pool_masked(
    runtime: ClientRuntime, client: SecAggClient, kind: str, content: RecordDict, client_id: int, folder: Path
) -> RecordDict:
    """Return masked sums of one-shot pruning; the client's secrets are forgotten where there are none."""
    secrets, _ = client.begin_masking(content, client_id)
    try:
        parts, sums, num_examples = runtime.pooling.measure(kind, content, client_id, folder)
        words = PooledSums(kind, parts, len(secrets.dealers)).encode(sums, num_examples)
        return client.mask_words(secrets, client_id, words)
    except BaseException:
        client.forget()
        raise


def _respond(runtime: ClientRuntime, message: Message, context: Context, update: ClientUpdate) -> Message:
    """Return the reply that holds an update."""
    settings = runtime.settings
    reply = make_reply(messages.encode_update(update, runtime.submodels, settings.entropy_coding), message)
    return protect_update(settings.privacy, settings.seed, update, message, reply, context)


def read_instruction(
    runtime: ClientRuntime, message: Message, context: Context, known: messages.Known | None = None
) -> TrainInstruction:
    """Return a message's instruction; DataError if it is another client's. ``known`` as of ``decode_instruction``."""
    settings = runtime.settings
    instruction = messages.decode_instruction(
        message.content, runtime.submodels, known, settings.download, settings.encoded_base
    )
    if instruction.client_id != client_id_of(context):
        raise DataError(f"client {client_id_of(context)} was sent the instruction of {instruction.client_id}")
    return instruction


def client_id_of(context: Context) -> int:
    """Return the partition id of a node; DataError if its config has none."""
    partition_id = context.node_config.get("partition-id")
    if not isinstance(partition_id, int) or isinstance(partition_id, bool):
        raise DataError("the node has no partition-id; start it with --node-config 'partition-id=0 num-partitions=N'")
    return partition_id
