"""Records as W&B runs, one per cell: `python scripts/wandb_push.py only.table=table2 mode=online`.

Typed again, it adds nothing.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig, OmegaConf

from kronlab.cell import CONFIG_DIR
from kronlab.cli import run_main, start
from kronlab.wandb_push import wandb_push


@hydra.main(config_path=str(CONFIG_DIR), config_name="wandb", version_base="1.3")
def main(config: DictConfig) -> None:
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    run_main(lambda: wandb_push(plain))


if __name__ == "__main__":
    start(main)
