"""Make the golden files of the text side with the reference, transformers 5.6.2: `python tests/make_golden.py`.

The tests compare against the files without transformers. The labels of mode "assistant" are this project's own (the
reference has none): they are counted out here one by one, apart from the code under test.
"""

import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import transformers  # noqa: E402
from tiny import build_hf_codec, build_tokenizer  # noqa: E402

from higgs.chat_template import own_template  # noqa: E402

REFERENCE = "5.6.2"
BOS, EOS, NUM_CODEBOOKS = 1024, 1025, 4
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Generate audio following instruction."}]}
SCENE = {"role": "scene", "content": [{"type": "text", "text": "Audio is recorded from a quiet room."}]}


def user(text: str) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def clip(length: int, seed: int) -> dict:
    codes = torch.randint(0, 1024, (NUM_CODEBOOKS, length), generator=torch.Generator().manual_seed(seed))
    return {"type": "audio", "codes": codes.tolist()}


def speaker(number: int, what: str = "") -> dict:
    return {"type": "text", "text": f"SPEAKER{number}: {what}"}


def conversations() -> dict[str, list[dict]]:
    """The documented workflows, with codes in place of sound."""
    reference = [user("It was the night before."), {"role": "assistant", "content": [clip(3, 0)]}]
    described = {"role": "scene", "content": [*SCENE["content"], speaker(0, "feminine"), speaker(1, "masculine")]}
    heard = {"role": "scene", "content": [*SCENE["content"], speaker(0), clip(2, 1), speaker(1), clip(5, 2)]}
    two = "[SPEAKER0] I can't believe it!\n[SPEAKER1] Oh, come on!"
    return {
        "single": [SYSTEM, SCENE, user(" The sun rises in the east. ")],
        "described_speakers": [SYSTEM, described, user(two)],
        "cloning": [SYSTEM, SCENE, *reference, user("The sun sets in the west.")],
        "scene_cloning": [SYSTEM, heard, user(two), {"role": "assistant", "content": [clip(4, 3)]}],
        "no_scene": [SYSTEM, *reference, user("Again."), {"role": "assistant", "content": [clip(1, 4)]}],
    }


class FakeFeatures:
    """Stands in for the codec's input: it hands the codes of the clip on."""

    def __call__(self, codes, **_):
        return transformers.BatchFeature({"input_values": codes})


def reference_processor(folder: Path) -> transformers.HiggsAudioV2Processor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    codec = build_hf_codec(num_codebooks=NUM_CODEBOOKS)
    codec.encode = lambda input_values: transformers.BatchFeature({"audio_codes": torch.as_tensor(input_values)[None]})
    processor = transformers.HiggsAudioV2Processor(
        transformers.DacFeatureExtractor(sampling_rate=24000, hop_length=1), tokenizer, codec, own_template()
    )
    processor.feature_extractor = FakeFeatures()
    return processor


def assistant_labels(ids: list[int], frames: list[list[int]], tokenizer, trained_clips: list[bool]) -> tuple:
    """SPEC 6 by hand: walk the tokens with a state, walk the clips frame by frame."""
    token = tokenizer.convert_tokens_to_ids
    labels, inside, header = [], False, None
    for place, i in enumerate(ids):
        if i == token("<|start_header_id|>"):
            inside, header = False, place
        closed = token("<|eot_id|>") in ids[place:]
        hidden = i in (token("<|AUDIO_OUT|>"), token("<|reserved_special_token_6|>"))
        labels.append(i if inside and closed and not hidden else -100)
        if i == token("<|eot_id|>"):
            inside = False
        if header is not None and tokenizer.decode(ids[header : place + 1]).endswith("assistant<|end_header_id|>\n\n"):
            inside = True
    frame_labels, clip_index, ended = [], -1, [False] * NUM_CODEBOOKS
    for frame in frames:
        if all(code == BOS for code in frame):
            clip_index, ended = clip_index + 1, [False] * NUM_CODEBOOKS
        row = []
        for k, code in enumerate(frame):
            learnt = trained_clips[clip_index] and code != BOS and not ended[k]
            row.append(code if learnt else -100)
            ended[k] = ended[k] or code == EOS
        frame_labels.append(row)
    return labels, frame_labels


def main() -> None:
    assert transformers.__version__ == REFERENCE, f"the reference is transformers {REFERENCE}"
    golden = HERE / "golden"
    golden.mkdir(exist_ok=True)
    build_tokenizer(golden / "tokenizer")
    theirs = reference_processor(golden / "tokenizer")
    generator = torch.Generator().manual_seed(0)
    cases = []
    for shape in ((1, 1, 4), (2, 3, 5), (1, 8, 1), (1, 4, 9)):
        codes = torch.randint(0, 1024, shape, generator=generator)
        cases.append({"codes": codes.tolist(), "delayed": theirs.build_delay_pattern(codes).tolist()})
    write(golden / "delay.json", {"reference": f"transformers {REFERENCE}", "bos": BOS, "eos": EOS, "cases": cases})
    trained = {"scene_cloning": [False, False, True], "cloning": [True], "no_scene": [True, True]}
    chats = {}
    for name, conversation in conversations().items():
        codes = [item["codes"] for message in conversation for item in message["content"] if item["type"] == "audio"]
        audio = [torch.tensor(clip_codes) for clip_codes in codes]
        prompt = name not in trained
        text = theirs.apply_chat_template(conversation, add_generation_prompt=prompt)
        with_codes = {"audio": audio} if audio else {}
        # A tensor passes for a clip; its codes come back from the stand-in of the codec.
        batch = theirs(text=[text], output_labels=True, return_tensors="pt", add_special_tokens=False, **with_codes)
        entry = {"conversation": conversation, "add_generation_prompt": prompt, "text": text, "transformers": {}}
        for key in ("input_ids", "attention_mask", "audio_input_ids", "audio_input_ids_mask", "labels", "audio_labels"):
            if key in batch:
                entry["transformers"][key] = batch[key].int().tolist()
        ids, frames = batch["input_ids"][0].tolist(), batch.get("audio_input_ids", torch.zeros(1, 0, 1))[0].tolist()
        labels, frame_labels = assistant_labels(ids, frames, theirs.tokenizer, trained.get(name, []))
        entry["assistant"] = {"labels": [labels]} | ({"audio_labels": [frame_labels]} if audio else {})
        chats[name] = entry
    write(golden / "chat.json", {"reference": f"transformers {REFERENCE}", "chats": chats})
    total = sum(path.stat().st_size for path in golden.rglob("*") if path.is_file())
    print(f"{total / 1024:.0f} KB in {golden}")
    assert total < 100 * 1024


def write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
