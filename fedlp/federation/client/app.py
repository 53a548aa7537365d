"""Client app: decode an instruction, build the sub-model, train it on the client's shard, return the requested slices.

The same app runs in the worker processes of the local engine, in Ray actors and on real SuperNodes. Identity is the
partition id of the node's config.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedlp.data.datasets import DataInfo, Examples
from fedlp.data.device_data import OwnPlace
from fedlp.errors import DataError, FedLPError
from fedlp.federation.budgets import read_budget
from fedlp.federation.client.ordered_dropout import NestedWidth, nested_counts
from fedlp.federation.client.own_evaluation import personalise
from fedlp.federation.client.settings import ClientSettings
from fedlp.federation.client.shards import Shards
from fedlp.federation.client.store import ClientStore
from fedlp.federation.client.uploads import Uploads
from fedlp.federation.oneshot import messages as pooling_messages
from fedlp.federation.oneshot.client import PoolingClient
from fedlp.federation.privacy import protect_update
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire import messages
from fedlp.federation.wire.digests import digest_tensors
from fedlp.models import leading_layers, state_tensors
from fedlp.models.layers import masked_gradients
from fedlp.models.unallocated import allocate
from fedlp.pruning.batch_norms import reestimate_batch_norms
from fedlp.pruning.tracing.widths import cut_model
from fedlp.rng import Stream, generator
from fedlp.tasks import Sums
from fedlp.training.calibration_data import batch_calibration, whole_examples
from fedlp.training.evaluation import evaluate_sums
from fedlp.training.loop import train_locally
from fedlp.training.schedules import Moment
from fedlp.types import Budget, ClientProfile, ClientUpdate, EvaluationRequest, Keep, SubModel, TrainInstruction

log = logging.getLogger("fedlp")

RAISED = 2  # Flower's code for a ClientApp that raised


class ClientRuntime:
    """State of a client process between messages: data, partition and model skeletons.

    Parameters
    ----------
    shards : Shards
        Examples of each client.
    store : ClientStore or None
        Store of personal heads and residuals between rounds; None keeps neither.
    frozen : ClientStore or None
        Store of frozen tensors, which are sent once; None without frozen tensors.
    """

    def __init__(
        self,
        settings: ClientSettings,
        info: DataInfo,
        submodels: SubModels,
        shards: Shards,
        test: Examples,
        store: ClientStore | None,
        frozen: ClientStore | None = None,
    ) -> None:
        self.settings = settings
        self.info = info
        self.submodels = submodels
        self.shards = shards
        self.test = test
        self.store, self.frozen = store, frozen
        self.device = torch.device(settings.device)
        self._uploads = Uploads(settings, info, submodels)
        self._skeleton = lru_cache(maxsize=16)(self._build_skeleton)

    @cached_property
    def pooling(self) -> PoolingClient:
        """Responder to requests of one-shot pruning."""
        if self.settings.oneshot is None:
            raise DataError("this run prunes nothing in one shot")
        return PoolingClient(self.settings.oneshot, self.info, self.submodels, self.shards.of)

    def profile(self, client_id: int, budget: Budget | None = None) -> ClientProfile:
        """Return the client's profile."""
        return ClientProfile(client_id, self.shards.size(client_id), budget, self.shards.test_size(client_id))

    def train(self, instruction: TrainInstruction) -> ClientUpdate:
        """Train the assigned sub-model and return the requested tensors."""
        seed, client_id, server_round = self.settings.seed, instruction.client_id, instruction.server_round
        instruction = self._with_frozen(instruction)
        model, state = self._load_submodel(instruction)
        examples = self.shards.of(client_id)
        rng = generator(seed, Stream.LOCAL_TRAINING, server_round, client_id)
        nested = self._nested(instruction.submodel, model)
        with masked_gradients(model, self._uploads.gradient_masks(instruction, model)):
            moment = Moment(server_round, self.settings.num_rounds)
            result = train_locally(
                model, examples, self.info, self.settings.local, rng, nested, self._frozen(instruction), moment
            )
        self._save_personal(instruction, state)
        metrics = {"train-loss": result.train_loss} if math.isfinite(result.train_loss) else {}
        if self._uploads.is_plain(instruction):
            sent = {name: tensor for name, tensor in state.items() if name in instruction.uploads}
            return ClientUpdate(server_round, client_id, len(examples), metrics, params=sent)
        residual = self._load_residual(instruction)
        upload = self._uploads.make(instruction, model, examples, residual)
        if upload.residual and self.store is not None:
            self.store.save(client_id, server_round, upload.residual)
        if upload.macs:
            metrics["pruning-macs"] = upload.macs
        return ClientUpdate(
            server_round,
            client_id,
            len(examples),
            metrics,
            upload.widths,
            upload.scores,
            upload.input_norms,
            upload.params,
        )

    def evaluate(self, params: Mapping[str, Tensor], start: int, stop: int, submodel: SubModel | None = None) -> Sums:
        """Return the evaluation sums of a sub-model, or of the global model, on test examples ``start`` to ``stop``."""
        model, state = self._shaped(submodel or SubModel())
        load_tensors(state, params)
        return evaluate_sums(model, self.test, self.info, self.settings.eval_batch_size, start, stop)

    def evaluate_own(self, request: EvaluationRequest) -> tuple[Sums, int]:
        """Return the evaluation sums of a client's sub-model on its own test examples, and their number."""
        client_id, settings = request.client_id, self.settings
        test, own = self.shards.test_of(client_id), self.shards.of(client_id)
        model, state = self._shaped(request.submodel)
        load_tensors(state, request.params)
        load_tensors(state, self._load_personal(request.submodel, client_id, request.server_round + 1))
        if request.measures_statistics:
            examples = whole_examples(own, self.info)
            reestimate_batch_norms(model.eval(), batch_calibration(examples, self.info, 64, 0, self.device).batches)
        if settings.personal_steps:
            rng = generator(settings.seed, Stream.PERSONAL_STEPS, request.server_round, client_id)
            personalise(model, own, self.info, settings.local, settings.personal_steps, rng)
        return evaluate_sums(model, test, self.info, settings.eval_batch_size), len(test)

    def statistics(self, submodel: SubModel, params: Mapping[str, Tensor], client_id: int) -> ClientUpdate:
        """Return the batch norm statistics of a sub-model on the client's examples."""
        model, state = self._shaped(submodel)
        load_tensors(state, params)
        examples = whole_examples(self.shards.of(client_id), self.info)
        reestimate_batch_norms(model.eval(), batch_calibration(examples, self.info, 64, 0, self.device).batches)
        names = [name for name in params if name in self.submodels.statistics and state[name].is_floating_point()]
        return ClientUpdate(0, client_id, len(examples), {}, params={name: state[name] for name in names})

    def _shaped(self, submodel: SubModel) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """Return a model of a sub-model's shapes, and its live tensors."""
        counts = tuple((axis, keep.count, keep.size) for axis, keep in sorted(submodel.widths.items()))
        return self._skeleton(submodel.depth, counts)

    # ---- sub-models
    def _build_skeleton(
        self, depth: int | None, counts: tuple[tuple[str, int, int], ...]
    ) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """Return a model of the sub-model's shapes and its live tensors; shapes depend on numbers of units alone."""
        if depth is not None:
            model = self.submodels.spec.build_depth(depth, self.settings.seed, client_id=0)
        elif counts and self.submodels.spec.reads_tokens:
            model = self.submodels.shapes()  # a device may not have the memory for the whole model
        else:
            model = self.submodels.skeleton()
        if counts:
            widths = {axis: Keep.first(count, size) for axis, count, size in counts}
            model = allocate(cut_model(model, self.submodels.widths, widths))
        model = model.to(self.device)
        return model, state_tensors(model)

    def _load_submodel(self, instruction: TrainInstruction) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """Return the sub-model with the instruction's values, and its live tensors."""
        submodel = instruction.submodel
        model, state = self._shaped(submodel)
        load_tensors(state, instruction.params)
        personal = self._load_personal(submodel, instruction.client_id, instruction.server_round)
        load_tensors(state, personal)
        return model, state

    def _with_frozen(self, instruction: TrainInstruction) -> TrainInstruction:
        """Return the instruction completed by stored frozen tensors; received ones are stored.

        Raises
        ------
        DataError
            If the stored tensors of the instruction's digest are missing.
        """
        client_id, server_round = instruction.client_id, instruction.server_round
        frozen = {name: x for name, x in instruction.params.items() if name in self.submodels.spec.frozen}
        if not instruction.held:
            if frozen and self.frozen is not None:
                self.frozen.save(client_id, server_round, frozen)
            return instruction
        found = {} if self.frozen is None else self.frozen.load(client_id, before_round=server_round)
        if digest_tensors(found) != instruction.held:
            raise DataError(f"client {client_id} has lost the frozen tensors that it was sent; it needs them again")
        return replace(instruction, params={**instruction.params, **found}, held=b"")

    def _nested(self, submodel: SubModel, model: nn.Module) -> list[NestedWidth]:
        """Return the nested widths for the client's steps; the last one is the client's whole slice."""
        if len(submodel.nested_levels) < 2:
            return []
        spec = self.submodels.widths
        counts = {axis: submodel.widths[axis].count if submodel.widths else size for axis, size in spec.axes.items()}
        return [
            NestedWidth(model, spec, counts, nested_counts(counts, spec.axes, level))
            for level in submodel.nested_levels
        ]

    def _load_personal(self, submodel: SubModel, client_id: int, before_round: int) -> Mapping[str, Tensor]:
        """Return the client's personal head: last trained before the round, or the initial one."""
        depth = submodel.depth
        if depth is None or depth == len(self.submodels.spec.depths):
            return {}
        if self.store is not None and (head := self.store.load(client_id, before_round)):
            return head
        fresh = state_tensors(self.submodels.spec.build_depth(depth, self.settings.seed, client_id))
        return {name: tensor for name, tensor in fresh.items() if name not in self.submodels.spec.tensors}

    def _frozen(self, instruction: TrainInstruction) -> tuple[str, ...]:
        """Return the tensors that need no training, since neither they nor earlier layers are sent."""
        if not self.settings.local.skip_backward:
            return ()
        return leading_layers(self.submodels.spec, instruction.uploads)

    def _load_residual(self, instruction: TrainInstruction) -> Mapping[str, Tensor]:
        """Return the client's residual of earlier uploads."""
        if self.store is None or not self.settings.error_feedback:
            return {}
        return self.store.load(instruction.client_id, before_round=instruction.server_round)

    def _save_personal(self, instruction: TrainInstruction, state: Mapping[str, Tensor]) -> None:
        personal = {name: tensor for name, tensor in state.items() if name not in self.submodels.spec.tensors}
        if personal and self.store is not None:
            self.store.save(instruction.client_id, instruction.server_round, personal)


def load_tensors(state: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    """Copy tensors into a model's live tensors."""
    for name, tensor in params.items():
        state[name].copy_(tensor)


class MakeRuntime(Protocol):
    """Factory of the runtime for a config (YAML), the folder of clients' files and the path of a device's own data."""

    def __call__(self, cfg: str, state_dir: str, own: OwnPlace | None = None) -> ClientRuntime: ...  # noqa: D102


def make_client_app(
    make_runtime: MakeRuntime,
    read_settings: Callable[[Message, Context], tuple[str, Path]],
) -> ClientApp:
    """Return the Flower app around a runtime.

    Parameters
    ----------
    make_runtime : callable
        Returns a runtime; expected to cache it.
    read_settings : callable
        Returns the config (YAML) and the run directory of a message or the node's run config.
    """
    app = ClientApp()

    def load_settings(message: Message, context: Context) -> tuple[str, Path]:
        cfg, out = read_settings(message, context)
        return cfg, Path(str(context.node_config.get("state-dir", out / "clients")))

    def load_runtime(message: Message, context: Context) -> ClientRuntime:
        cfg, state_dir = load_settings(message, context)
        place = context.node_config.get("data")
        own = None if place is None else OwnPlace(client_id_of(context), str(place))
        return make_runtime(cfg, str(state_dir), own) if own else make_runtime(cfg, str(state_dir))

    @app.query("capabilities")
    def query(message: Message, context: Context) -> Message:
        client_id = client_id_of(context)
        try:
            path = context.node_config.get("budget")
            budget = None if path is None else read_budget(Path(str(path)))
            profile = load_runtime(message, context).profile(client_id, budget)
        except FedLPError as error:  # one line in the device's log, and the client's name in the server's
            log.error("client %d cannot take part: %s", client_id, error)
            return Message(Error(RAISED, f"client {client_id}: {error}"), reply_to=message)
        return Message(messages.encode_profile(profile), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        runtime = load_runtime(message, context)
        instruction = messages.decode_instruction(message.content, runtime.submodels)
        if instruction.client_id != client_id_of(context):
            raise DataError(f"client {client_id_of(context)} was sent the instruction of {instruction.client_id}")
        update = runtime.train(instruction)
        reply = Message(
            messages.encode_update(update, runtime.submodels, runtime.settings.entropy_coding), reply_to=message
        )
        return protect_update(runtime.settings.privacy, runtime.settings.seed, instruction, message, reply, context)

    def answer(message: Message, context: Context) -> Message:
        runtime, client_id = load_runtime(message, context), client_id_of(context)
        folder = load_settings(message, context)[1] / str(client_id)
        kind = message.metadata.message_type
        return Message(runtime.pooling.answer(kind, message.content, client_id, folder), reply_to=message)

    @app.query(pooling_messages.MODEL.removeprefix("query."))
    def take_model(message: Message, context: Context) -> Message:
        runtime, client_id = load_runtime(message, context), client_id_of(context)
        folder = load_settings(message, context)[1] / str(client_id)
        return Message(runtime.pooling.take_model(message.content, folder), reply_to=message)

    for kind in pooling_messages.KINDS:
        app.query(kind.removeprefix("query."))(answer)

    @app.query("statistics")
    def statistics(message: Message, context: Context) -> Message:
        runtime = load_runtime(message, context)
        submodel, params = messages.decode_submodel(message.content, runtime.submodels)
        found = runtime.statistics(submodel, params, client_id_of(context))
        return Message(messages.encode_statistics(found.params, found.num_examples), reply_to=message)

    @app.evaluate("client")
    def evaluate_own(message: Message, context: Context) -> Message:
        runtime = load_runtime(message, context)
        request = messages.decode_evaluation_request(message.content, runtime.submodels)
        if request.client_id != client_id_of(context):
            raise DataError(f"client {client_id_of(context)} was sent the evaluation of {request.client_id}")
        return Message(messages.encode_client_sums(*runtime.evaluate_own(request)), reply_to=message)

    @app.evaluate("central")
    def evaluate(message: Message, context: Context) -> Message:
        runtime = load_runtime(message, context)
        submodel, params, start, stop = messages.decode_range(message.content, runtime.submodels)
        return Message(messages.encode_sums(runtime.evaluate(params, start, stop, submodel)), reply_to=message)

    return app


def client_id_of(context: Context) -> int:
    """Return the partition id of a node; DataError if its config has none."""
    partition_id = context.node_config.get("partition-id")
    if not isinstance(partition_id, int) or isinstance(partition_id, bool):
        raise DataError("the node has no partition-id; start it with --node-config 'partition-id=0 num-partitions=N'")
    return partition_id
