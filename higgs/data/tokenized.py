"""Conversations whose audio has been coded (`higgs tokenize`) as training samples for the language model.

Shapes: T tokens, F delayed frames, K codebooks.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from higgs.batch import BatchBuilder, BatchOptions, Row
from higgs.chat import ChatRenderer
from higgs.data.draws import Draw, Source
from higgs.data.manifest import Sample
from higgs.data.rows import pack_rows, pad_rows
from higgs.data.shards import CodedFolder, CodedWith
from higgs.data.stream import Rows, Unreadable
from higgs.delay import delayed_length
from higgs.errors import UserError

LABELS = BatchOptions(output_labels=True)


class TokenizedDataset:
    """The samples of one or several folders of codes.

    Args:
        sources: the folders, with their weights (`higgs.data.draws.read_sources`).
        renderer: writes a conversation as text, usually `higgs.chat.ChatBuilder`.
        builder: text and codes -> ids, frames and labels; holds the text tokenizer.

    Raises:
        UserError: a folder is incomplete or damaged, holds no sample, or was made by another codec than the others or
            with other codebooks than `builder` has.
    """

    in_tokens = True

    def __init__(self, sources: Sequence[Source], renderer: ChatRenderer, builder: BatchBuilder) -> None:
        self.renderer, self.builder = renderer, builder
        self.folders = [CodedFolder(source.path) for source in sources]
        self.weights = [source.weight for source in sources]
        self.sizes = [len(folder) for folder in self.folders]
        for folder in self.folders:
            self._check(folder)
        self.digest = " ".join(folder.digest for folder in self.folders)
        self._ends = list(accumulate(self.sizes))
        # An array, not a list: loader processes are forked from this one, and there may be millions.
        lengths = (self._count_tokens(sample) for folder in self.folders for sample in folder.samples())
        self._lengths = np.fromiter(lengths, dtype=np.int32, count=len(self))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def codec(self) -> CodedWith:
        """What all of the folders were coded with."""
        return self.folders[0].codec

    @property
    def unreadable(self) -> list[Unreadable]:
        """Samples of the manifests that are missing here because they could not be coded."""
        return [Unreadable(**entry) for folder in self.folders for entry in folder.unreadable]

    def length(self, sample: int) -> int:
        """Tokens of a sample, its audio placeholders counted."""
        return int(self._lengths[sample])

    def id(self, sample: int) -> str:
        folder, number = self._place(sample)
        return folder.sample(number).id

    def row(self, sample: int) -> Row:
        """A sample's ids, frames and labels."""
        folder, number = self._place(sample)
        entry = folder.sample(number)
        chat = self.renderer.build(entry.messages)
        clips = [folder.codes(number, slot.item["span"]) for slot in chat.audio]
        return self.builder.row(chat.text, clips, LABELS, entry.start_index, chat.has_scene)

    def collate(self, rows: Sequence[Sequence[Draw]], seed: int | None, row_length: int | None) -> Rows:
        """See `higgs.data.stream.Dataset`; nothing here is random."""
        loaded = [[self.row(draw.sample) for draw in row] for row in rows]
        pad, eos = self.builder.tokenizer.pad_token_id, self.builder.stream_eos
        if row_length is None:
            batch = pad_rows([row for (row,) in loaded], pad, eos)
        else:
            batch = pack_rows(loaded, row_length, pad, eos)
        return Rows(batch, [self.id(draw.sample) for row in rows for draw in row])

    def _place(self, sample: int) -> tuple[CodedFolder, int]:
        source = bisect_right(self._ends, sample)
        return self.folders[source], sample - self._ends[source] + self.sizes[source]

    def _count_tokens(self, sample: Sample) -> int:
        """As long as its `row` will be: a placeholder is a token of its own, and becomes one token a frame."""
        chat = self.renderer.build(sample.messages)
        tokens = len(self.builder.tokenizer.encode(chat.text, add_special_tokens=True))
        spans = [slot.item["span"] for slot in chat.audio]
        return tokens + sum(delayed_length(stop - first, self.builder.num_codebooks) - 1 for first, stop in spans)

    def _check(self, folder: CodedFolder) -> None:
        if not len(folder):
            raise UserError(f"{folder.path} holds no sample that could be read; index.json says why.")
        if folder.codec != self.codec:
            raise UserError(
                f"{folder.path} and {self.folders[0].path} were made by different codecs; tokenize both with one."
            )
        codec, builder = folder.codec, self.builder
        if codec.num_codebooks != builder.num_codebooks or codec.codebook_size > builder.stream_bos:
            raise UserError(
                f"{folder.path} holds {codec.num_codebooks} codebooks of {codec.codebook_size} codes, but the model "
                f"reads {builder.num_codebooks} of at most {builder.stream_bos}; tokenize with the model's codec."
            )
