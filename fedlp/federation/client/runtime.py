"""State of a client process: build the sub-model of an instruction, train it on the client's shard, evaluate it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from fedlp.data.datasets import DataInfo, Examples
from fedlp.errors import DataError
from fedlp.federation.client.cohort_app import attempt
from fedlp.federation.client.cohort_training import CohortTrainer, Prepared
from fedlp.federation.client.frozen_tensors import FrozenTensors
from fedlp.federation.client.memory import ClientMemory
from fedlp.federation.client.ordered_dropout import NestedWidth, nested_counts
from fedlp.federation.client.own_evaluation import personalise
from fedlp.federation.client.settings import ClientSettings
from fedlp.federation.client.shards import Shards
from fedlp.federation.client.store import ClientStore
from fedlp.federation.client.uploads import Uploads
from fedlp.federation.oneshot.client import PoolingClient
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.encoded_tensors import EncodedTensors
from fedlp.federation.wire.stacks import StackedUpdate
from fedlp.models import leading_layers, state_tensors
from fedlp.models.encoded_base import encodable, encode_base, hold_base
from fedlp.models.layers import masked_gradients
from fedlp.models.unallocated import allocate, without_parameters
from fedlp.pruning.batch_norms import reestimate_batch_norms
from fedlp.pruning.tracing.widths import cut_in_place, cut_model
from fedlp.rng import Stream, generator
from fedlp.tasks import Sums
from fedlp.training.calibration_data import batch_calibration, whole_examples
from fedlp.training.evaluation import evaluate_sums
from fedlp.training.loop import TrainResult, train_locally
from fedlp.training.schedules import Moment
from fedlp.training.stacked import train_cohort
from fedlp.training.stacked_cohort import Cohort
from fedlp.types import Budget, ClientProfile, ClientUpdate, EvaluationRequest, Keep, SubModel, TrainInstruction


class ClientRuntime:
    """State of a client process between messages: data, partition and model skeletons.

    Parameters
    ----------
    shards : Shards
        Examples of each client.
    store, frozen : ClientStore or None
        Stores of a :class:`ClientMemory`.
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
        self._memory = ClientMemory(submodels, settings.seed, store)
        self._frozen_tensors = FrozenTensors(submodels, settings.download.encoding, frozen, settings.encoded_base)
        self.device = torch.device(settings.device)
        self._uploads = Uploads(settings, info, submodels)
        self._skeleton = lru_cache(maxsize=16)(self._build_skeleton)
        self._trainer = CohortTrainer(settings, info)

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
        prepared = self._prepare(instruction)
        return self._finish(prepared, *self._train_alone(prepared))

    def train_cohort(self, instructions: Sequence[TrainInstruction]) -> Iterator[ClientUpdate | Exception]:
        """Yield the update of each client, or why there is none; clients of one shape train together where they can.

        An update is that of :meth:`train` up to rounding, and does not depend on who else is in the cohort. Its tensors
        hold until the next one is asked for.
        """
        prepared = [attempt(self._prepare, instruction) for instruction in instructions]
        together = self._trainer.train([one for one in prepared if isinstance(one, Prepared)])

        def update(one: Prepared) -> ClientUpdate:
            found: tuple[TrainResult, Mapping[str, Tensor]] | None = together.get(one.instruction.client_id)
            return self._finish(one, *(found or self._train_alone(one)))

        for one in prepared:
            yield attempt(update, one) if isinstance(one, Prepared) else one

    def train_stack(self, instruction: TrainInstruction, client_ids: Sequence[int]) -> StackedUpdate:
        """Train clients with equal instructions together, and return the stack of their updates.

        Each is that of :meth:`train` up to rounding.

        Raises
        ------
        FedLPError
            If they must train one by one, or a client has no examples.
        """
        settings, submodel = self.settings, instruction.submodel
        model, _ = self._shaped(submodel)
        frozen = frozenset(self._frozen(instruction))
        way = self._trainer.way(model, frozen)
        examples, lengths = self.shards.joined(client_ids)
        has_base = bool(instruction.held or instruction.frozen)
        asks_more = submodel.nested_levels or has_base or not self._uploads.is_plain(instruction)
        if not way.stacks or asks_more or not self._trainer.has_plain_loss(examples):
            raise DataError("these clients train one by one")
        heads = [self._memory.head(submodel, client_id, instruction.server_round) for client_id in client_ids]
        own = {name: torch.stack([head[name] for head in heads]) for name in heads[0]}
        rngs = self._trainer.generators(instruction.server_round, client_ids)
        cohort = Cohort(instruction.params, own, examples, lengths, rngs)
        moment = Moment(instruction.server_round, settings.num_rounds)
        result = train_cohort(model, cohort, self.info, settings.local, frozen, moment, way)
        for k, client_id in enumerate(client_ids if own else ()):
            head = {name: result.tensors[name][k] for name in own}
            self._memory.keep(client_id, instruction.server_round, head)
        sent = {name: x for name, x in result.tensors.items() if name in instruction.uploads}
        return StackedUpdate(instruction.server_round, client_ids, lengths, result.losses, sent)

    def _prepare(self, instruction: TrainInstruction) -> Prepared:
        """Return all that a client's training needs."""
        instruction = self._frozen_tensors.complete(instruction)
        model, state = self._shaped(instruction.submodel, self.settings.encoded_base)
        personal = self._memory.head(instruction.submodel, instruction.client_id, instruction.server_round)
        return Prepared(
            instruction=instruction,
            model=model,
            state=state,
            values={**instruction.params, **personal} if personal else instruction.params,
            examples=self.shards.of(instruction.client_id),
            nested=self._nested(instruction.submodel, model),
            frozen=frozenset(self._frozen(instruction)),
            masks=self._uploads.gradient_masks(instruction, model),
            base=self._base(instruction.submodel, instruction.frozen),
        )

    def _base(self, submodel: SubModel, frozen: Mapping[str, Tensor]) -> EncodedTensors | None:
        """Return the frozen tensors that stay encoded; None if there are none."""
        return self._frozen_tensors.encoded(submodel, frozen) if self.settings.encoded_base and frozen else None

    def _train_alone(self, prepared: Prepared) -> tuple[TrainResult, Mapping[str, Tensor]]:
        """Train one client's sub-model in place."""
        load_tensors(prepared.state, prepared.values)
        self._hold(prepared.model, prepared.state, prepared.base)
        model, instruction = prepared.model, prepared.instruction
        with masked_gradients(model, prepared.masks):
            result = train_locally(
                model,
                prepared.examples,
                self.info,
                self.settings.local,
                prepared.rng(self.settings.seed),
                prepared.nested,
                prepared.frozen,
                Moment(instruction.server_round, self.settings.num_rounds),
                self._uploads.penalty(instruction),
            )
        return result, prepared.state

    def _finish(self, prepared: Prepared, result: TrainResult, trained: Mapping[str, Tensor]) -> ClientUpdate:
        """Return the update of a trained client, and keep what it needs in later rounds."""
        instruction, examples = prepared.instruction, prepared.examples
        client_id, server_round = instruction.client_id, instruction.server_round
        self._memory.keep(client_id, server_round, self._memory.personal(trained))
        metrics = {"train-loss": result.train_loss} if math.isfinite(result.train_loss) else {}
        if self._uploads.is_plain(instruction):
            sent = {name: tensor for name, tensor in trained.items() if name in instruction.uploads}
            return ClientUpdate(server_round, client_id, len(examples), metrics, params=sent)
        if trained is not prepared.state:
            load_tensors(prepared.state, trained)
        residual = self._memory.residual(client_id, server_round) if self.settings.error_feedback else {}
        upload = self._uploads.make(instruction, prepared.model, examples, residual)
        self._memory.keep(client_id, server_round, upload.residual)
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
        model, state = self._shaped(request.submodel, self.settings.encoded_base)
        load_tensors(state, request.params)
        self._hold(model, state, self._base(request.submodel, request.frozen))
        load_tensors(state, self._memory.head(request.submodel, client_id, request.server_round + 1))
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

    def _hold(self, model: nn.Module, state: Mapping[str, Tensor], base: EncodedTensors | None) -> None:
        """Give a model its frozen tensors: encoded weights as they are, all others decoded."""
        if base is not None:
            held = hold_base(model, lambda name: base.weight(name, self.device))
            for name, tensor in base.decode(left=held):
                state[name].copy_(tensor)

    def _shaped(self, submodel: SubModel, encoded: bool = False) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """Return a model of a sub-model's shapes, and its live tensors, without the base if that stays encoded."""
        counts = tuple((axis, keep.count, keep.size) for axis, keep in sorted(submodel.widths.items()))
        return self._skeleton(submodel.depth, counts, encoded)

    # ---- sub-models
    def _build_skeleton(
        self, depth: int | None, counts: tuple[tuple[str, int, int], ...], encoded: bool
    ) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """Return a model of the sub-model's shapes and its live tensors; shapes depend on numbers of units alone."""
        if depth is not None:
            with without_parameters() if encoded else nullcontext():
                model = self.submodels.spec.build_depth(depth, self.settings.seed, client_id=0)
        elif (counts or encoded) and self.submodels.is_language:
            model = self.submodels.shapes()  # a device may not have the memory for the whole model
        else:
            model = self.submodels.skeleton()
        if not counts and depth is None and not self.submodels.is_language:
            model = cut_in_place(
                model, self.submodels.widths, {}
            )  # as in a cut model, attentions call their last layer
        if counts:
            widths = {axis: Keep.first(count, size) for axis, count, size in counts}
            model = cut_model(model, self.submodels.widths, widths)
        if encoded:
            model = encode_base(model, encodable(model, self.submodels.spec.frozen))
        model = allocate(model)
        model = model.to(self.device)
        return model, state_tensors(model)

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

    def _frozen(self, instruction: TrainInstruction) -> tuple[str, ...]:
        """Return the tensors that need no training, since neither they nor earlier layers are sent."""
        if not self.settings.local.skip_backward:
            return ()
        return leading_layers(self.submodels.spec, instruction.uploads)


def load_tensors(state: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    """Copy tensors into a model's live tensors."""
    for name, tensor in params.items():
        state[name].copy_(tensor)
