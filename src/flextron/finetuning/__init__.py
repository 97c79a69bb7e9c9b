"""Finetuning adapters beside frozen weights: data sets, packs, layer-by-layer gradients, the optimizer's steps."""
