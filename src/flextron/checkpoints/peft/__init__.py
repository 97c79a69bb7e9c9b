"""Adapters on disk, as peft lays them out: `adapter_config.json` and `adapter_model.safetensors`.

An adapter belongs to the checkpoint that it was trained beside: the elastic one, whose neurons and groups are permuted
and which stock `transformers` loads, an extracted sub-network's, or the original, into whose order it is put when it is
read (`base`).
"""
