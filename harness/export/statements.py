"""What an export must keep, in words, and the bars of its predictions."""

# Mean KL(merged weights in float32 || file) in nats a predicted token, on held-out text of a trained base.
# For scale: 8B models have 2.4e-4 at q8_0 and 0.03 at q4_k_m (llama.cpp's tables), the tiny base 2e-4 and 0.015.
# f16 is llama.cpp's rounding of activations, not the file: 1.5e-7 on the tiny base, where an f32 file has 7e-12.
# It grows with depth and width, so that on a large model the bar may say more of llama.cpp than of the export.
BARS = {"f16": 1e-6, "q8_0": 1e-3, "q4_k_m": 0.05}

STATEMENTS: dict[str, str] = {
    "merge": "Merged weights are base + scale B A, rounded once; every other tensor is the same bytes.",
    "merged_against_adapter": "The merged weights predict what the adapter on the original 16-bit base predicts.",
    **{
        f"divergence_{kind}": f"The {kind} file predicts what the merged weights predict: mean KL below {bar:g} nats."
        for kind, bar in BARS.items()
    },
    "chain": "From base to the smallest file the held-out loss is known, and the adapter improved it.",
    "greedy": "Greedy answers of the f16 file are those of the merged weights, token by token.",
    "lora_route": "Base and LoRA as GGUF files of their own predict what the merged model predicts.",
    "tokens": "llama.cpp reads text as the tokenizer does, composed text (NFC) provided.",
    "template": "The chat template in the file gives the tokenizer's text and ids.",
    "specials": "BOS, EOS and padding are the tokenizer's.",
    "modelfile": "The Modelfile is valid and its template renders the tokenizer's text.",
    "lineage": "Each artefact, from corpus to GGUF, is by its SHA-256 what the records say.",
}
