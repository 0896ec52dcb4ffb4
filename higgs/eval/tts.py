"""Evaluation of speech: a model is asked (or recordings are read), and what is heard is compared with what was asked for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from higgs.api import HiggsAudioV2ForConditionalGeneration
from higgs.audio import read_audio
from higgs.checkpoint.io import pick_device
from higgs.checksums import digest_of
from higgs.errors import UserError
from higgs.eval.codec import check_common
from higgs.eval.inputs import Utterance, find_recordings, read_utterances
from higgs.eval.judges.base import QualityJudge, Recognizer, SpeakerEmbedder
from higgs.eval.judges.separation import separation
from higgs.eval.outputs import Result, write_results
from higgs.eval.pool import Row, ScoringPool
from higgs.eval.report import ReportClip, Sound
from higgs.eval.runner import claim, environment, evaluate, fingerprint
from higgs.eval.speech import Generated, Recordings, References, SpeechTask, read
from higgs.eval.statistics import ratio_of_sums
from higgs.folders import resolve_folder
from higgs.inference import GenerationOptions, check_fit
from higgs.processor import HiggsAudioV2Processor
from higgs.versions import PROJECT

NORMALIZERS = ("english", "basic")
RATE = 24000  # of references and voices in the report, in Hz


@dataclass
class SpeechEvaluation:
    """The keys of configs/eval/tts.yaml, which explains them."""

    data: str
    checkpoint: str | None = None
    audio: str | None = None
    audio_tokenizer: str | None = None
    output: str | None = None
    normalizer: str = "english"
    clean_speech: str | None = None
    recognize_references: bool = False
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    batch_size: int = 8
    processes: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    retry_errors: bool = False
    # Built apart.
    recognizer: Any = None
    speaker: Any = None
    quality: Any = None

    def __post_init__(self) -> None:
        check_common(self.batch_size, self.processes, self.seed)
        if (self.checkpoint is None) == (self.audio is None):
            raise UserError("Say what speaks: give either checkpoint=PATH, or audio=FOLDER of sound files that exist.")
        if self.audio is not None and (self.generation.given() or self.audio_tokenizer):
            raise UserError("generation and audio_tokenizer belong to checkpoint=…; audio=… is judged as it is.")
        if self.normalizer not in NORMALIZERS:
            raise UserError(f"normalizer is '{self.normalizer}'; use one of {', '.join(NORMALIZERS)}.")

    def folder(self) -> Path:
        """Where the results go: `output`; else beside the export of a training run, so that runs can be compared."""
        if self.output is not None:
            return Path(self.output)
        if self.checkpoint is not None and (Path(self.checkpoint).parent / "metrics.jsonl").is_file():
            return Path(self.checkpoint).parent / "evaluation"
        return Path("evaluation") / "tts"


def evaluate_tts(
    config: SpeechEvaluation,
    recognizer: Recognizer | None,
    speaker: SpeakerEmbedder | None,
    quality: Mapping[str, QualityJudge],
) -> Result:
    """Evaluates speech and writes rows.parquet, summary.json and report.html into the results' folder.

    Raises:
        UserError: for what the user can mend; also where not one sample could be evaluated.
    """
    out = config.folder()
    utterances = read_utterances(config.data)
    files = {} if config.audio is None else find_recordings(config.audio, utterances)
    checkpoint = None if config.checkpoint is None else resolve_folder(config.checkpoint)
    recordings = [file for one in utterances for item in sounds_of(one) if (file := file_of(item)) is not None]
    settings = {
        "task": "tts", "data": config.data, "samples": len(utterances), "normalizer": config.normalizer,
        "inputs": [digest_of(config.data), fingerprint([*recordings, *files.values()])],
        "checkpoint": config.checkpoint, "audio": config.audio, "audio_tokenizer": config.audio_tokenizer,
        "weights": None if checkpoint is None else digest_of(checkpoint),
        "clean_speech": config.clean_speech, "recognize_references": config.recognize_references,
        "generation": config.generation.given(), "batch_size": config.batch_size, "seed": config.seed,
        "device": pick_device(config.device).type, "dtype": config.dtype,
        "recognizer": None if recognizer is None else recognizer.describe(),
        "speaker": None if speaker is None else speaker.describe(),
        "quality": {name: judge.describe() for name, judge in quality.items()},
    }  # fmt: skip
    claim(out, settings)
    if checkpoint is None:
        source = Recordings(files)
    else:
        source = Generated(*load(config), out / "audio", config.seed, config.generation.given())
    task = SpeechTask(source, config.normalizer, recognizer, speaker, quality, config.recognize_references)
    task.load(config.device)
    with ScoringPool(task.light(), config.processes, busy(config, task)) as pool:
        versions = environment()
        meter = measure_judges(config, task, pool)
        shown = ["wer", "speaker_similarity"]
        rows = evaluate(out, utterances, task, pool, config.batch_size, shown, config.retry_errors)
    extra = {"settings": settings, "versions": versions, "meter": meter}
    asked = {utterance.id: utterance for utterance in utterances}

    def sounds(label: str, row: Row) -> ReportClip:
        utterance = asked[row["id"]]
        path = files.get(utterance.id) if checkpoint is None else source.path(utterance.id)
        heard = read_audio(path)
        named = [Sound("speech", heard.samples, heard.sample_rate)]
        if utterance.reference is not None and "codes" not in utterance.reference:
            named.insert(0, Sound("reference", read(utterance.reference, "The recording", RATE), RATE))
        named += [
            Sound(f"voice {tag}".strip(), read(item, "The voice", RATE), RATE) for tag, item in utterance.voices.items()
        ]
        return ReportClip(label, row, named)

    column = next(
        (name for name in ("wer", "speaker_similarity") if any(row.get(name) is not None for row in rows)), "seconds"
    )
    return write_results(out, "Speech evaluation", rows, extra, column, sounds)


def busy(config: SpeechEvaluation, task: SpeechTask) -> bool:
    """Whether this process itself computes on the CPU: a model that is asked, or judges that are not light."""
    heavy = [judge for judge in (task.recognizer, task.speaker, *task.quality.values()) if judge and not judge.light]
    return pick_device(config.device).type == "cpu" and bool(config.checkpoint or heavy)


def sounds_of(utterance: Utterance) -> list[Mapping[str, Any]]:
    return [*utterance.voices.values(), *([utterance.reference] if utterance.reference is not None else [])]


def file_of(item: Mapping[str, Any]) -> str | None:
    """The file of an audio item; None for one that lies in the web or in the manifest itself."""
    place = item.get("path") or item.get("url") or item.get("audio")
    return place if isinstance(place, str) and not re.match(r"\w+://|data:", place) and len(place) < 1000 else None


def load(config: SpeechEvaluation) -> tuple[HiggsAudioV2ForConditionalGeneration, HiggsAudioV2Processor]:
    processor = HiggsAudioV2Processor.from_pretrained(
        config.checkpoint, device_map=config.device, audio_tokenizer=config.audio_tokenizer
    )
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        config.checkpoint, device_map=config.device, dtype=config.dtype
    )
    check_fit(model, processor)
    return model.eval(), processor


def measure_judges(config: SpeechEvaluation, task: SpeechTask, pool: ScoringPool) -> dict[str, Any]:
    """How well the judges themselves do on clean speech of known text: the meter's own error, to be told beside every
    figure that it gives."""
    meter: dict[str, Any] = {}
    if task.recognizer is not None:
        meter["recognizer"] = task.recognizer.describe()
    if task.speaker is not None:
        meter["speaker"] = task.speaker.describe()
    if config.clean_speech is None or not meter:
        return meter
    path = Path(config.clean_speech)
    # The default lies in this project, wherever the command is called.
    clean = read_utterances(path if path.is_file() else PROJECT / path)
    probe = SpeechTask(References(), config.normalizer, task.recognizer, task.speaker)
    made = probe.make(clean, 0)
    there = [(utterance, one) for utterance, one in zip(clean, made, strict=True) if one.job is not None]
    rows = pool.map([one.job for _, one in there])
    meter["clean_speech"] = f"{len(there)} clips of {config.clean_speech}"
    counted = [row for row in rows if row.get("words")]
    if counted:
        errors, words = [row["word_errors"] for row in counted], [row["words"] for row in counted]
        meter["clean_wer"] = vars(ratio_of_sums(errors, words, config.seed))
    if task.speaker is not None:
        meter["speaker"] |= {"separation": voices_told_apart(task.speaker, there)}
    return meter


@torch.no_grad()
def voices_told_apart(speaker: SpeakerEmbedder, clean: Sequence[tuple[Utterance, Any]]) -> dict[str, float] | None:
    """How well voices are told apart; clips whose conversations describe the same scene are of one voice."""
    speaker.load()
    embeddings = speaker.embed([one.job.clip(speaker) for _, one in clean])
    voices = [str([message for message in utterance.prompt if message["role"] == "scene"]) for utterance, _ in clean]
    if len(set(voices)) < 2 or len(set(voices)) == len(voices):
        return None
    return vars(separation(embeddings, voices))
