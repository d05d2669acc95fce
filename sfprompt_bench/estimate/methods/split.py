"""SFPrompt as a run's settings have it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from protocol.messages import SAMPLE_ID_BYTES
from protocol.plan import WirePlan
from sfprompt_bench.cost.flops import forward_flops
from sfprompt_bench.cost.method_cost import MethodCost
from sfprompt_bench.cost.question import Question
from sfprompt_bench.cost.sizes import (
    FLOAT_BYTES,
    image_numbers,
    local_body_numbers,
    parameter_counts,
    part_numbers,
    passed_blocks,
    peak_bytes,
    run_blocks,
    samples_bytes,
    tensor_bytes,
    tensors_bytes,
    trained_blocks,
)
from sfprompt_bench.estimate.methods.base import Method
from split_model import anatomy, device_shapes, needed_tokens, state_shapes


class SFPrompt(Method):
    """SFPrompt (arXiv 2407.17533) with the placement, codecs and switches of the run's settings.

    With prompts at the input, four tensors cross on every visit of a kept sample. With prompts at
    the cut they are trained on the server and never cross, and no gradient comes back to the
    frozen head: three tensors. With `keep_smashed` a sample's smashed data cross once in the run
    (once for each augmented view) with the 16 bytes that name it, and a visit sends the name only.
    With `pooled_features` only the tokens that the tail reads come down, and their gradient goes
    up.

    All training samples are taken to cross once, and all views of them. Where each round scores
    and keeps others that is an upper bound: some may never be kept.

    An evaluation sends the smashed data of all test samples, or their names (and the data once),
    and gets the features. Batches are as large as those of training.

    Operations of a round: as in `SFPromptPaper`, but where smashed data are kept the head runs
    once a sample and view, and forward only; the tail's 1x for each scored sample and 3x for each
    visit remain.
    """

    name = "sfprompt"

    def cost(self, question: Question) -> MethodCost:
        shapes = _Shapes.of(question)
        traffic, work = _Traffic(question, shapes), _Work(question, shapes)
        run = question.settings
        tuned = state_shapes(question.split).values()
        return MethodCost(
            trainable_parameters=sum(math.prod(shape) for shape in tuned),
            bytes_start=traffic.start(),
            bytes_up_per_round=traffic.up(),
            bytes_down_per_round=traffic.down(),
            device_flops_per_round=work.per_round(),
            device_peak_bytes=_peak(question, shapes),
            bytes_up_once=traffic.once(),
            bytes_up_per_evaluation=traffic.evaluation_up(),
            bytes_down_per_evaluation=traffic.evaluation_down(),
            evaluate_every=run.federation.evaluate_every if question.test_samples else 0,
            device_flops_once=work.once(),
        )


@dataclass(frozen=True)
class _Shapes:
    """What crosses for one sample, and how often."""

    smashed: tuple[int, int]  # (T, D)
    features: tuple[int, int]  # (T' or the leading ones, D)
    at_cut: bool  # the device has no prompts, and its head is never differentiated
    stored: bool  # smashed data cross once
    views: int  # of a training sample, all of them with smashed data of their own

    @classmethod
    def of(cls, question: Question) -> _Shapes:
        split, run = question.split, question.settings
        sizes, num_tokens = anatomy(split), needed_tokens(split)
        at_cut = split.prompt_at == "cut"
        inside = sizes.tokens + split.prompt_count
        pooled = run.wire.pooled_features and num_tokens is not None
        return cls(
            smashed=(sizes.tokens if at_cut else inside, sizes.width),
            features=(num_tokens if pooled and num_tokens is not None else inside, sizes.width),
            at_cut=at_cut,
            stored=at_cut and run.wire.keep_smashed,
            views=run.training.views if run.training.augment else 1,
        )


class _Traffic:
    """Bytes, in both directions."""

    def __init__(self, question: Question, shapes: _Shapes) -> None:
        self.question, self.shapes = question, shapes
        self.wire, self.training = question.settings.wire, question.settings.training

    def start(self) -> int:
        numbers = part_numbers(self.question.split).head + local_body_numbers(self.question.split)
        head = tensor_bytes(self.wire.head, (numbers,))
        return head + self._state("float32")

    def up(self) -> int:
        sent = self._state(self.wire.updates) + self._visits(
            self.wire.gradients, self.shapes.features
        )
        if self.shapes.stored:
            visits = self.question.selected_samples * self.training.split_epochs
            return sent + SAMPLE_ID_BYTES * visits
        return sent + self._visits(self.wire.smashed, self.shapes.smashed)

    def down(self) -> int:
        # The global state is a file of float32, unless it comes as a change.
        codec = self.wire.updates if self.wire.update_deltas else "float32"
        received = self._state(codec) + self._visits(self.wire.features, self.shapes.features)
        if self.shapes.at_cut:
            return received
        return received + self._visits(self.wire.gradients, self.shapes.smashed)

    def once(self) -> int:
        if not self.shapes.stored:
            return 0
        trained = self.question.train_samples * self.shapes.views
        tested = self.question.test_samples if self._evaluates() else 0
        named = SAMPLE_ID_BYTES * (trained + tested)
        return self._smashed(trained) + self._smashed(tested) + named

    def evaluation_up(self) -> int:
        if not self._evaluates():
            return 0
        if self.shapes.stored:
            return SAMPLE_ID_BYTES * self.question.test_samples
        return self._smashed(self.question.test_samples)

    def evaluation_down(self) -> int:
        if not self._evaluates():
            return 0
        return self._samples(self.wire.inference, self.question.test_samples, self.shapes.features)

    def _evaluates(self) -> bool:
        return self.question.settings.federation.evaluate_every > 0

    def _state(self, codec: str) -> int:
        return tensors_bytes(codec, device_shapes(self.question.split).values())

    def _visits(self, codec: str, shape: tuple[int, int]) -> int:
        return self.training.split_epochs * self._samples(
            codec, self.question.selected_samples, shape
        )

    def _smashed(self, samples: int) -> int:
        return self._samples(self.wire.smashed, samples, self.shapes.smashed)

    def _samples(self, codec: str, samples: int, shape: tuple[int, int]) -> int:
        return samples_bytes(codec, samples, self.training.batch_size, shape)


class _Work:
    """Operations of training on the device."""

    def __init__(self, question: Question, shapes: _Shapes) -> None:
        training, self.split = question.settings.training, question.split
        self.question, self.shapes = question, shapes
        # Keeping everything needs no scores, and neither does drawing.
        scores = training.keep_fraction < 1 and training.pruning != "random"
        self.scored = question.train_samples if scores else 0
        self.local_visits = question.train_samples * training.local_epochs
        self.visits = (
            question.train_samples * training.local_epochs
            + question.selected_samples * training.split_epochs
        )

    def per_round(self) -> int:
        prompts = self.split.prompt_count
        work = self.scored * self._tail(0) + self.visits * 3 * self._tail(prompts)
        if self.shapes.stored:
            return work
        if self.shapes.at_cut:
            return work + (self.scored + self.visits) * self._head(0)
        visit = self._head(prompts) + (self._head_blocks(prompts) if prompts else 0)
        # Through the small body and, where there is something ahead of it to tune, back again.
        through = self.split.local_body * forward_flops(self.split, prompts).block
        work += self.local_visits * through * (2 if prompts else 1)
        return work + self.scored * self._head(0) + self.visits * visit

    def once(self) -> int:
        if not self.shapes.stored:
            return 0
        samples = self.question.train_samples * self.shapes.views
        if self.shapes.views > 1:
            samples += self.scored  # images are scored as they are
        return samples * self._head(0)

    def _head(self, prompts: int) -> int:
        return forward_flops(self.split, prompts).embedding + self._head_blocks(prompts)

    def _head_blocks(self, prompts: int) -> int:
        return self.split.cut * forward_flops(self.split, prompts).block

    def _tail(self, prompts: int) -> int:
        flops = forward_flops(self.split, prompts)
        return self.split.tail_blocks * flops.block + flops.output


def _peak(question: Question, shapes: _Shapes) -> int:
    """The larger of a pass of the head and a step of training, for one batch."""
    split, training = question.split, question.settings.training
    numbers, width = part_numbers(split), anatomy(split).width
    smashed, features = math.prod(shapes.smashed), math.prod(shapes.features)
    head = image_numbers(split) + run_blocks(split, split.cut, shapes.smashed[0]) + smashed
    # Features and their gradient, and what the tail's own blocks keep.
    step = 2 * features + trained_blocks(split, split.tail_blocks, shapes.features[0])
    prompts = 0
    if shapes.at_cut:
        activations = max(head, smashed + step)
    else:
        prompts = numbers.prompts
        passed = split.cut + split.local_body
        through = passed_blocks(split, passed, shapes.smashed[0]) if prompts else 0
        activations = max(head, image_numbers(split) + through + 2 * smashed + step)
    return peak_bytes(
        numbers.head
        + numbers.tail
        + prompts
        + _remembered(question, shapes, width)
        + local_body_numbers(split),
        numbers.tail + prompts,
        training.batch_size,
        activations,
    )


def _remembered(question: Question, shapes: _Shapes, width: int) -> int:
    """Numbers of head outputs that are kept on the device for scoring and the local update."""
    training = question.settings.training
    if not shapes.stored or (training.local_epochs == 0 and training.keep_fraction == 1):
        return 0
    tokens = needed_tokens(question.split) or shapes.smashed[0]
    return question.train_samples * shapes.views * tokens * width


class SplitFedFull(Method):
    """SplitFed (arXiv 2004.12088) in U-shape: head and tail are trained and averaged too.

    All samples cross in every split epoch, as float32: smashed data up, features down and their
    gradients back, 4q a visit. Head and tail cross both ways each round. The server trains a body
    for each device, so all parameters are tuned.
    """

    name = "splitfed-full"

    def cost(self, question: Question) -> MethodCost:
        settings, training = question.unmerged, question.settings.training
        sizes, numbers = anatomy(settings), part_numbers(settings)
        flops = forward_flops(settings)
        device = numbers.head + numbers.tail
        stream = sizes.tokens * sizes.width
        visits = question.train_samples * training.split_epochs
        each_way = FLOAT_BYTES * (device + 2 * visits * stream)
        blocks = settings.cut + settings.tail_blocks
        forward = flops.embedding + blocks * flops.block + flops.output
        activations = (
            image_numbers(settings)
            + trained_blocks(settings, blocks, sizes.tokens)
            + 4 * stream  # smashed data, features, their gradients
        )
        return MethodCost(
            trainable_parameters=parameter_counts(settings).total,
            bytes_start=FLOAT_BYTES * device,
            bytes_up_per_round=each_way,
            bytes_down_per_round=each_way,
            device_flops_per_round=visits * 3 * forward,
            device_peak_bytes=peak_bytes(device, device, training.batch_size, activations),
        )


class SplitFedLinear(Method):
    """SplitFed (arXiv 2004.12088) in U-shape with everything frozen but the classifier.

    All samples cross in every split epoch, as float32, in two legs: smashed data up and features
    down. No gradient crosses, as nothing is tuned ahead of the tail. The classifier crosses both
    ways each round.
    """

    name = "splitfed-linear"

    def cost(self, question: Question) -> MethodCost:
        settings, training = question.unmerged, question.settings.training
        sizes, numbers = anatomy(settings), part_numbers(settings)
        flops = forward_flops(settings)
        own = parameter_counts(settings)
        stream = sizes.tokens * sizes.width
        visits = question.train_samples * training.split_epochs
        # The tail passes the gradient of the features on, and trains its classifier.
        head = flops.embedding + settings.cut * flops.block
        tail = settings.tail_blocks * flops.block + flops.output
        visit_flops = head + 2 * tail + own.classifier_flops
        activations = (
            image_numbers(settings)
            + run_blocks(settings, settings.cut, sizes.tokens)
            + passed_blocks(settings, settings.tail_blocks, sizes.tokens)
            + 3 * stream  # smashed data, features, their gradient
        )
        device = numbers.head + numbers.tail
        each_way = FLOAT_BYTES * (own.classifier + visits * stream)
        return MethodCost(
            trainable_parameters=own.classifier,
            bytes_start=FLOAT_BYTES * device,
            bytes_up_per_round=each_way,
            bytes_down_per_round=each_way,
            device_flops_per_round=visits * visit_flops,
            device_peak_bytes=peak_bytes(device, own.classifier, training.batch_size, activations),
        )


class SFPromptPaper(Method):
    """SFPrompt (arXiv 2407.17533, section 3): the run with prompts at the input, float32.

    All tokens cross in both directions on every visit. To start, head, tail and prompts; a round,
    2(|tail| + |prompts|) + 4 q E D for E split epochs of D kept samples, q = 4 · tokens · width
    with prompts. Evaluation is not in the paper's formula and left out here.

    Operations of a round: head and tail forward for each sample that is scored, without prompts;
    for each visit of local update and split training the head forward, the gradient of its
    blocks' inputs (1x), and three times the tail.
    """

    name = "sfprompt-paper"

    def cost(self, question: Question) -> MethodCost:
        run = question.settings
        placed = {"prompt_at": "input", "prompt_depth": "shallow", "keep_tokens": 0}
        model = run.model.model_copy(update=placed)
        federation = run.federation.model_copy(update={"evaluate_every": 0})
        plain = run.model_copy(
            update={"model": model, "federation": federation, "wire": WirePlan()}
        )
        return SFPrompt().cost(dataclasses.replace(question, settings=plain))
