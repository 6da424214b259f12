import numpy as np
import peer
import torch


def test_randomize_leaves_nothing_at_its_initial_value_but_positions():
    drawn, other = (peer.numpy_state(peer.encdec("tiny", encoder_depth=1, decoder_depth=1, seed=seed)) for seed in (1, 2))
    for key, value in drawn.items():
        assert np.isfinite(value).all()
        assert np.array_equal(value, other[key]) == key.endswith("pos_emb"), key
    assert abs(drawn["encoder_norm.weight"].mean() - 1) < 0.05 and 0.01 < drawn["encoder_norm.bias"].std() < 0.03
    key = "decoder_embeddings.tok_dem@224"
    assert np.shares_memory(drawn[f"{key}.token_emb.weight"], drawn[f"{key}.to_logits.weight"])


def test_models_are_built_by_name_without_downloads():
    vit = peer.build("terramind_v1_tiny", modalities=["S2L2A"])
    assert [x.shape for x in vit({"S2L2A": torch.zeros(1, 12, 224, 224)})][-1] == (1, 196, 192)
    generator = peer.build("terramind_v1_tiny_generate", modalities=["S2L2A"], output_modalities=["DEM"], tokenizers={})
    assert not any(key.startswith("tokenizer") for key in generator.state_dict())
    latent = peer.build("terramind_v1_tokenizer_dem", backbone=True, return_type="latent")
    assert not any(key.startswith("decoder") for key in latent.state_dict())
