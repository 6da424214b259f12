"""Generation as files that JAX alone reads: StableHLO by `jax.export`, its weights beside it.

from jax import export
from safetensors.numpy import load_file

program = export.deserialize(open("made/program.stablehlo", "rb").read())
made = program.call(load_file("made/weights.safetensors"), {"S2L2A": tiles}, np.zeros(len(tiles), np.uint32))  # and the seeds
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from terramind_jax.convert import files

PLATFORMS = ("cpu", "cuda", "tpu")
BATCH = "batch"  # how a size that is open is called


def open_size() -> Any:
    """A batch size that is chosen in each call."""
    from jax import export

    return export.symbolic_shape(BATCH)[0]


def write(
    path: str | os.PathLike,
    run: Callable[..., dict[str, jax.Array]],
    weights: Mapping[str, jax.Array],
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes the folder `path`, which must not exist: ``program.stablehlo``, ``weights.safetensors`` and ``interface.json``.

    The last names what goes in and comes out, with shapes and types. `run` is of `program.build`, `inputs` of `program.shapes`.

    Raises:
      FileExistsError: there is something at `path`.
      ImportError: ``flatbuffers``, the extra ``export``, is not installed.
    """
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise ImportError("Exported programs need flatbuffers: pip install 'terramind-jax[export]'.") from None
    from jax import export

    path = Path(path)
    files.check_free(path)
    sizes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    seeds = jax.ShapeDtypeStruct((next(iter(inputs.values())).shape[0],), jnp.uint32)
    program = export.export(jax.jit(run), platforms=tuple(platforms))(sizes, dict(inputs), seeds)
    outputs = jax.tree.unflatten(program.out_tree, program.out_avals)
    interface = {"inputs": _described({**inputs, "seeds": seeds}), "outputs": _described(outputs), "platforms": list(platforms)}
    with files.replacing(path) as folder:
        folder.mkdir()
        (folder / "program.stablehlo").write_bytes(program.serialize())
        files.write(folder / "weights.safetensors", {name: np.asarray(x) for name, x in weights.items()})
        (folder / "interface.json").write_text(json.dumps(interface, indent=2) + "\n")


def _described(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"shape": [x if isinstance(x, int) else str(x) for x in a.shape], "dtype": str(a.dtype)} for name, a in arrays.items()}
