"""Decoding speed of this project beside transformers: the same random weights, one run, frames per second and ratio.

    python bench/decode.py                      # CPU: 4 M, 18 M and 145 M parameters, batch 1 and 8
    python bench/decode.py --sizes 3b           # a GPU: the released shape in bf16

A frame here is one decoding step of one row. Greedy, with repetition-aware sampling off; stop codes are made impossible
on both sides, so that both run all steps. The two alternate, and the best of `--repeats` counts, because these
machines are noisy.
"""

import argparse
import platform
import time
from collections.abc import Callable

import torch
import transformers
from transformers import HiggsAudioV2Config as OracleConfig
from transformers import HiggsAudioV2ForConditionalGeneration as OracleModel

from higgs.checkpoint.io import reset_buffers
from higgs.generation import GenerationConfig, generate
from higgs.model import DualFFNDecoder, HiggsAudioV2Config

# name -> hidden, intermediate, layers, heads, key-value heads, head dim, vocabulary, rows per codebook
SIZES = {
    "4m": (192, 512, 4, 4, 2, 48, 1024, 258),
    "18m": (256, 896, 8, 4, 2, 64, 4096, 1026),
    "145m": (768, 2048, 12, 12, 4, 64, 4096, 1026),
    "3b": (3072, 8192, 28, 24, 8, 128, 128256, 1026),
}


def shape(name: str) -> dict:
    hidden, inner, layers, heads, kv_heads, head_dim, vocabulary, rows = SIZES[name]
    return {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "codebook_size": rows,
        "max_position_embeddings": 2048, "audio_token_id": vocabulary - 1, "audio_delay_token_id": vocabulary - 2,
        "audio_bos_token_id": vocabulary - 3, "pad_token_id": vocabulary - 4, "eos_token_id": vocabulary - 5,
        "audio_stream_bos_id": rows - 2, "audio_stream_eos_id": rows - 1,
    }  # fmt: skip


def prompt(config: HiggsAudioV2Config, batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, config.vocab_size - 8, (batch, length))
    ids[:, -1] = config.audio_bos_token_id
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def never_stop(oracle: OracleModel, config: HiggsAudioV2Config) -> None:
    """Makes the stop code impossible through the head, where both sides see it: its row repeats a likelier code's."""
    with torch.no_grad():
        head = oracle.audio_lm_head.weight.view(config.num_codebooks, config.codebook_size, -1)
        # argmax takes the first of equals, and code 0 comes before the stop code.
        head[:, config.audio_stream_eos_id] = head[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=None, choices=SIZES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=100, help="prompt tokens")
    parser.add_argument("--frames", type=int, default=100, help="decoding steps per run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = args.sizes or (["3b"] if device.type == "cuda" else ["4m", "18m", "145m"])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {args.threads} threads"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {machine}, {dtype}")
    print(f"prompt {args.prompt} tokens, {args.frames} frames, best of {args.repeats}, prefill included\n")
    print("| size | parameters | batch | transformers, frames/s | higgs, frames/s | ratio |")
    print("|---|---|---|---|---|---|")
    for name in sizes:
        torch.manual_seed(0)
        oracle = OracleModel(OracleConfig(**shape(name))).to(device, dtype).eval()
        config = HiggsAudioV2Config(**shape(name))
        never_stop(oracle, config)
        with torch.device("meta"):
            model = DualFFNDecoder(config)
        model.load_state_dict(oracle.state_dict(), assign=True)
        reset_buffers(model, device)
        model.to(device).eval()
        count = sum(p.numel() for p in model.parameters()) / 1e6
        how = GenerationConfig(max_new_tokens=args.frames)
        for batch in args.batches:
            inputs = {key: value.to(device) for key, value in prompt(config, batch, args.prompt).items()}
            codes: dict[str, torch.Tensor] = {}

            def theirs(inputs=inputs, codes=codes, oracle=oracle) -> None:
                codes["theirs"] = oracle.generate(**inputs, max_new_tokens=args.frames, do_sample=False)

            def ours(inputs=inputs, codes=codes, model=model, how=how) -> None:
                codes["ours"] = generate(model, **inputs, how=how).audio_sequences

            theirs(), ours()  # warm up
            best = {"theirs": float("inf"), "ours": float("inf")}
            for _ in range(args.repeats):
                best["theirs"] = min(best["theirs"], seconds(theirs, device))
                best["ours"] = min(best["ours"], seconds(ours, device))
            same = "" if torch.equal(codes["theirs"], codes["ours"]) else " (codes differ)"
            steps = codes["ours"].shape[1] * batch
            a, b = steps / best["theirs"], steps / best["ours"]
            print(f"| {name} | {count:.1f} M | {batch} | {a:.0f} | {b:.0f} | {b / a:.2f}{same} |", flush=True)


if __name__ == "__main__":
    main()
