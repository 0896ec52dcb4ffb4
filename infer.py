"""Speech from a checkpoint: python infer.py checkpoint=PATH text="Any sentence."  (see configs/infer.yaml)"""

import hydra
from omegaconf import DictConfig

from higgs import cli
from higgs.inference import InferConfig, infer, require_sound


@hydra.main(config_path="configs", config_name="infer", version_base="1.3")
def main(config: DictConfig) -> None:
    try:
        require_sound(infer(cli.to_dataclass(InferConfig, config)))
    except cli.UserError as error:  # before Hydra wraps it in a traceback
        cli.fail(error)


if __name__ == "__main__":
    cli.run(
        main, "infer", free_text={"text", "scene", "system", "output", "checkpoint", "conversation", "audio_tokenizer"}
    )
