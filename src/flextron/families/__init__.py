"""Model families as data: where tensors lie, what the keys of `config.json` mean, and the stock config of a result."""
