"""The command line with a list of the samples that this process trains on, a line a batch"""

import json
import sys

from terramind_jax import cli
from terramind_jax.data.faults import Faults

following = Faults.following


def listing(self, batches):
    with open(sys.argv[1], "a") as f:
        for batch in following(self, batches):
            print(json.dumps(batch["sample"].tolist()), file=f, flush=True)
            yield batch


if __name__ == "__main__":  # data workers import this file, too
    Faults.following = listing
    sys.exit(cli.main(sys.argv[2:]))
