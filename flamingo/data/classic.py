"""The classical stream: webdataset's own, for those who want it.

What it gives up against `steps.step_loader`: the order depends on the number of ranks and workers,
a run cannot be resumed within an epoch, ranks may end at different times, and webdataset leaves
out the rest of a shard without a word where a header is damaged. `flamingo data verify` finds such
shards before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch.utils.data import IterableDataset

from flamingo.data.config import SourceConfig
from flamingo.data.document import Document
from flamingo.data.errors import BadSample
from flamingo.data.kinds import reader
from flamingo.data.places import expand

log = logging.getLogger(__name__)


class ClassicStream(IterableDataset[Document]):
    """The documents of a source, shuffled in a buffer; one epoch per iteration.

    Args:
        source: what a recipe says. `batch`, `window`, `p_next`, `remote` and `max_sample_mb` mean
            nothing here; `max_tokens` and `crop` are the collator's.
        seed: of the shuffles of this epoch.
        buffer: samples that are shuffled together; 0: none, shards in their order.

    Shards are divided among ranks (RANK, WORLD_SIZE) and loader workers. Bad samples are warned
    about and left out.
    """

    def __init__(self, source: SourceConfig, seed: int = 0, buffer: int = 1000) -> None:
        if source.augment:
            raise ValueError(f"source {source.name!r}: the classical stream cannot augment; remove `augment`")
        self.name, self.seed, self.buffer = source.name, seed, buffer
        self.paths = [str(path) for path in expand(source.shards)]
        self._read = reader(source.kind, source.options)

    def __iter__(self) -> Iterator[Document]:
        import webdataset as wds

        shards = wds.WebDataset(  # type: ignore[attr-defined]
            self.paths,
            nodesplitter=wds.split_by_node,  # type: ignore[attr-defined]
            shardshuffle=len(self.paths) if self.buffer else False,
            seed=self.seed,
            empty_check=False,
        )
        for sample in shards.shuffle(self.buffer, seed=self.seed) if self.buffer else shards:
            members = {name: data for name, data in sample.items() if not name.startswith("__")}
            key = f"{self.name}/{sample['__url__'].rpartition('/')[2]}/{sample['__key__']}"
            try:
                yield self._read(members, key)
            except BadSample as error:
                log.warning("left out bad sample %s: %s", key, error)
