"""Training from and to object storage, against moto's S3 server behind a link of a given latency and rate.

    python benchmarks/object_storage.py [--json] [--only first_step waiting …]

first_step     seconds to the end of the first step, of a set of 2 shards and of one of 200; first_step_ratio (≤ 1.2)
waiting        share of a step that waits for data where the link has 1.5 times the rate that training needs (≤ 1 %)
connections    the rate of a transfer over many connections against one, at 50 ms and 20 MB/s a connection (≥ 6 times)
fetched        bytes fetched / bytes needed by two ranks on one server (≤ 1.02), and the most that lay on the disk
stall          seconds that training stands still for a checkpoint, against a local folder (within 10 %)
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

from tqdm import tqdm

from measuring import alternate, machine, report, spread  # puts the repository's root on the path

# isort: split
from common import cli

LATENCY = 0.02  # of the link, seconds
TRANSFER = {"latency": 0.05, "rate": 20e6}  # of a connection
TRANSFER_BYTES = 160 << 20
MINI = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024,
        "max_position_embeddings": 128}
ROWS = 32  # of a step
KERNELS = "cpu_kernels_*.so"
STEPS, WARM_UP = 30, 5
CHECKPOINT_EVERY, CHECKPOINTS = 12, 8

# A server of one large file by ranges: moto reads an object whole for each of its parts
FILE_SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
content = memoryview(bytes(int(sys.argv[1])))
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_HEAD(self):
        wanted = self.headers.get("Range")
        first, last = wanted.removeprefix("bytes=").split("-") if wanted else (0, len(content) - 1)
        body = content[int(first):int(last) + 1 if last else None]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", len(body))
        self.send_header("ETag", '"one"')
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
    do_GET = do_HEAD
    def log_message(self, *_):
        pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(f"http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--repeats", type=cli.positive_int, default=3, help="of each start and transfer")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    from tests.support.object_store import s3_server

    figures, lines = {}, []
    with tempfile.TemporaryDirectory() as folder, s3_server() as url:
        bench = Bench(Path(folder), url, args.repeats)
        for part in tqdm(args.only, desc="parts", disable=args.json or None):
            found = PARTS[part](bench)
            figures |= found
            lines += [f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"
                      for name, value in found.items()]
    report({**figures, "machine": machine("boto3", "h5py")}, args.json, lines)


class Bench:
    """The folder, the server, and the sets that the measurements share."""

    def __init__(self, folder: Path, url: str, repeats: int):
        from tests.support import samples

        self.folder, self.url, self.repeats = folder, url, repeats
        samples.write_config(folder / "mini.json", **MINI)

    def data_set(self, name: str, shards: int, rows: int, predictions: int = 20) -> str:
        """Upload a set of so many shards; its URL."""
        import numpy as np

        from data.upload import upload_set
        from tests.support import synthetic

        for number in range(shards):
            lengths = np.random.default_rng(number).integers(20, 129, rows)
            synthetic.write_unpacked_shard(self.folder / name / f"part_training_{number}.hdf5", lengths, number,
                                           predictions=predictions)
        upload_set(self.folder / name, f"s3://data/{name}", overwrite=True, show_progress=False)
        return f"s3://data/{name}"

    def bytes_of(self, name: str) -> int:
        return sum(path.stat().st_size for path in (self.folder / name).glob("*.hdf5"))

    def flags(self, **changes) -> list[str]:
        from tests.support import ranks

        return ranks.flags(1, "out", **{
            "config_file": self.folder / "mini.json", "output_dir": self.folder / "out", "max_seq_length": 128,
            "max_predictions_per_seq": 20, "train_batch_size": ROWS, "gradient_accumulation_steps": 1,
            "json_summary": self.folder / "log.json", "peak_tflops": 1.0, **changes})

    @contextmanager
    def cache(self, link_url: str):
        """A block with a cache that holds no more than compiled kernels, and the link in place of the server."""
        with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, BERT_CACHE_DIR=cache,
                                                                AWS_ENDPOINT_URL=link_url):
            for kernels in self.folder.glob(KERNELS):
                shutil.copy(kernels, cache)
            yield Path(cache)
            for kernels in Path(cache).glob(KERNELS):
                shutil.copy(kernels, self.folder)

    def train(self, ranks_count: int = 1, **changes) -> None:
        from tests.support import ranks

        command = [*ranks.TRAIN, *self.flags(**changes)]
        if ranks_count > 1:
            command = ranks.mpirun(ranks_count, *command)
        done = subprocess.run(command, cwd=self.folder, env=ranks.environment(OMP_NUM_THREADS="1"), encoding="utf-8",
                              capture_output=True)
        if done.returncode:
            sys.exit(f"a run failed: {done.stdout[-1000:]}{done.stderr[-3000:]}")

    def log(self) -> list[dict]:
        return [json.loads(line.removeprefix("DLLL "))
                for line in (self.folder / "log.json").read_text(encoding="utf-8").splitlines()]


def first_step(bench: Bench) -> dict:
    from tests.support.shaped_link import shaped_link

    seconds = {2: [], 200: []}
    urls = {count: bench.data_set(f"shards_{count}", count, 64) for count in seconds}
    with shaped_link(bench.url, LATENCY) as link:
        def start(count: int) -> None:
            with bench.cache(link.url):
                bench.train(input_dir=urls[count], max_steps=1, config_file=bench.folder / "mini.json")
            seconds[count].append(next(float(line["elapsedtime"]) for line in bench.log()
                                       if isinstance(line["step"], list) and line["step"]))

        alternate({count: lambda count=count: start(count) for count in seconds}, bench.repeats, warm_up=1)
    few, many = (spread(seconds[count][1:]) for count in (2, 200))
    return {"first_step_seconds_2_shards": few, "first_step_seconds_200_shards": many,
            "first_step_ratio": many["median"] / few["median"]}


def waiting(bench: Bench) -> dict:
    from tests.support.shaped_link import shaped_link

    rows = 100
    url = bench.data_set("waiting", STEPS * ROWS // rows + 1, rows)
    local = {"input_dir": bench.folder / "waiting", "max_steps": STEPS}
    bench.train(**local)
    times = [line["data"]["step_time"] for line in bench.log() if "step_time" in line["data"]]
    step = spread(times[WARM_UP:])["median"]
    needed = bench.bytes_of("waiting") / (STEPS * ROWS // rows + 1) / rows * ROWS / step
    with shaped_link(bench.url, LATENCY, total_rate=1.5 * needed) as link, bench.cache(link.url):
        bench.train(input_dir=url, max_steps=STEPS)
    shares = [line["data"]["data_waiting_share"] for line in bench.log() if "data_waiting_share" in line["data"]]
    shares = shares[WARM_UP:]
    return {"needed_bytes_per_second": needed, "data_waiting_share": sum(shares) / len(shares)}


def connections(bench: Bench) -> dict:
    from common import object_store
    from tests.support.shaped_link import shaped_link

    server = subprocess.Popen([sys.executable, "-c", FILE_SERVER, str(TRANSFER_BYTES)], stdout=subprocess.PIPE,
                              encoding="utf-8")
    try:
        with shaped_link(server.stdout.readline().strip(), **TRANSFER) as link, bench.cache(link.url):
            def fetch(count: int, nbytes: int) -> None:
                folder = object_store.S3Folder("s3://data/large")
                with patch.object(object_store, "CONNECTIONS", count), open(bench.folder / "copy", "wb") as file:
                    folder.download("file", file, threading.Event())
                assert (bench.folder / "copy").stat().st_size == nbytes

            seconds = alternate({count: lambda count=count: fetch(count, TRANSFER_BYTES)
                                 for count in (1, object_store.CONNECTIONS)}, bench.repeats, warm_up=0)
    finally:
        server.kill()
        server.wait()
    one, many = (TRANSFER_BYTES / spread(found)["median"] for found in seconds.values())
    return {"bytes_per_second_one_connection": one, "bytes_per_second": many, "connections_ratio": many / one}


def fetched(bench: Bench) -> dict:
    from tests.support.shaped_link import shaped_link

    shards, rows, step = 10, 4000, 2000  # rows of a step of both ranks
    url = bench.data_set("fetched", shards, rows, predictions=1)  # few, so that a step takes no time
    size = bench.bytes_of("fetched")
    found = {}
    for name, bound in (("", None), ("_bounded", 0.6 * size)):
        with shaped_link(bench.url, LATENCY) as link, bench.cache(link.url) as cache, watched(cache) as most:
            bench.train(2, input_dir=url, max_steps=shards * rows // step - 1, train_batch_size=step // 2,
                        max_predictions_per_seq=1, config_file=tiny(bench), shard_cache_gb=bound and bound / 1e9)
        found |= {f"fetched_ratio{name}": link.received / size,
                  f"most_on_disk{name}": max(most) / (bound or size)}
    return found


def tiny(bench: Bench) -> Path:
    from tests.support import samples

    return samples.write_config(bench.folder / "tiny.json", max_position_embeddings=128)


@contextmanager
def watched(folder: Path):
    """A block during which the bytes of shards below a folder are looked at, again and again; yields what was seen."""
    seen, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.01):
            total = 0
            for path in folder.rglob("*"):
                with suppress(OSError):
                    total += path.stat().st_size if path.suffix in (".hdf5", ".part") else 0
            seen.append(total)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def stall(bench: Bench) -> dict:
    import run_pretraining
    from training.trainer import Trainer

    bench.data_set("stall", 1, 2000)
    save, stalls = Trainer.save, {"local": [], "s3": []}
    outputs = {"local": str(bench.folder / "stall_out"), "s3": "s3://data/stall_out"}
    for number in range(bench.repeats):  # in turn, as a slow moment of the machine would meet one of them only
        for name, output in outputs.items():
            seconds = []

            def timed_save(trainer, step: int, seconds=seconds) -> None:
                began = time.perf_counter()
                save(trainer, step)
                seconds.append(time.perf_counter() - began)

            with bench.cache(bench.url), patch.object(Trainer, "save", timed_save), \
                    open(os.devnull, "w", encoding="utf-8") as nowhere, patch("sys.stdout", nowhere):
                run_pretraining.main(bench.flags(
                    input_dir=bench.folder / "stall", output_dir=f"{output}_{number}", skip_checkpoint=None,
                    train_batch_size=4, num_steps_per_checkpoint=CHECKPOINT_EVERY,
                    max_steps=CHECKPOINT_EVERY * CHECKPOINTS))
            stalls[name] += seconds[1:]  # the first one finds no memory that it can use again
    found = {name: spread(seconds) for name, seconds in stalls.items()}
    return {"stall_seconds_local": found["local"], "stall_seconds_s3": found["s3"],
            "stall_ratio": found["s3"]["median"] / found["local"]["median"]}


PARTS = {"first_step": first_step, "waiting": waiting, "connections": connections, "fetched": fetched, "stall": stall}

if __name__ == "__main__":
    cli.run(main)
