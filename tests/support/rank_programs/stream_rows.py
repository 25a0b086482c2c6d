"""One rank of a test: pulls micro-batches out of the real stream and writes the first tokens of their rows.

    mpirun -n 3 python stream_rows.py DATA MICRO_BATCHES RESULTS
"""

import os
import sys
from pathlib import Path

from data.dataloader import BatchStream
from data.shard_reader import ShardReader
from data.shards import find_shards
from devices.device import Device
from parallel import rendezvous
from parallel.ranks import init_ranks
from tests.support import synthetic

data, micro_batches, results = sys.argv[1:]
info = rendezvous.rank_info(os.environ)
rendezvous.set_variables(info, os.environ)
with init_ranks(info, timeout_seconds=60) as process:
    process.connect(Device())
    stream = BatchStream(find_shards(data), 2, 1, synthetic.VOCAB_SIZE, ranks=process, reader=ShardReader())
    rows = [row for _ in range(int(micro_batches)) for row in next(stream)["input_ids"].tolist()]
    Path(results, f"rank_{process.rank}.txt").write_text("\n".join(str(row) for row in rows))
