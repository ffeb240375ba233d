"""Train and grade one cell, or a sweep: `python scripts/train.py -m method=cdka method.r2=2,8 seed=0,1`.

A cell whose record is there is skipped; `force=true` does it again.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from kronlab.cell import CONFIG_DIR, make_cell
from kronlab.cli import run_main, start
from kronlab.experiment import run_cell


@hydra.main(config_path=str(CONFIG_DIR), config_name="config", version_base="1.3")
def main(config: DictConfig) -> None:
    run_main(lambda: run_cell(make_cell(config)))


if __name__ == "__main__":
    start(main)
