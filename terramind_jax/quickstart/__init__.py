"""The main job, small: shards, tokenizers, tokens, transformer, generation, in one command on one machine.

Each part is a command of the package, printed before it runs, so that what happens here can be done by hand at any size.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from terramind_jax import modalities
from terramind_jax.data import pack
from terramind_jax.data.index import open_index

HERE = Path(__file__).parent
SCENES, VAL_SCENES = 768, 32  # of the embedded world
SOURCES = ("S2L2A", "S2L1C", "S1GRD", "S1RTC", "DEM")  # the first that there is becomes the input, the others are generated
RADAR = ("model.levels=12",)  # codes of a patch: more would describe its speckle, which nothing foretells
# One long level tells heights, where of four short ones a few codes stay in use; and a plain is drawn flat.
DEM = ("model.levels=250", "train.zero_output=True")
OWN = {"S1GRD": RADAR, "S1RTC": RADAR, "DEM": DEM}  # fields of a modality's tokenizer besides those of tokenizer.py
LONGER = {"DEM": 3}  # times the steps of the others, which cost more each
NOMINAL_MINUTES = 9.0  # of training on two cores, at the configured numbers of steps


def run(data: str | None = None, out: str | None = None, *, minutes: float = NOMINAL_MINUTES, lulc_codes: str = "terramesh") -> None:
    """Trains a small TerraMind and generates what held-out scenes lack.

    Args:
      data: folder of GeoTIFFs ``MODALITY/NAME.tif``; None: scenes of the embedded world.
      out: shards, work directories and results; finished parts are kept and a second call goes on from them. Default: ``quickstart``
        for the embedded world, ``quickstart_NAME`` for a folder NAME.
      minutes: about how long to train on two cores; scales the numbers of steps.
      lulc_codes: what the codes of LULC rasters in `data` mean: terramesh, esri or dynamicworld.
    """
    from terramind_jax.quickstart import evaluate

    start, folder = time.monotonic(), Path(out or default_out(data))
    if minutes <= 0:
        raise ValueError(f"minutes is {minutes}; expected a positive number.")
    scale = minutes / NOMINAL_MINUTES
    goes_on = (folder / "shards").exists()
    _shards(data, folder / "shards", lulc_codes)
    present = open_index(folder / "shards", "train").modalities
    source = next((m for m in SOURCES if m in present), None)
    targets = [m for m in present if modalities.get(m).levels and m != source]
    if source is None or not targets:
        raise ValueError(
            f"{data} holds {', '.join(present)}; expected one of {', '.join(SOURCES)} and another modality to generate from it."
        )
    slowest_first = sorted(targets, key=lambda m: -modalities.get(m).channels * LONGER.get(m, 1))
    logs = [folder / "logs" / f"tokenizer_{m}.log" for m in slowest_first]
    _side_by_side([_tokenizer_command(m, folder, scale) for m in slowest_first], logs)
    _command("tokenize", f"--data={folder / 'shards'}", f"--weights={folder / 'tokenizers'}", f"--out={folder / 'shards'}")
    # Without coordinates: their table of 30,000 words is larger than the rest of this model, and a few hundred places fill none of it.
    fields = [f"data.inputs={','.join(present)}", f"data.targets={','.join(targets)}"]
    fields.append(f"mask.input_alphas=({{'{modalities.input_stream(source).key}': 1000.0}}, 0.5)")
    _command("pretrain", *_training("pretrain", folder / "model", folder, scale, *fields))
    taken = (time.monotonic() - start) / 60
    evaluate.run(folder, source, is_embedded=data is None, minutes=None if goes_on else taken)
    print(f"Done in {(time.monotonic() - start) / 60:.1f} minutes. Look at {folder / 'generated.png'} and {folder / 'report.md'}.")


def default_out(data: str | None) -> str:
    """``quickstart``, or ``quickstart_NAME`` for a folder of tiles, so that one run never takes up another's shards."""
    return "quickstart" if data is None else f"quickstart_{os.path.basename(os.path.abspath(data))}"


def _shards(data: str | None, shards: Path, lulc_codes: str) -> None:
    if data is None:
        _command("data", "synthesize", f"--out={shards}", f"--scenes={SCENES}", f"--val_scenes={VAL_SCENES}")
    elif not pack.is_packed(data, shards, lulc_codes):
        _command("data", "pack", data, str(shards), f"--lulc_codes={lulc_codes}", "--val_fraction=0.25")


def _training(name: str, workdir: Path, folder: Path, scale: float, *fields: str) -> list[str]:
    from terramind_jax.quickstart import pretrain, tokenizer

    # Not from their configurations: these ask for the devices, which a TPU gives to one process, and the command needs them.
    whole = {"pretrain": pretrain.STEPS, "tokenizer": tokenizer.STEPS}[name]
    steps = max(2, round(whole * scale))
    given = [f"data.root={folder / 'shards'}", f"train.steps={steps}", *fields]
    return [f"--config={HERE / name}.py", f"--workdir={workdir}", *(f"--config.{field}" for field in given)]


def _tokenizer_command(modality: str, folder: Path, scale: float) -> list[str]:
    workdir = folder / "tokenizers" / modality
    fields = [f"model.modality={modality}", "run.progress=False", *OWN.get(modality, ())]
    return ["train-tokenizer", *_training("tokenizer", workdir, folder, scale * LONGER.get(modality, 1), *fields)]


# ---- running commands ----


def _start(arguments: Sequence[str], at_once: int = 1, **options) -> subprocess.Popen:
    """A command of the package in a process of its own, with its share of the cores and huge pages for XLA's buffers."""
    threads = max(1, (os.cpu_count() or 1) // at_once)
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "NPROC": str(threads), **os.environ}
    return subprocess.Popen([sys.executable, "-m", "terramind_jax", *arguments], env=environment, **options)


def _announce(arguments: Sequence[str]) -> None:
    print(f"\n$ terramind-jax {shlex.join(arguments)}", flush=True)


def _command(*arguments: str) -> None:
    """Runs one command of the package with its output shown; its error message ends the quickstart."""
    _announce(arguments)
    process = _start(arguments)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C reached it, too, and it says what it keeps
        raise
    if code:
        raise ValueError(f"The quickstart stopped in: terramind-jax {shlex.join(arguments)}")


def _side_by_side(commands: Sequence[Sequence[str]], logs: Sequence[Path], at_once: int = 2) -> None:
    """Runs commands two at a time, each with its own log: small programs use two cores better than one after the other."""
    waiting, running = list(zip(commands, logs, strict=True)), []
    while waiting or running:
        while waiting and len(running) < at_once:
            arguments, log = waiting.pop(0)
            _announce(arguments)
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "w") as stream:
                running.append((_start(arguments, at_once, stdout=stream, stderr=subprocess.STDOUT), arguments, log))
        for job in [job for job in running if job[0].poll() is not None]:
            running.remove(job)
            if job[0].returncode:
                for other, *_ in running:
                    other.terminate()
                raise ValueError(f"{_last_line(job[2])} (in: terramind-jax {shlex.join(job[1])}; log: {job[2]})")
            print(f"  {job[2].stem}: {_last_line(job[2])}", flush=True)
        time.sleep(0.2)


def _last_line(log: Path) -> str:
    """What a command said last, or its error, which threads may have buried."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[-1])
