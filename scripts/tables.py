"""Reproduce a table: `python scripts/tables.py table=table2 table_scale=mini`. Stopped and typed again, it goes on."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig, OmegaConf

from kronlab.cell import CONFIG_DIR
from kronlab.cli import run_main, start
from kronlab.reproduce import reproduce


@hydra.main(config_path=str(CONFIG_DIR), config_name="tables", version_base="1.3")
def main(config: DictConfig) -> None:
    spec = OmegaConf.to_container(config.table, resolve=True)
    run_main(
        lambda: reproduce(
            spec,  # type: ignore[arg-type]
            scale=config.table_scale,
            results_dir=config.results.dir,
            dry_run=config.dry_run,
            render_only=config.render_only,
            force=config.force,
            reuse=config.results.reuse,
            extra=list(config.extra),
        )
    )


if __name__ == "__main__":
    start(main)
