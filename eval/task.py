"""A benchmark with its data read: queries, demonstrations, classes, neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from flamingo.eval import benchmarks
from flamingo.eval.benchmarks import Example
from flamingo.eval.config import EvalConfig
from flamingo.eval.few_shot import limited


@dataclass
class Task:
    """Attributes:
    pool: what shots are drawn from. classes: ranked continuations; empty where text is generated.
    neighbours: by query id, the demonstrations nearest to it, nearest first; None: not asked for.
    """

    benchmark: ModuleType
    queries: list[Example]
    pool: list[Example]
    classes: tuple[str, ...]
    neighbours: Mapping[str, Sequence[Example]] | None = None

    @classmethod
    def of(cls, config: EvalConfig) -> Task:
        """Reads the data. Raises ValueError for a split that is not there, pictures that are not,
        ids that come twice, or fewer demonstrations than the most shots."""
        benchmark = benchmarks.load(config.benchmark)
        split = config.split or benchmark.QUERIES
        for name in {split, benchmark.DEMONSTRATIONS}:
            if name not in benchmark.FILES:
                raise ValueError(
                    f"{benchmark.TITLE} has no split {name!r}: choose one of {', '.join(benchmark.FILES)}"
                )
        if config.data is None and not getattr(benchmark, "BUNDLED", False):
            raise ValueError(
                f"{benchmark.TITLE} needs its data: --data FOLDER. "
                f"`flamingo eval describe {config.benchmark}` says which files, and from where"
            )
        queries = checked(benchmark.examples(config.data, split), f"{benchmark.TITLE}, {split}")
        most = max(setting.examples_before for setting in config.settings())
        pool: list[Example] = []
        if most:
            whole = checked(
                benchmark.examples(config.data, benchmark.DEMONSTRATIONS),
                f"{benchmark.TITLE}, {benchmark.DEMONSTRATIONS}",
            )
            pool = limited([e for e in whole if e.answers], config.pool)
            if len(pool) < most:
                raise ValueError(
                    f"shots={most}: {benchmark.TITLE} has only {len(pool)} demonstrations "
                    f"in {benchmark.DEMONSTRATIONS} (pool={config.pool}); ask for fewer shots"
                )
        classes = tuple(benchmark.CLASSES(config.data)) if not benchmark.MAX_NEW_TOKENS else ()
        return cls(benchmark, queries, pool, classes)

    @property
    def scores_alone(self) -> bool:
        """Whether the first metric gives a query its value without the others (CIDEr does not)."""
        from flamingo.eval import metrics

        return getattr(metrics.load(self.benchmark.METRICS[0]), "ALONE", True)

    def template(self, number: int) -> Callable[[Example], str] | None:
        """The prompt of order `number` of an ensemble; None: the benchmark's own."""
        others = getattr(self.benchmark, "PROMPTS", ())
        return ((self.benchmark.prompt, *others)[number % (len(others) + 1)]) if others else None

    def best(self, scores: Sequence[float]) -> str:
        """The class of the highest score."""
        return self.classes[max(range(len(scores)), key=scores.__getitem__)].strip()


def checked(examples: list[Example], where: str) -> list[Example]:
    """The same. Raises ValueError for none, for ids that come twice, and for missing pictures."""
    if not examples:
        raise ValueError(f"{where}: no example in the files; are they of another split?")
    twice = [name for name, count in Counter(e.id for e in examples).items() if count > 1]
    if twice:
        raise ValueError(f"{where}: {len(twice)} ids come more than once, the first is {twice[0]!r}")
    pictures = dict.fromkeys(e.image for e in examples)
    missing = [p for p in pictures if not p.is_file()]
    if missing:
        raise ValueError(
            f"{where}: {len(missing)} of {len(pictures)} pictures are missing, the first is {missing[0]}; "
            "unpack the pictures of this split, or name another data folder"
        )
    return examples
