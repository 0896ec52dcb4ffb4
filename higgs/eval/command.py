"""The subcommand `higgs evaluate codec|tts|compare`: overrides of configs/eval, as train.py and infer.py take theirs."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from higgs import cli
from higgs.errors import UserError

CONFIGS = cli.CONFIGS / "eval"
FREE_TEXT = {"codec", "checkpoint", "data", "audio", "audio_tokenizer", "output", "clean_speech"}
HELP = {
    "codec": "a codec on sound files: spectral distances, PESQ, STOI, F0, codebook use, at every bandwidth",
    "tts": "a model's speech, or sound files: word errors, likeness of voices, durations, silence, repeats",
}
PARTS = ("recognizer", "speaker")


def add_command(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="figures of a codec or of speech, and their comparison")
    kinds = parser.add_subparsers(title="what", required=True, metavar="WHAT")
    for name, text in HELP.items():
        kind = kinds.add_parser(
            name,
            help=text,
            description=f"Evaluates {text}. Writes rows.parquet, summary.json and report.html.",
            epilog=(CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        kind.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the config below")
        kind.set_defaults(run=run, kind=name)
    compare = kinds.add_parser("compare", help="evaluations side by side, sample by sample")
    compare.add_argument(
        "folders", nargs="+", type=Path, help="folders of evaluations, or of training runs that hold one"
    )
    compare.add_argument("--metrics", help="only these, such as wer,speaker_similarity or pesq@2")
    compare.add_argument("--json", type=Path, help="also write the comparisons into this file")
    compare.set_defaults(run=run_compare)


def run(options: argparse.Namespace) -> None:
    config = cli.compose(options.kind, cli.quote_free_text(options.overrides, FREE_TEXT), CONFIGS)
    evaluation = needs_libraries(lambda: evaluation_of(options.kind))
    typed = cli.to_dataclass(evaluation.config, config)
    parts = {name: part_of(config[name]) for name in PARTS if name in config}
    quality = {name: cli.build(node) for name, node in (config.quality or {}).items()}
    result = needs_libraries(lambda: evaluation.run(typed, **parts, quality=quality))
    print(evaluation.table(result.summary))
    print(f"\n{result.folder}/report.html, summary.json, rows.parquet")


def run_compare(options: argparse.Namespace) -> None:
    def work() -> str:
        from higgs.eval.compare import run_compare

        return run_compare(options.folders, options.metrics, options.json)

    print(needs_libraries(work))


def part_of(node: Any) -> Any:
    """A judge from its config; an empty config is none."""
    return cli.build(node) if node else None


def evaluation_of(kind: str) -> argparse.Namespace:
    """Loaded late: the other commands need none of these libraries."""
    from higgs.eval.figures import table

    if kind == "codec":
        from higgs.eval.codec import CodecEvaluation, evaluate_codec

        return argparse.Namespace(config=CodecEvaluation, run=evaluate_codec, table=table)
    from higgs.eval.tts import SpeechEvaluation, evaluate_tts

    return argparse.Namespace(config=SpeechEvaluation, run=evaluate_tts, table=table)


def needs_libraries(function: Callable[[], Any]) -> Any:
    """Runs it; a library that is not installed is a sentence that says how to install it."""
    try:
        return function()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "higgs":
            raise
        raise UserError(
            f"Evaluation needs the package {error.name}, which is not installed: pip install -e '.[eval]' (or "
            "'.[judges]' for Whisper, wav2vec2, WavLM, UTMOS and DNSMOS)."
        ) from error
