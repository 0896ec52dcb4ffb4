"""Rendered texts and coded clips -> one batch for the decoder, with labels where asked for.

Needs no codec: clips come as codes, so a data pipeline can use it on audio that was coded long ago.
Shapes: B batch, T tokens, F delayed audio frames, K codebooks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from higgs.chat import ChatTokens, expand_audio
from higgs.delay import wrap_and_delay
from higgs.errors import UserError
from higgs.labels import IGNORE, assistant_spans, audio_labels, span_mask, text_labels
from higgs.text import TextTokenizer

LabelsMode = Literal["assistant", "transformers"]


class BatchFeature(dict[str, Any]):
    """A dict of tensors that also answers to attributes, for `model(**inputs)` and `inputs.input_ids` alike."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"this batch has no {name!r}; it holds {', '.join(self)}") from error

    def to(
        self,
        *args: str | int | torch.device | torch.dtype,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> "BatchFeature":
        """Move every tensor to a device and every floating-point tensor to a dtype, in place; returns itself. Both may
        be given by position."""
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            else:
                device = value
        for key, value in self.items():
            if isinstance(value, Tensor):
                cast = dtype if value.is_floating_point() else None
                self[key] = value.to(device=device, dtype=cast, non_blocking=non_blocking)
        return self


@dataclass(frozen=True)
class BatchOptions:
    """How a batch is padded and labelled; see `HiggsAudioV2Processor.__call__`."""

    output_labels: bool = False
    labels_mode: LabelsMode = "assistant"
    start_index: int | Sequence[int] = 0
    padding: bool | str = True
    padding_side: str = "left"
    return_tensors: str | None = "pt"

    def __post_init__(self) -> None:
        if self.return_tensors not in (None, "pt"):
            raise UserError(f"return_tensors={self.return_tensors!r} is not supported; use 'pt'.")
        if self.padding_side not in ("left", "right") or self.padding not in (True, False, "longest", "do_not_pad"):
            raise UserError("padding must be True or False, and padding_side 'left' or 'right'.")
        if self.labels_mode not in ("assistant", "transformers"):
            raise UserError(f"labels_mode must be 'assistant' or 'transformers', not {self.labels_mode!r}.")

    def starts(self, rows: int) -> list[int]:
        """`start_index` of every row."""
        if isinstance(self.start_index, int):
            return [self.start_index] * rows
        if len(self.start_index) != rows:
            raise UserError(f"start_index has {len(self.start_index)} entries for {rows} texts; give one each, or one.")
        return list(self.start_index)


@dataclass(frozen=True)
class Row:
    """One row before padding: `ids` [T], `frames` [F, K] and, with labels, `labels` [T] and `frame_labels` [F, K]."""

    ids: Tensor
    frames: Tensor
    labels: Tensor | None = None
    frame_labels: Tensor | None = None


@dataclass(frozen=True)
class BatchBuilder:
    """Puts texts and clips together. `stream_bos` and `stream_eos` are the codes before and after a clip's own."""

    tokenizer: TextTokenizer
    tokens: ChatTokens
    num_codebooks: int
    stream_bos: int = 1024
    stream_eos: int = 1025

    def build(
        self,
        texts: Sequence[str],
        clips: Sequence[Tensor] = (),
        options: BatchOptions | None = None,
        has_scene: Sequence[bool | None] | None = None,
    ) -> BatchFeature:
        """texts (rendered, one placeholder per clip) and the codes [K, T'] of their clips, in order -> the batch that
        `HiggsAudioV2Processor.__call__` describes. `has_scene` says per text whether message 1 is a scene (None: look).
        """
        options = options or BatchOptions()
        placeholders = [text.count(self.tokens.audio) for text in texts]
        if sum(placeholders) != len(clips):
            raise UserError(
                f"The texts have {placeholders} audio placeholders ({self.tokens.audio}), but {len(clips)} clips were "
                "given; give one clip per placeholder, in order."
            )
        remaining = iter(clips)
        rows = [
            self.row(text, [next(remaining) for _ in range(count)], options, start, scene)
            for text, count, start, scene in zip(
                texts, placeholders, options.starts(len(texts)), has_scene or [None] * len(texts), strict=True
            )
        ]
        if options.padding in (False, "do_not_pad") and len({len(row.ids) for row in rows}) > 1:
            raise UserError("The texts differ in length, so they cannot be one tensor unpadded; set padding=True.")
        side = options.padding_side
        batch = BatchFeature(input_ids=_pad([row.ids for row in rows], self.tokenizer.pad_token_id, side))
        batch["attention_mask"] = _pad([torch.ones_like(row.ids) for row in rows], 0, side)
        if clips:
            batch["audio_input_ids"] = _pad([row.frames for row in rows], self.stream_eos)
            lengths = torch.tensor([len(row.frames) for row in rows])
            batch["audio_input_ids_mask"] = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        if options.output_labels:
            batch["labels"] = _pad([row.labels for row in rows], IGNORE, side)
            if clips:
                batch["audio_labels"] = _pad([row.frame_labels for row in rows], IGNORE)
        return batch

    def row(
        self,
        text: str,
        clips: Sequence[Tensor],
        options: BatchOptions | None = None,
        start_index: int = 0,
        has_scene: bool | None = None,
    ) -> Row:
        """One text with its clips, unpadded. `start_index` counts here, not the one in `options`."""
        options = options or BatchOptions()
        text = expand_audio(text, [codes.shape[1] for codes in clips], self.num_codebooks, self.tokens)
        ids = torch.tensor(self.tokenizer.encode(text, add_special_tokens=True), dtype=torch.long)
        delayed = [wrap_and_delay(codes, self.stream_bos, self.stream_eos) for codes in clips]
        frames = self._concatenate(delayed)
        if not options.output_labels:
            return Row(ids, frames)
        if options.labels_mode == "transformers":
            return self._transformers_labels(ids, frames)
        spans = assistant_spans(ids.tolist(), self.tokenizer, self.tokens, start_index, has_scene)
        trained = span_mask(spans, len(ids))
        placeholders = [self.tokenizer.token_to_id(token) for token in (self.tokens.audio, self.tokens.delay)]
        places = (ids == placeholders[0]).nonzero()[:, 0]
        targets, first = [], 0
        for clip in delayed:
            learnt = bool(trained[places[first]])
            target = audio_labels(clip, self.stream_bos, self.stream_eos)
            targets.append(target if learnt else torch.full_like(clip, IGNORE))
            first += len(clip) - (self.num_codebooks - 1)  # the rest of its placeholders are delay tokens
        return Row(ids, frames, text_labels(ids, trained, placeholders), self._concatenate(targets))

    def _transformers_labels(self, ids: Tensor, frames: Tensor) -> Row:
        """What `output_labels=True` gives in transformers 5.6.2: for comparisons, not for training."""
        ignored = [self.tokenizer.token_to_id(token) for token in (self.tokens.audio, self.tokens.audio_bos)]
        labels = text_labels(ids, torch.ones_like(ids, dtype=torch.bool), [*ignored, self.tokenizer.pad_token_id])
        edges = (frames == self.stream_bos) | (frames == self.stream_eos)
        return Row(ids, frames, labels, frames.masked_fill(edges, IGNORE))

    def _concatenate(self, clips: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.zeros(0, self.num_codebooks, dtype=torch.long), *clips])


def _pad(rows: Sequence[Tensor], value: int, side: str = "right") -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)
