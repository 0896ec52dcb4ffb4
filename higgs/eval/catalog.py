"""Every metric that a row may hold: what it is, its unit, and which way is better."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """`better` is "higher", "lower" or None (neither: it describes); `perfect` is what an identical sound gets, if fixed."""

    unit: str
    better: str | None
    description: str
    perfect: float | None = None


METRICS = {
    # Of a codec, at each bandwidth.
    "stft_distance": Metric("", "lower", "multi-scale STFT distance, windows 2048 and 512, as DAC defines it", 0.0),
    "mel_distance": Metric("", "lower", "multi-scale mel distance, 150 and 80 bands, as DAC defines it", 0.0),
    "si_sdr": Metric("dB", "higher", "scale-invariant signal-to-distortion ratio"),
    "pesq": Metric("MOS", "higher", "PESQ, wide-band, at 16 kHz (ITU-T P.862.2)", 4.6439),
    "stoi": Metric("", "higher", "short-time objective intelligibility", 1.0),
    "estoi": Metric("", "higher", "extended short-time objective intelligibility", 1.0),
    "f0_error": Metric("cents", "lower", "root mean square error of F0 where both are voiced", 0.0),
    "f0_correlation": Metric("", "higher", "correlation of log F0 where both are voiced", 1.0),
    "voicing_error": Metric("", "lower", "share of frames voiced in one and not in the other", 0.0),
    "bitrate": Metric("kbit/s", None, "bits of all codes over seconds of sound"),
    # Of generated speech.
    "wer": Metric("", "lower", "word error rate of what a recogniser hears", 0.0),
    "cer": Metric("", "lower", "character error rate of what a recogniser hears", 0.0),
    "reference_wer": Metric("", None, "word error rate of the same recogniser on the reference recording"),
    "seconds": Metric("s", None, "length"),
    "duration_ratio": Metric("", None, "length over that of the reference recording", 1.0),
    "stopped": Metric("", "higher", "whether the model ended the clip itself"),
    "runaway": Metric("", "lower", "whether the clip ran into the limit or is far longer than its text asks for"),
    "leading_silence": Metric("s", "lower", "silence before the first sound"),
    "trailing_silence": Metric("s", "lower", "silence after the last sound"),
    "repeated": Metric("", "lower", "share of heard words that repeat the words before, without the text asking for it"),
    "clipped": Metric("", "lower", "share of samples at full scale", 0.0),
    "speaker_similarity": Metric("", "higher", "cosine similarity to the voice that was asked for", 1.0),
    # Of dialogues.
    "intra_similarity": Metric("", "higher", "mean similarity of turns of one speaker, and to its reference voice"),
    "inter_dissimilarity": Metric("", "higher", "one minus the mean similarity of turns of different speakers"),
    "dialogue_consistency": Metric("", "higher", "geometric mean of intra-speaker similarity and inter-speaker dissimilarity"),
    "turns_found": Metric("", "higher", "share of turns whose words were heard"),
    # Predicted opinion.
    "utmos": Metric("MOS", "higher", "naturalness predicted by UTMOS22 strong"),
    "dnsmos_sig": Metric("MOS", "higher", "speech quality predicted by DNSMOS P.835"),
    "dnsmos_bak": Metric("MOS", "higher", "background quality predicted by DNSMOS P.835"),
    "dnsmos_ovrl": Metric("MOS", "higher", "overall quality predicted by DNSMOS P.835"),
    "dnsmos_p808": Metric("MOS", "higher", "overall quality predicted by DNSMOS P.808"),
}  # fmt: skip


def metric_of(column: str) -> Metric | None:
    """The metric of a row's column, `pesq` or, at a bandwidth in kbit/s, `pesq@1.5`; None if the column holds none."""
    return METRICS.get(column.partition("@")[0])


def metric_columns(rows: list[dict]) -> list[str]:
    """The columns of rows that hold metrics, in the order of the catalogue, then of the bandwidth."""
    names = list(METRICS)
    found = {column for row in rows for column in row if metric_of(column)}

    def place(column: str) -> tuple[int, float]:
        name, _, bandwidth = column.partition("@")
        return names.index(name), float(bandwidth or 0)

    return sorted(found, key=place)
