"""A Flamingo as a model of lmms-eval (0.7): its entry point, and the classes that it names.

lmms-eval --model flamingo --model_args pretrained=FOLDER; docs/harnesses.md says which requests come
in which form. Only this file and its tasks know that harness.
B rows, T tokens, M tokens of continuations, N images, V vocabulary with the added tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from flamingo.eval.asking import OPTIONS, Asked, Asker, placed
from flamingo.names import hint

NAME = "flamingo"
Talk = Generator[Asked, GenerationResult, list[Any]]  # prompts, each sent its answer; what it comes to
ARGUMENTS = "pretrained batch_size device dtype beams max_new_tokens cached_images chat_template"


def manifest() -> ModelManifest:
    """What the entry-point group `lmms_eval.models` asks for."""
    return ModelManifest(NAME, f"{__name__}.FlamingoSimple", f"{__name__}.FlamingoChat")


class Likelihood(tuple, GenerationResult):
    """(log-probability or its negative, greedy).

    Also what the harness calls a generated result: of anything else than texts and those, 0.7.3 makes
    a string before it is judged, and no choice could be told from another.
    """

    token_counts = None

    def __new__(cls, value: float, greedy: bool):
        return super().__new__(cls, (value, greedy))

    def __init__(self, value: float, greedy: bool):
        """A tuple has its values already."""

    @property
    def text(self) -> tuple[float, bool]:  # type: ignore[override]
        return self[0], self[1]


class _Flamingo(lmms):
    """What both forms of requests have in common.

    Args:
        pretrained: a model folder, as training and `flamingo export` write it.
        batch_size: rows at a time. device: None: a GPU of its own for each process where there are some.
        dtype: auto (as saved, but float32 on a CPU without bfloat16 products), float32, bfloat16 or float16.
        beams, max_new_tokens: where a task does not say.
        cached_images: pictures whose latents are kept, those used last.
        chat_template: "few_shot": turns as in training, each answer ended by <|endofchunk|>; "own": the
            processor's, which of a chat LM is that LM's.

    Raises ValueError for a folder without a model, or an argument that is unknown or out of range.
    """

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        beams: int = 1,
        max_new_tokens: int = 64,
        cached_images: int = 1024,
        chat_template: str = "few_shot",
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            name = next(iter(unknown))
            raise ValueError(f"model_args: unknown {name!r}; {hint(name, ARGUMENTS.split())}")
        if not pretrained:
            raise ValueError("model_args: pretrained=FOLDER is missing: name a model folder")
        numbers = {"batch_size": batch_size, "beams": beams, "max_new_tokens": max_new_tokens}
        for name, value in {**numbers, "cached_images": cached_images}.items():
            if not str(value).isdigit() or int(value) < 1:
                raise ValueError(f"model_args: {name}={value!r}: must be a number of at least 1")
        self.batch_size = int(batch_size)
        self.asker = Asker(Path(pretrained), device, dtype, int(cached_images), chat_template)
        self.defaults = {"num_beams": int(beams), "max_new_tokens": int(max_new_tokens)}
        self._warned: set[str] = set()

    @property
    def device(self) -> Any:
        return self.asker.device

    @property
    def tokenizer(self) -> Any:
        return self.asker.tokenizer

    def clean(self) -> None:
        """The harness calls it before answers are judged: the memory is given back."""
        self.asker.close()
        super().clean()

    # -- generated answers -----------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:  # type: ignore[override]
        """One text for each request, cut at its stop strings."""
        return [answers[0] for answers in self._answered(requests, self._single)]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:  # type: ignore[override]
        """The texts of all rounds of each request; a task says what is asked next, and when it ends."""
        told = self._answered(requests, self._rounds)
        return [[a if isinstance(a, str) else a.text for a in answers] for answers in told]

    def _answered(self, requests: list[Instance], talk: Callable[[tuple[Any, ...]], Talk]) -> list[list]:
        """What each request's talk returns; talks of a batch are answered together, round by round."""
        found: list[list] = [[] for _ in requests]
        for batch, options in self._batches(requests):
            talks = {number: talk(requests[number].args) for number in batch}
            asked = {number: next(each) for number, each in talks.items()}
            while asked:
                texts = self._generate(list(asked.values()), options)
                answers, asked = dict(zip(asked, texts, strict=True)), {}
                for number, answer in answers.items():
                    try:
                        asked[number] = talks[number].send(answer)
                    except StopIteration as end:
                        found[number] = end.value
        return found

    def _batches(self, requests: list[Instance]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """(numbers of requests, their options): of the same options and about the same length."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            options = next(arg for arg in request.args[1:3] if isinstance(arg, dict))
            groups.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(number)
        for key, numbers in groups.items():
            options = self._options(json.loads(key))
            numbers.sort(key=lambda number: -len(str(requests[number].args[0])))
            for batch in self._cut(numbers, "answers"):
                yield batch, options

    def _cut(self, numbers: list[int], what: str) -> Iterator[list[int]]:
        from tqdm import tqdm

        with tqdm(total=len(numbers), desc=what, unit="request", disable=self.rank > 0) as bar:
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                yield batch
                bar.update(len(batch))

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Of a task's gen_kwargs those that mean something here; the others are named once."""
        for name in sorted(given.keys() - OPTIONS - self._warned):
            from loguru import logger

            logger.warning(f"gen_kwargs: {name}={given[name]!r} means nothing to a Flamingo, left out")
            self._warned.add(name)
        return {**self.defaults, **{k: v for k, v in given.items() if k in OPTIONS and v is not None}}

    def _generate(self, asked: list[Asked], options: dict[str, Any]) -> list[GenerationResult]:
        return [
            GenerationResult(said.text, TokenCounts(input_tokens=said.given, output_tokens=said.made))
            for said in self.asker.generate(asked, options)
        ]

    def _single(self, args: tuple[Any, ...]) -> Talk:
        answer = yield self._first(args)
        return [answer]

    def _first(self, args: tuple[Any, ...]) -> Asked:
        raise NotImplementedError

    def _rounds(self, args: tuple[Any, ...]) -> Talk:
        raise NotImplementedError

    # -- likelihoods -----------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding says it) of each request.

        A continuation that comes as text is a choice of a multiple-choice task: of those the harness
        takes the *smallest* value, as its own models return losses, so that it gets minus the
        log-probability.
        """
        found: list[Any] = [None] * len(requests)
        numbers = list(range(len(requests)))
        numbers.sort(key=lambda number: -sum(len(str(arg)) for arg in requests[number].args[:2]))
        for batch in self._cut(numbers, "likelihoods"):
            asked = [self._continued(_args(requests[number])) for number in batch]
            for number, (value, greedy) in zip(batch, self.asker.likelihoods(asked), strict=True):
                is_choice = isinstance(_args(requests[number])[1], str)
                found[number] = Likelihood(-value if is_choice else value, greedy)
        return found

    def _continued(self, args: tuple[Any, ...]) -> tuple[Asked, str]:
        context, target, visual, doc_id, task, split = args
        doc = self.task_dict[task][split][doc_id]
        if not isinstance(target, str):
            target = target(doc)
        if not isinstance(target, str):
            raise ValueError(
                f"{task}, document {doc_id}: doc_to_target={target!r}: a continuation is text; "
                "with numbers of choices, use output_type: multiple_choice"
            )
        return with_visuals(context, visual(doc) if visual else None, f"{task}, document {doc_id}"), target


class FlamingoSimple(_Flamingo):
    """Requests with a context and pictures; <image> in the context says where they stand."""

    is_simple = True

    def _first(self, args: tuple[Any, ...]) -> Asked:
        context, _, visual = args[:3]
        doc_id, task, split = args[-3:]
        doc = self.task_dict[task][split][doc_id]
        return with_visuals(context, visual(doc) if visual else None, f"{task}, document {doc_id}")

    def _rounds(self, args: tuple[Any, ...]) -> Talk:
        context, _, visual, next_text, doc_id, task, split = args
        doc, where = self.task_dict[task][split][doc_id], f"{task}, document {doc_id}"
        said: list[str] = []
        visuals, info = visual(doc) if visual else None, None
        while True:
            answer = yield with_visuals(context, visuals, where)
            said.append(answer.text)
            payload = next_text(
                doc, previous_output=list(said), round_idx=len(said), previous_round_info=info
            )
            visuals, context, done, outputs, info = payload
            said = said if outputs is None else list(outputs)
            if done:
                return said


class FlamingoChat(_Flamingo):
    """Requests with messages, whose pictures stand between their texts."""

    is_simple = False

    def _first(self, args: tuple[Any, ...]) -> Asked:
        _, messages, _, doc_id, task, split = args
        return self._asked(messages(self.task_dict[task][split][doc_id]), f"{task}, document {doc_id}")

    def _rounds(self, args: tuple[Any, ...]) -> Talk:
        _, messages, _, doc_id, task, split = args
        doc, where = self.task_dict[task][split][doc_id], f"{task}, document {doc_id}"
        said: list[str] = []
        turns, info = messages(doc), None
        while True:
            answer = yield self._asked(turns, where)
            said.append(answer.text)
            payload = messages(doc, round_idx=len(said), previous_output=list(said), previous_round_info=info)
            if not isinstance(payload, tuple):  # the task knows no rounds
                return said
            turns, done, outputs, info = payload
            said = said if outputs is None else list(outputs)
            if done:
                return said

    def _asked(self, turns: Sequence[dict[str, Any]], where: str) -> Asked:
        try:
            return self.asker.chat(turns)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _args(request: Instance) -> tuple[Any, ...]:
    return request.args


def with_visuals(context: str | list[str], visuals: Any, where: str) -> Asked:
    """Context and pictures of a simple request. Raises ValueError for a video or a sound."""
    text = context[0] if isinstance(context, list) else context
    images = [] if visuals is None else list(visuals) if isinstance(visuals, (list, tuple)) else [visuals]
    images = [image for image in images if image is not None]
    for image in images:
        if isinstance(image, dict) or not (hasattr(image, "tobytes") or isinstance(image, (str, Path))):
            raise ValueError(
                f"{where}: doc_to_visual gives a {type(image).__name__}: a Flamingo here reads pictures "
                "(PIL images, paths, addresses) only"
            )
    return Asked(placed(text, len(images)), tuple(images))
