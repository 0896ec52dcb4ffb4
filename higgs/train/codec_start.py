"""The weights that the training of a codec begins with."""

from collections.abc import Callable

from higgs.checkpoint.teacher import config_with_teacher, give_teacher, load_teacher
from higgs.codec import Codec
from higgs.data.draws import random_generator


def has_codebooks(codec: Codec) -> bool:
    return all(bool(stage.codebook.embed.any()) for stage in codec.quantizer.quantizers)


def first_weights(codec: Codec, teacher: str | None, seed: int, log: Callable[[str], None]) -> Codec:
    """A codec to train from nothing: random weights from the seed, and the teacher at the path `teacher`.

    The teacher's sizes win over the codec's config. Without one the teacher is random: its features are then some
    fixed function of the sound, and carry no meaning.
    """
    generator = random_generator("codec", seed)
    if teacher is None:
        codec.init_weights(generator)
        log("codec: no semantic teacher is given (codec_training.teacher), so a small random one stands in.")
        return codec
    given = load_teacher(teacher)
    codec = Codec(config_with_teacher(codec.config, given.config))
    codec.init_weights(generator)
    give_teacher(codec, given)
    log(
        f"codec: the semantic teacher is {teacher}, {given.config.num_hidden_layers} layers of {given.config.hidden_size}."
    )
    return codec
