"""The mesh and the table of logical axes."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from terramind_jax import model, sharding, zoo


def test_minus_one_takes_the_remaining_devices():
    assert dict(sharding.make_mesh(data=-1, fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "message"), [((3, 1, 1), "does not cover 8 devices"), ((-1, -1, 1), "at most one"), ((0, 1, 1), "positive")]
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*sizes)


def test_a_tensor_axis_across_hosts_is_refused():
    hosts = np.array([SimpleNamespace(process_index=i // 4) for i in range(8)])
    sharding.check_hosts(hosts.reshape(2, 1, 4))
    sharding.check_hosts(hosts.reshape(1, 4, 2))
    with pytest.raises(ValueError, match="Mesh size tensor=8 puts hosts 0 and 1 on the same rows of a batch; choose a size"):
        sharding.check_hosts(hosts.reshape(1, 1, 8))
    with pytest.raises(ValueError, match="tensor=2 puts hosts 0 and 1"):
        sharding.check_hosts(hosts.reshape(2, 4).T.reshape(4, 1, 2))


def test_dimensions_that_do_not_divide_are_replicated():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    module = model.TerraMind(model.TransformerConfig(**zoo.SIZES["tiny"]))
    places = sharding.param_shardings(mesh, jax.eval_shape(partial(model.init, module), jax.random.key(0)))["params"]
    assert places["encoder"]["mlp"]["fc1"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert places["decoder_token_emb"]["tok_dem@224"].spec == P("tensor", "fsdp")
    assert places["decoder_token_emb"]["tok_lulc@224"].spec == P(None, "fsdp")  # 4,375 codes are odd
    assert places["encoder"]["attn"]["qkv"]["kernel"].spec == P(None, "fsdp", None, None, None)  # three heads
