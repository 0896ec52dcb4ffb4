"""Transcript normalisation as users know it from the original's command line (SPEC 7). Opt-in, at the edge only."""

import re

# Full-width and typographic punctuation -> what the model has seen. A full-width comma carries its own space.
PUNCTUATION = str.maketrans(
    {
        **dict(zip("。：；？！（）【】《》、—·", ".:;?!()[]<>,-.", strict=True)),
        **dict.fromkeys("“”「」『』", '"'),
        **dict.fromkeys("‘’", "'"),
        "，": ", ",
        "…": "...",
    }
)
EVENTS = {"laugh": "Laughter", "applause": "Applause", "cheering": "Cheering", "cough": "Cough", "music": "Music"}
SPANS = {"humming": "Humming", "music": "Music", "sing": "Singing"}
REPLACEMENTS = {
    "(": " ",
    ")": " ",
    "°F": " degrees Fahrenheit",
    "°C": " degrees Celsius",
    **{f"[{word}]": f"<SE>[{name}]</SE>" for word, name in EVENTS.items()},
    **{
        f"[{word} {edge}]": f"<SE_{edge[0]}>[{name}]</SE_{edge[0]}>"
        for word, name in SPANS.items()
        for edge in ("start", "end")
    },
}
CLOSING = (".", "!", "?", ",", ";", '"', "'", "</SE_e>", "</SE>")
_pattern = re.compile("|".join(map(re.escape, REPLACEMENTS)))


def normalize_transcript(text: str) -> str:
    """Punctuation to ASCII, brackets to spaces, degrees to words, sound tags to the model's own, blank lines dropped,
    runs of spaces collapsed, a full stop where closing punctuation is missing. A blank text stays empty."""
    text = _pattern.sub(lambda found: REPLACEMENTS[found.group()], text.translate(PUNCTUATION))
    text = "\n".join(" ".join(line.split()) for line in text.split("\n") if line.strip())
    return text if not text or text.endswith(CLOSING) else text + "."
