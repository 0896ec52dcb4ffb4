"""Training: python train.py +experiment=overfit  (see configs/train.yaml and configs/experiment/)"""

import hydra
from omegaconf import DictConfig

from higgs import cli
from higgs.train.run import Parts, TrainConfig, train


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
def main(config: DictConfig) -> None:
    try:
        parts = Parts(
            codec=lambda: cli.build(config.codec),
            tokenizer=cli.build(config.tokenizer),
            model=lambda ids: cli.build(config.model, config=ids),
            chat=cli.build(config.chat),
        )
        train(cli.to_dataclass(TrainConfig, config), parts)
    except cli.UserError as error:  # before Hydra wraps it in a traceback
        cli.fail(error)


if __name__ == "__main__":
    cli.run(main, "train", free_text={"run_dir", "data.train", "codec_path"})
