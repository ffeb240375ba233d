"""Grade without training, or grade again without a model.

python scripts/evaluate.py +eval@eval.gsm8k=gsm8k                                            the base model
python scripts/evaluate.py +eval@eval.gsm8k=gsm8k method=adapter method.path=<folder>        a trained adapter
python scripts/evaluate.py regrade=<record id | all>                                         the kept completions
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from kronlab.cell import CONFIG_DIR
from kronlab.cli import run_main, start
from kronlab.evaluate import regrade_records
from kronlab.sweep import finish, run_job


@hydra.main(config_path=str(CONFIG_DIR), config_name="evaluate", version_base="1.3")
def main(config: DictConfig) -> None:
    if config.regrade is None:
        run_main(lambda: run_job(config))
    else:
        run_main(lambda: regrade_records(config.results.dir, str(config.regrade)))


if __name__ == "__main__":
    start(main, finish=finish)
