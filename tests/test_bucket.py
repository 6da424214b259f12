"""A run whose work directory is a bucket, at a server on this machine that speaks as Google Cloud Storage does.

Needs the ``gcs`` extra and fake-gcs-server (https://github.com/fsouza/fake-gcs-server) in the path; skipped without them.
"""

import importlib.util
import json
import shutil
import socket
import subprocess
import time
import urllib.request

import numpy as np
import pytest
import tiny_run

from terramind_jax.train import logging

SERVER = shutil.which("fake-gcs-server")
BUCKET = "gs://bucket/run"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SERVER or importlib.util.find_spec("gcsfs") is None, reason="needs gcsfs and fake-gcs-server"),
]


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Of a server with an empty bucket; processes started by the test find it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    options = ["-scheme=http", f"-port={port}", "-backend=memory", f"-public-host=localhost:{port}", f"-data={tmp_path / 'served'}"]
    with open(tmp_path / "server.log", "w") as log, subprocess.Popen([SERVER, *options], stdout=log, stderr=log) as server:
        time.sleep(1)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")  # gcsfs
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://localhost:{port}")
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        yield f"http://localhost:{port}"
        server.terminate()


def objects(address: str) -> set[str]:
    """Names of the objects under the work directory."""
    with urllib.request.urlopen(f"{address}/storage/v1/b/bucket/o?prefix=run/") as answer:
        return {item["name"].removeprefix("run/") for item in json.load(answer).get("items", ())}


def test_a_run_in_a_bucket_is_killed_while_it_saves_and_goes_on(address, tmp_path):
    config = tiny_run.pretraining(tiny_run.write_shards(tmp_path / "shards"))
    config.data.val_split = "none"
    config.run.update(checkpoint_every=7, tensorboard=True)
    path = tiny_run.write_config(tmp_path / "config.py", config)
    whole, logs = tmp_path / "whole", tmp_path / "broken"
    assert tiny_run.ended(tiny_run.start(path, whole)) == [0]

    killed = tiny_run.start(path, logs, f"--workdir={BUCKET}", "--profile=2:4")
    tiny_run.wait_for(lambda: any(name.startswith("checkpoints/14/") for name in objects(address)), killed)
    killed[0].kill()
    killed[0].wait()
    assert "checkpoints/7/commit_success.txt" in (left := objects(address))
    assert "checkpoints/14/commit_success.txt" not in left
    assert tiny_run.ended(tiny_run.start(path, logs, f"--workdir={BUCKET}")) == [0]

    names = objects(address)
    complete = {name.split("/")[1] for name in names if name.startswith("checkpoints/") and name.count("/") == 2 and "commit" in name}
    assert complete == {"21", "28", "32"} == {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
    assert "config.json" in names and any(name.endswith(".xplane.pb") for name in names)
    assert sum(name.startswith("tensorboard/") for name in names) == 2
    lines = []
    for name in sorted(name for name in names if name.startswith("metrics")):
        with urllib.request.urlopen(f"{address}/bucket/run/{name}") as answer:
            lines += [json.loads(line) for line in answer.read().splitlines()]
    got, expected = ([(one["step"], one["loss"]) for one in log if "loss" in one] for log in (lines, logging.read(whole)))
    np.testing.assert_array_equal(got, expected)
    assert tiny_run.samples(logs) == tiny_run.samples(whole)
