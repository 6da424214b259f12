"""The command line, slowed to a step in `PAUSE` seconds, with a list of the samples in this process's share of every batch.

``sampled_run.py LIST COMMAND ...`` adds a line ``[step, processes, process, [sample, ...]]`` a step to the file LIST.
"""

import json
import sys
import time

import jax

from terramind_jax import cli
from terramind_jax.data.faults import Faults
from terramind_jax.train.meter import Meter

PAUSE = 0.1
following, add = Faults.following, Meter.add
batch = []


def listing(self, batches):
    for one in following(self, batches):
        batch[:] = one["sample"].tolist()
        time.sleep(PAUSE)
        yield one


def adding(self, step, *rest):
    with open(sys.argv[1], "a") as f:
        print(json.dumps([step, jax.process_count(), jax.process_index(), batch]), file=f)
    add(self, step, *rest)


if __name__ == "__main__":  # data workers import this file, too
    Faults.following, Meter.add = listing, adding
    sys.exit(cli.main(sys.argv[2:]))
