"""Train one configuration, or with -m a sweep of them; what a run leaves behind is described in cbl/records.py.

python scripts/train.py dataset=cifar10_lt dataset.imbalance_factor=50 loss=focal_g1 loss.beta=0.9999 seed=0
torchrun --nproc-per-node=8 scripts/train.py experiment=table3_inaturalist2018_resnet50_softmax
"""

import sys

import hydra
from command_line import flags_first, one_line
from omegaconf import DictConfig

from cbl.engine.train import exit_status, train
from cbl.errors import UserError
from hydra_plugins.cbl_launcher import to_run


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(composed: DictConfig) -> None:
    try:
        run = to_run(composed)  # every key checked; from here on plain dataclasses
    except UserError as error:  # caught here, because Hydra would add a line of its own
        print(error, file=sys.stderr)
        sys.exit(2)
    # data -> network -> loss -> training -> record, in cbl/engine/resident.py where the images fit in the device's
    # memory, in cbl/engine/streaming.py for the large sets; with -m, hydra_plugins/ hands whole sweeps to the same two
    if status := exit_status(train([run])):
        sys.exit(status)


if __name__ == "__main__":
    with one_line():
        flags_first()
        main()
