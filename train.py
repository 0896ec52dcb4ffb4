"""Training: python train.py +experiment=overfit  (see configs/train.yaml and configs/experiment/)

Several processes: torchrun --nproc-per-node 8 train.py +experiment=base_3b data.train=… codec_path=…
"""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from higgs import cli
from higgs.processes import leaving
from higgs.train.prepare import Parts
from higgs.train.run import TrainConfig, train


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
def main(config: DictConfig) -> None:
    try:
        config.run_dir = cli.sweep_folder(config.run_dir)
        typed = cli.to_dataclass(TrainConfig, config)
        parts = Parts(
            codec=lambda: cli.build(config.codec),
            tokenizer=cli.build(config.tokenizer),
            model=lambda ids: cli.build(config.model, config=ids),
            chat=cli.build(config.chat),
        )
        outcome = train(typed, parts, HydraConfig.get().overrides.task)
    except cli.UserError as error:  # before Hydra wraps it in a traceback
        cli.fail(error)
    if not outcome.finished:
        sys.exit(0)  # not only this run: a sweep that was asked to leave starts no other


PATHS = {
    "run_dir", "data.train", "data.valid", "codec_path", "init_from", "text_model", "resume", "tokenizer.folder",
    "codec_training.teacher",
}  # fmt: skip

if __name__ == "__main__":
    with leaving():
        cli.run(main, "train", free_text=PATHS)
