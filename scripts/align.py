"""Alignment: `python scripts/align.py rows=[lora_8,cdka_2_8_4] seeds=5`; typed again, it goes on."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig, OmegaConf

from kronlab.align import run_align
from kronlab.cell import CONFIG_DIR
from kronlab.cli import run_main, start
from kronlab.reproduce import choose_scale


@hydra.main(config_path=str(CONFIG_DIR), config_name="align", version_base="1.3")
def main(config: DictConfig) -> None:
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    run_main(
        lambda: run_align(
            plain["table"],
            choose_scale(plain["table_scale"], among=plain["table"]["scales"]),
            results=plain["results"]["dir"],
            reuse=plain["results"]["reuse"],
            keys=plain["rows"],
            **{key: plain[key] for key in ("name", "seeds", "batches", "extra")},
            **{key: plain[key] for key in ("dry_run", "render_only", "force")},
        )
    )


if __name__ == "__main__":
    start(main)
