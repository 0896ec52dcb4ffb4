"""Does a trained model say its training samples again? Each is asked for from its text alone.

Shapes: K codebooks, F frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from higgs.data.manifest import Sample
from higgs.inference import GenerationOptions, InferConfig, infer
from higgs.train.prepare import last_codes


@dataclass
class Match:
    """How well a sample was reproduced: share of equal codes over the longer of the two, and the frames it is off."""

    id: str
    frames: int
    codes_equal: float
    frames_off: int
    stopped: bool


def reproduce(run: Path, targets: Sequence[Sample], generation: GenerationOptions) -> list[Match]:
    """Asks the export in `run` for run/prompts.jsonl and compares with the codes of `targets`, in the same order."""
    print(f"now each sample of {run / 'prompts.jsonl'} from its text, as infer.py does it")
    spoken = infer(
        InferConfig(
            checkpoint=str(run / "export"),
            conversation=str(run / "prompts.jsonl"),
            output=str(run / "samples"),
            plot=True,
            batch_size=16,
            device="cpu",
            generation=generation,
        )
    )
    matches = []
    for speech, sample in zip(spoken, targets, strict=True):
        codes = last_codes(sample)
        assert codes is not None, f"{sample.id} has no audio to say again"
        off = abs(speech.codes.shape[1] - codes.shape[1])
        matches.append(Match(sample.id, codes.shape[1], equal_codes(speech.codes, codes), off, speech.stopped))
    return matches


def equal_codes(codes: Tensor, target: Tensor) -> float:
    """Share of equal codes of [K, F] and [K, F'], frames that one of them lacks counted as wrong."""
    common = min(codes.shape[1], target.shape[1])
    right = int((codes[:, :common] == target[:, :common]).sum())
    return right / (target.shape[0] * max(codes.shape[1], target.shape[1], 1))


def print_matches(matches: Sequence[Match], seconds: float) -> None:
    print(f"\n{'sample':<16}{'frames':>7}{'codes equal':>13}{'frames off':>12}")
    for match in matches:
        note = "" if match.stopped else "  did not stop"
        print(f"{match.id:<16}{match.frames:>7}{match.codes_equal:>12.2%}{match.frames_off:>12}{note}")
    worst = min(match.codes_equal for match in matches)
    print(f"worst sample {worst:.2%}; {seconds:.0f} s in all")
