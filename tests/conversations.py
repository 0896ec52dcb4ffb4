"""Conversations that several tests use, in the layout of the public documentation."""

SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Generate audio following instruction."}]}
SCENE = {"role": "scene", "content": [{"type": "text", "text": "Audio is recorded from a quiet room."}]}


def user(text: str) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def assistant(**source) -> dict:
    return {"role": "assistant", "content": [{"type": "audio", **source}]}


def workflows(files: list[str]) -> dict[str, list[dict] | list[list[dict]]]:
    """The documented ones, and a batch in which each row has another number of clips."""
    cloning = [SYSTEM, SCENE, user("It was the night."), assistant(url=files[0]), user("The sun rises.")]
    speakers = [
        *SCENE["content"],
        {"type": "text", "text": "SPEAKER0:"},
        {"type": "audio", "url": files[1]},
        {"type": "text", "text": "SPEAKER1:"},
        {"type": "audio", "url": files[2]},
    ]
    scene_cloning = [SYSTEM, {"role": "scene", "content": speakers}, user("[SPEAKER0] Hi!\n[SPEAKER1] Oh.")]
    return {
        "single": [SYSTEM, SCENE, user("The sun rises in the east.")],
        "cloning": cloning,
        "scene_cloning": scene_cloning,
        "batch": [cloning, scene_cloning],
        "training": [
            [SYSTEM, SCENE, user("One."), assistant(url=files[2])],
            [SYSTEM, user("Two words."), assistant(url=files[0])],
        ],
    }
