"""The cost of SFPrompt with any placement of prompts, codecs and switches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from protocol.messages import SAMPLE_ID_BYTES
from sfprompt_bench.cost.flops import forward_flops
from sfprompt_bench.cost.method_cost import MethodCost, Question
from sfprompt_bench.cost.sizes import (
    head_bytes,
    image_numbers,
    local_body_numbers,
    part_numbers,
    passed_blocks,
    peak_bytes,
    run_blocks,
    samples_bytes,
    tensors_bytes,
    trained_blocks,
)
from split_model.backbone.architecture import anatomy
from split_model.checkpoints.state import device_shapes, state_shapes
from split_model.parts.depths import feature_shape
from split_model.parts.tail import needed_tokens
from tuning_methods.sfprompt.settings import paper_part


def sfprompt_cost(question: Question) -> MethodCost:
    """Calculate SFPrompt (arXiv 2407.17533) for a run's settings.

    With prompts at the input, four tensors cross on every visit of a selected sample. With prompts
    at the cut, the server trains them, they never cross, and no gradient comes back to the frozen
    head: three tensors. With `keep_smashed` a sample's smashed data cross once in the run (once
    for each augmented view) with a name of 16 bytes, and a visit sends the name only. With
    `pooled_features` only the tokens that the tail reads come down, and their gradient goes up.

    All training samples and all views of them count as crossing once. If each round selects
    others by score, this is an upper bound: some may never be selected.

    An evaluation sends the smashed data of all test samples, or their names (and the data once),
    and receives the features, with `depths` the logits. Batches are as large as those of training.

    With `depths`, round 0 sends the names of all training samples and sums for each class, and
    receives each sample's features and the classifier, once. Without `split_epochs`, a later round
    moves the classifier alone.

    With shared labels a sample's name crosses a second time, with its label of 8 bytes, and nothing
    else does after the start, in no round and in no evaluation.

    Operations of a round are those of `SFPromptPaper`, except that with `keep_smashed` the head
    runs once for each sample and view, and forward only; the tail's 1x for each scored sample and
    3x for each visit remain.

    Raises as `FederatedMethod.cost` does.
    """
    tensors = _Tensors.of(question)
    traffic, operations = _Traffic(question, tensors), _Operations(question, tensors)
    federation = question.plan.federation
    tuned = state_shapes(question.split).values()
    return MethodCost(
        trainable_parameters=sum(math.prod(shape) for shape in tuned),
        bytes_start=traffic.start(),
        bytes_up_per_round=traffic.up_per_round(),
        bytes_down_per_round=traffic.down_per_round(),
        device_flops_per_round=operations.per_round(),
        device_peak_bytes=_peak_bytes(question, tensors),
        bytes_up_once=traffic.up_once(),
        bytes_up_per_evaluation=traffic.up_per_evaluation(),
        bytes_down_per_evaluation=traffic.down_per_evaluation(),
        evaluate_every=federation.evaluate_every if question.test_samples else 0,
        device_flops_once=operations.once(),
    )


_LABEL_BYTES = 8


@dataclass(frozen=True)
class _Tensors:
    """What crosses for one sample, and how often."""

    smashed: tuple[int, int]  # (T, D)
    features: tuple[int, int]  # (T' or the leading tokens that the tail reads, D)
    at_cut: bool  # the device has no prompts, and its head has no backward pass
    stored: bool  # smashed data cross once and stay on the server
    views: int  # of a training sample, each with its own smashed data

    @classmethod
    def of(cls, question: Question) -> _Tensors:
        split, run = question.split, question.plan
        sizes, num_tokens = anatomy(split), needed_tokens(split)
        at_cut = split.prompt_at == "cut"
        prompted = sizes.tokens + split.prompt_count
        pooled = run.wire.pooled_features and num_tokens is not None
        features = (num_tokens if pooled and num_tokens is not None else prompted, sizes.width)
        return cls(
            smashed=(sizes.tokens if at_cut else prompted, sizes.width),
            features=feature_shape(split) if split.depths else features,
            at_cut=at_cut,
            stored=at_cut and run.wire.keep_smashed,
            views=run.training.views if run.training.augment else 1,
        )


class _Traffic:
    """Bytes, in both directions."""

    def __init__(self, question: Question, tensors: _Tensors) -> None:
        self.question, self.tensors = question, tensors
        self.wire, self.training = question.plan.wire, question.plan.training
        self.evaluates = question.plan.federation.evaluate_every > 0
        self.shares = question.plan.shares_labels

    def start(self) -> int:
        split = self.question.split
        local_blocks = paper_part(self.question.plan).local_body
        head = head_bytes(split, self.wire.head, local_blocks)
        return head + self._state("float32") + self._round_0_down()

    def _round_0_down(self) -> int:
        """Features of all training samples, their moments, the classifier, leverages, new state."""
        split, samples = self.question.split, self.question.train_samples
        if not split.depths or self.shares:
            return 0
        codec = self.wire.updates if self.wire.update_deltas else "float32"
        features = self._samples(self.wire.start, samples, self.tensors.features)
        moments = 2 * 4 * self.tensors.features[1]  # mean and variances
        fit = self._state("float32") + 4 * samples
        return features + moments + fit + self._state(codec)

    def _round_0_up(self) -> int:
        """Names of all training samples, the sums of their features, and the update."""
        split = self.question.split
        if not split.depths:
            return 0
        if self.shares:
            tested = self.question.test_samples if self.evaluates else 0
            return (SAMPLE_ID_BYTES + _LABEL_BYTES) * (self.question.train_samples + tested)
        names = SAMPLE_ID_BYTES * self.question.train_samples
        return names + self._state("float32") + self._state(self.wire.updates)

    def up_per_round(self) -> int:
        if self.shares:
            return 0
        gradients = self._visits(self.wire.gradients, self.tensors.features)
        sent = self._state(self.wire.updates) + gradients
        if self.tensors.stored:
            visits = self.question.selected_samples * self.training.split_epochs
            return sent + SAMPLE_ID_BYTES * visits
        return sent + self._visits(self.wire.smashed, self.tensors.smashed)

    def down_per_round(self) -> int:
        if self.shares:
            return 0
        # The global state is a file of float32, unless it comes as a change.
        codec = self.wire.updates if self.wire.update_deltas else "float32"
        received = self._state(codec) + self._visits(self.wire.features, self.tensors.features)
        if self.tensors.at_cut:
            return received
        return received + self._visits(self.wire.gradients, self.tensors.smashed)

    def up_once(self) -> int:
        if not self.tensors.stored:
            return 0
        trained = self.question.train_samples * self.tensors.views
        tested = self.question.test_samples if self.evaluates else 0
        names = SAMPLE_ID_BYTES * (trained + tested)
        return self._smashed(trained) + self._tested(tested) + names + self._round_0_up()

    def up_per_evaluation(self) -> int:
        if not self.evaluates or self.shares:
            return 0
        if self.tensors.stored:
            return SAMPLE_ID_BYTES * self.question.test_samples
        return self._tested(self.question.test_samples)

    def down_per_evaluation(self) -> int:
        if not self.evaluates or self.shares:
            return 0
        samples, split = self.question.test_samples, self.question.split
        answer = (1, split.num_classes) if split.depths else self.tensors.features
        return self._samples(self.wire.inference, samples, answer)

    def _state(self, codec: str) -> int:
        return tensors_bytes(codec, device_shapes(self.question.split).values())

    def _visits(self, codec: str, shape: tuple[int, int]) -> int:
        samples = self.question.selected_samples
        return self.training.split_epochs * self._samples(codec, samples, shape)

    def _smashed(self, samples: int) -> int:
        return self._samples(self.wire.smashed, samples, self.tensors.smashed)

    def _tested(self, samples: int) -> int:
        codec = self.wire.inference_smashed or self.wire.smashed
        return self._samples(codec, samples, self.tensors.smashed)

    def _samples(self, codec: str, samples: int, shape: tuple[int, int]) -> int:
        return samples_bytes(codec, samples, self.training.batch_size, shape)


class _Operations:
    """Operations of training on the device."""

    def __init__(self, question: Question, tensors: _Tensors) -> None:
        training, self.split = question.plan.training, question.split
        self.shares = question.plan.shares_labels
        self.local_blocks = paper_part(question.plan).local_body
        self.train_samples, self.tensors = question.train_samples, tensors
        # Neither keeping all samples nor drawing them at random needs scores.
        needs_scores = training.keep_fraction < 1 and training.pruning != "random"
        self.scored = question.train_samples if needs_scores else 0
        self.local_visits = question.train_samples * training.local_epochs
        self.visits = self.local_visits + question.selected_samples * training.split_epochs

    def per_round(self) -> int:
        prompts = self.split.prompt_count
        total = self.scored * self._tail(0) + self.visits * 3 * self._tail(prompts)
        if self.shares:
            return 0
        if self.tensors.stored:
            return total
        if self.tensors.at_cut:
            return total + (self.scored + self.visits) * self._head(0)
        visit = self._head(prompts) + (self._head_blocks(prompts) if prompts else 0)
        # Forward through the small body and, if something before it is tuned, backward.
        local_body = self.local_blocks * forward_flops(self.split, prompts).block
        total += self.local_visits * local_body * (2 if prompts else 1)
        return total + self.scored * self._head(0) + self.visits * visit

    def once(self) -> int:
        if not self.tensors.stored:
            return 0
        samples = self.train_samples * self.tensors.views
        if self.tensors.views > 1:
            samples += self.scored  # images are scored without augmentation
        return samples * self._head(0)

    def _head(self, prompts: int) -> int:
        return forward_flops(self.split, prompts).embedding + self._head_blocks(prompts)

    def _head_blocks(self, prompts: int) -> int:
        return self.split.cut * forward_flops(self.split, prompts).block

    def _tail(self, prompts: int) -> int:
        flops = forward_flops(self.split, prompts)
        return self.split.tail_blocks * flops.block + flops.output


def _peak_bytes(question: Question, tensors: _Tensors) -> int:
    """The larger of a pass of the head and a step of training, for one batch."""
    split, training = question.split, question.plan.training
    numbers, local_blocks = part_numbers(split), paper_part(question.plan).local_body
    smashed, features = math.prod(tensors.smashed), math.prod(tensors.features)
    head = image_numbers(split) + run_blocks(split, split.cut, tensors.smashed[0]) + smashed
    # Features and their gradient, and what autograd keeps of the tail's blocks.
    step = 2 * features + trained_blocks(split, split.tail_blocks, tensors.features[0])
    prompts = 0
    if tensors.at_cut:
        activations = max(head, smashed + step)
    else:
        prompts = numbers.prompts
        blocks = split.cut + local_blocks
        passed = passed_blocks(split, blocks, tensors.smashed[0]) if prompts else 0
        activations = max(head, image_numbers(split) + passed + 2 * smashed + step)
    return peak_bytes(
        numbers.head
        + numbers.tail
        + prompts
        + _cached_numbers(question, tensors)
        + local_body_numbers(split, local_blocks),
        numbers.tail + prompts,
        training.batch_size,
        activations,
    )


def _cached_numbers(question: Question, tensors: _Tensors) -> int:
    """Numbers of head outputs that the device caches for scoring and the local update."""
    training = question.plan.training
    if not tensors.stored:
        return 0
    if question.split.depths:
        refines = training.local_epochs > 0
        return question.train_samples * tensors.features[1] if refines else 0
    if training.local_epochs == 0 and training.keep_fraction == 1:
        return 0
    tokens = needed_tokens(question.split) or tensors.smashed[0]
    width = anatomy(question.split).width
    return question.train_samples * tensors.views * tokens * width
