"""Judge the papers' claims from the records that are there: `python scripts/claims.py` writes results/claims.md."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig, OmegaConf

from kronlab.cell import CONFIG_DIR
from kronlab.claims import write_claims
from kronlab.cli import run_main, start


@hydra.main(config_path=str(CONFIG_DIR), config_name="claims", version_base="1.3")
def main(config: DictConfig) -> None:
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)

    def work() -> None:
        for path in write_claims(plain["claims"], plain["results"]["dir"]):
            print(f"wrote {path}")

    run_main(work)


if __name__ == "__main__":
    start(main)
