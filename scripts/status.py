"""Where the cells stand: `python scripts/status.py`, or those of a table: `... table=table2 table_scale=small`."""

from __future__ import annotations

import logging

import hydra
from omegaconf import DictConfig, OmegaConf

from kronlab.cell import CONFIG_DIR
from kronlab.cli import run_main, start
from kronlab.reproduce import choose_scale
from kronlab.status import gather, render


@hydra.main(config_path=str(CONFIG_DIR), config_name="status", version_base="1.3")
def main(config: DictConfig) -> None:
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    logging.getLogger("kronlab").setLevel(logging.WARNING)  # standard output is the answer alone
    results, table, scale = plain["results"]["dir"], plain.get("table"), plain["table_scale"]

    def work() -> None:
        chosen = choose_scale(scale, among=table["scales"]) if table else scale
        entries = gather(
            results, table=table, scale=chosen, reuse=plain["results"]["reuse"], stale_after=plain["stale_after"]
        )
        print(render(entries, plain["format"], results=results, eta=table is not None))

    run_main(work)


if __name__ == "__main__":
    start(main)
