"""Train and grade one cell, or a sweep: `python scripts/train.py -m method=cdka method.r2=2,8 seed=0,1`.

A cell whose record is there is skipped; `force=true` does it again. Of a sweep, cells that have failed are tried again
with `retry_failed=true`. Stopped by Ctrl-C, SIGTERM or SIGUSR2, the same command goes on.
"""

from __future__ import annotations

from typing import Any

import hydra
from omegaconf import DictConfig

from kronlab.cell import CONFIG_DIR
from kronlab.cli import run_main, start
from kronlab.sweep import finish, run_job


@hydra.main(config_path=str(CONFIG_DIR), config_name="config", version_base="1.3")
def main(config: DictConfig) -> dict[str, Any] | None:
    return run_main(lambda: run_job(config))


if __name__ == "__main__":
    start(main, finish=finish)
