"""The base model: found, fetched or made; its tokenizer, weights and digests."""
