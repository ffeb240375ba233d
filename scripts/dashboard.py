"""Write the dashboard: `python scripts/dashboard.py` makes results/dashboard.html from the records; it runs nothing."""

from __future__ import annotations

import logging

import hydra
from omegaconf import DictConfig

from kronlab.cell import CONFIG_DIR
from kronlab.cli import run_main, start
from kronlab.dashboard import write_dashboard

log = logging.getLogger(__name__)


@hydra.main(config_path=str(CONFIG_DIR), config_name="dashboard", version_base="1.3")
def main(config: DictConfig) -> None:
    def work() -> None:
        path = write_dashboard(config.results.dir, config.out, tables=config.tables)
        log.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)

    run_main(work)


if __name__ == "__main__":
    start(main)
